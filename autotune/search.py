"""Propose configurations and learn from what became of them: an Optuna study on a file, asked and told.

First come the neighbours of the best point so far, which differ in one field, those of fields with few values first:
where fields hardly depend on each other that is most of the way (on a recorded table the best of 102 points was found
in 12 trials; by Optuna alone 15 end 4.8% away, in the median). Then Optuna proposes, which finds what fields do
together. Its estimator proposes what it has seen before (60 of 120 asks in a space of this size), so what is known is
told to it and never measured twice; where what is left fits into the time, it is tried point by point. A space of
millions is never listed. Where there is a screen, what is to come is compiled first: what that rules out is told as
pruned, the rest is tried in the order of its estimates. Fields are indices into their ordered values. A failure is told
as a violated constraint with a finite value, to be learned from.
"""

import json
import math
import random
from collections.abc import Callable
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

MEASURED, WRONG, FAILED, PRUNED = "measured", "wrong", "failed", "pruned"
PENALTY = math.log(8.0)
"""The value of a configuration that has none: worse than any that is worth measuring."""
ASKS = 20
"""Proposals that may be old ones before a point is drawn at random."""
ENOUGH = 5
"""Trials whose mean duration tells whether all others fit into the time."""
DRAWS = 10_000
"""Random points of a space that is not listed, of which one is likely to be new."""
LISTED = 4096
"""Points of a space up to which it is listed as a whole."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Outcome:
    """What became of one configuration."""

    status: Literal["measured", "wrong", "failed", "pruned"]
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
    screen: Callable[[list], dict[object, float | str]] | None = None
    """Says of configurations what their estimate is, the least first, or why they are out; those it leaves out are
    not tried now."""
    outcomes: dict[object, Outcome] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.size = self.space.counted().left
        self.points = tuple(self.space.points()) if self.size <= LISTED else ()
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
        """Return the points without an outcome, in the order of the space; none of a space that is not listed."""
        return [point for point in self.points if point not in self.outcomes]

    def unknown(self, config) -> bool:
        """Tell whether a configuration is a point without an outcome."""
        return config not in self.outcomes and self.space.admits(config)

    def next(self, seconds: float) -> object | None:
        """Return the configuration to try next when so many seconds are left; None where everything is known."""
        if len(self.outcomes) >= self.size:
            return None
        config = next((x for x in self.first if self.unknown(x)), None) or self._last(seconds) or self._neighbour()
        if config is None and (config := self._proposed()):
            return config
        self._trial = None
        return config or self._drawn()

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

    def _last(self, seconds: float) -> object | None:
        """Return a point of a space that can be tried to its end in so many seconds."""
        spent = [outcome.seconds for outcome in self.outcomes.values()]
        fits = len(spent) >= ENOUGH and sum(spent) / len(spent) * (self.size - len(spent)) <= seconds
        return self._screened(self.left) if fits else None

    def _neighbour(self) -> object | None:
        """Return a point that differs from the best one in one field."""
        best = self.best(0, 1)
        fields = sorted(self.values.items(), key=lambda field: len(field[1]))
        near = (replace(x, **{name: value}) for x in best for name, values in fields for value in values)
        return self._screened([x for x in near if self.unknown(x)])

    def _screened(self, configs: list) -> object | None:
        """Return the first of these, or the one of the least estimate; those that are out are told."""
        if not self.screen or not configs:
            return next(iter(configs), None)
        said = self.screen(configs)
        self._trial = None
        for config, reason in said.items():
            if isinstance(reason, str):
                self.tell(config, Outcome(PRUNED, 0.0, message=reason))
        return min((x for x in said if not isinstance(said[x], str)), key=said.get, default=None)

    def _proposed(self) -> object | None:
        for _ in range(ASKS):
            trial = self.study.ask(self.distributions)
            config = self._config(trial.params)
            if self.unknown(config) and self._screened([config]):
                self._trial = trial
                return config
            self._told(trial, self.outcomes.get(config))
        return None

    def _drawn(self) -> object | None:
        """Return a random point; None where many draws found none."""
        if self.points:
            return self._screened([self._random.choice(self.left)])
        for _ in range(DRAWS):
            config = self._config({name: self._random.randrange(len(x)) for name, x in self.values.items()})
            if self.unknown(config) and self._screened([config]):
                return config
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
