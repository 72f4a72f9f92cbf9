"""Propose configurations and learn from what became of them: an Optuna study on a file, asked and told.

First come the neighbours of the best point so far, which differ in one field, those of fields with few values first:
where fields hardly depend on each other that is most of the way (on a recorded table the best of 102 points was found
in 12 trials; by Optuna alone 15 end 4.8% away, in the median). Then Optuna proposes, which finds what fields do
together. Its estimator proposes what it has seen before (60 of 120 asks in a space of this size), so what is known is
told to it and never measured twice; where what is left fits into the time, it is tried point by point. Fields are
indices into their ordered values. A failure is told as a violated constraint with a finite value, to be learned from.
"""

import json
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import optuna
from optuna.distributions import IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from autotune.outcomes import UsageError
from autotune.space import Space
from autotune.timing import Spread

MEASURED, WRONG, FAILED = "measured", "wrong", "failed"
PENALTY = math.log(8.0)
"""The value of a configuration that has none: worse than any that is worth measuring."""
ASKS = 20
"""Proposals that may be old ones before a point is drawn at random."""
ENOUGH = 5
"""Trials whose mean duration tells whether all others fit into the time."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Outcome:
    """What became of one configuration."""

    status: Literal["measured", "wrong", "failed"]
    seconds: float
    """What it took to find out, compilation included."""
    ratio: Spread | None = None
    """Time over that of the default in the same rounds."""
    ms: Spread | None = None
    message: str | None = None

    @property
    def value(self) -> float:
        """Return what is minimised: the logarithm of the ratio."""
        return math.log(self.ratio.median) if self.status == MEASURED else PENALTY

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Outcome":
        """Read an outcome back."""
        spreads = {name: Spread(**data[name]) for name in ("ratio", "ms") if data[name]}
        return Outcome(**(data | spreads))


@dataclass
class Search:
    """One study: the points of a space, and the outcomes so far, those of earlier runs among them."""

    space: Space
    path: Path
    name: str
    seed: int = 0
    first: tuple[object, ...] = ()
    """Configurations to try before any other: those that are known to be good elsewhere."""
    outcomes: dict[object, Outcome] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.points = tuple(self.space.points())
        self.values = {name: x for part in self.space.parts.values() for name, x in part.items()}
        self.distributions = {name: IntDistribution(0, len(x) - 1) for name, x in self.values.items()}
        self.study, self._trial = self._opened(), None
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if "outcome" in trial.user_attrs:
                self.outcomes[self._config(trial.params)] = Outcome.from_json(json.loads(trial.user_attrs["outcome"]))
        self._random = random.Random(self.seed)

    def _opened(self) -> optuna.Study:
        """Open the study; UsageError where its file cannot be read or written."""
        sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=15, seed=self.seed)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend(self.path)
            storage = JournalStorage(JournalFileBackend(str(self.path)))
            return optuna.create_study(study_name=self.name, storage=storage, sampler=sampler, load_if_exists=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"the trials in {self.path} cannot be used: {error}; --fresh forgets them") from error

    @property
    def left(self) -> list[object]:
        """Return the points without an outcome, in the order of the space."""
        return [point for point in self.points if point not in self.outcomes]

    def next(self, seconds: float) -> object | None:
        """Return the configuration to try next when so many seconds are left; None where everything is known."""
        left = self.left
        if not left:
            return None
        config = next((x for x in self.first if x in left), None)
        spent = [outcome.seconds for outcome in self.outcomes.values()]
        if config is None and len(spent) >= ENOUGH and sum(spent) / len(spent) * len(left) <= seconds:
            config = left[0]
        config = config or self._neighbour(frozenset(left))
        if config is None and (config := self._proposed(frozenset(left))):
            return config
        self._trial = None
        return config or self._random.choice(left)

    def tell(self, config, outcome: Outcome) -> None:
        """Keep what became of the configuration that `next` returned; it is on the disk when this returns."""
        self.outcomes[config] = outcome
        if self._trial is not None:
            self._told(self._trial, outcome)
            return
        self.study.add_trial(
            create_trial(
                params=self._params(config),
                distributions=self.distributions,
                value=outcome.value,
                user_attrs={"outcome": json.dumps(outcome.to_json())},
                constraints={"failed": float(outcome.status != MEASURED)},
            )
        )

    def best(self, within: float, most: int) -> list[object]:
        """Return the quickest configurations, at most so many, that take at most (1 + within) times the least."""
        timed = sorted((x.value, i) for i, x in enumerate(self.outcomes.values()) if x.status == MEASURED)
        configs = list(self.outcomes)
        return [configs[i] for value, i in timed if value <= timed[0][0] + math.log1p(within)][:most]

    def _neighbour(self, left: frozenset) -> object | None:
        """Return a point that differs from the best one in one field."""
        best = self.best(0, 1)
        fields = sorted(self.values.items(), key=lambda field: len(field[1]))
        near = (replace(x, **{name: value}) for x in best for name, values in fields for value in values)
        return next((x for x in near if x in left), None)

    def _proposed(self, left: frozenset) -> object | None:
        for _ in range(ASKS):
            self._trial = self.study.ask(self.distributions)
            config = self._config(self._trial.params)
            if config in left:
                return config
            self._told(self._trial, self.outcomes.get(config))
        return None

    def _told(self, trial: optuna.Trial, outcome: Outcome | None) -> None:
        """Tell Optuna of a trial; one without an outcome is no point of the space."""
        if outcome is not None:
            trial.set_user_attr("outcome", json.dumps(outcome.to_json()))
        trial.set_constraint("failed", float(outcome is None or outcome.status != MEASURED))
        self.study.tell(trial, outcome.value if outcome else PENALTY)

    def _config(self, params: dict[str, int]):
        return self.space.kind(**self.space.fixed, **{name: self.values[name][i] for name, i in params.items()})

    def _params(self, config) -> dict[str, int]:
        return {name: values.index(getattr(config, name)) for name, values in self.values.items()}


def _mend(path: Path) -> None:
    """Cut off a last line without an end, which a process that was killed left: the next one would be glued to it."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
