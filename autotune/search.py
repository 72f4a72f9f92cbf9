"""Propose configurations and learn from what became of them, together with whoever else works on the same study.

First come the neighbours of the best point so far, which differ in one field, those of fields with few values first:
where fields hardly depend on each other that is most of the way (on a recorded table the best of 102 points was found
in 12 trials; by Optuna alone 15 end 4.8% away, in the median). Then Optuna proposes, which finds what fields do
together: by a Gaussian process for the first hundred trials where scipy is installed, else by its TPE. On that table,
from 20 random points on, neighbours and then the GP were 0.8% from the best after 20 trials and at it after 30, in the
mean; with TPE 1.2% and 0.4%, at random 1.2% and 0.7%. The GP takes 0.2 to 0.7 s for a proposal, TPE milliseconds. Both
propose what they have seen before (TPE in 60 of 120 asks in a space of this size), so what is known is told to them and
never measured twice; where what is left fits into the time, it is tried point by point.

A space of millions is never listed. Where there is a screen, what is to come is compiled first: what that rules out is
told as pruned, the rest is tried in the order of its estimates. Fields are indices into their ordered values. A failure
is told as a violated constraint with a finite value, to be learned from.
"""

import json
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from autotune import ledger, storage
from autotune.ledger import Ledger
from autotune.outcomes import UsageError
from autotune.space import Space
from autotune.timing import Spread

MEASURED, WRONG, FAILED, PRUNED = "measured", "wrong", "failed", "pruned"
GP, TPE = "gp", "tpe"
PENALTY = math.log(8.0)
"""The value of a configuration that has none: worse than any that is worth measuring."""
ASKS = {GP: 3, TPE: 20}
"""Proposals that may be old ones before a point is drawn at random: the GP's are dear."""
FEW = 100
"""Outcomes from which on the GP, whose time grows with their cube, gives way to TPE."""
ENOUGH = 5
"""Trials whose mean duration tells whether all others fit into the time."""
DRAWS = 10_000
"""Random points of a space that is not listed, of which one is likely to be new."""
POLL = 1.0
"""Seconds between two looks at what others, who hold all that is left, have told."""
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
    conditions: dict | None = None
    """Where the threads were held while it was timed, and the load of the machine before and after."""

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
    """One study: the points of a space, and the outcomes so far, those of earlier runs and other workers among them.

    A context manager: behind it this worker holds no point. Used by one thread.
    """

    space: Space
    path: Path
    """The journal that keeps the study, where no URL is given."""
    name: str
    seed: int = 0
    first: tuple[object, ...] = ()
    """Configurations to try before any other: those that are known to be good elsewhere."""
    screen: Callable[[list], dict[object, float | str]] | None = None
    """Says of configurations what their estimate is, the least first, or why they are out; those it leaves out are
    not tried now."""
    url: str | None = None
    """The storage that keeps the study: see autotune.storage."""
    wait: Callable[[float], None] = time.sleep
    """Waits for so many seconds while others measure all that is left."""
    sampler: Literal["gp", "tpe"] | None = None
    """What proposes beyond the neighbours; None: what suits the number of outcomes, of what is installed."""
    outcomes: dict[object, Outcome] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.size = self.space.counted().left
        self.points = tuple(self.space.points()) if self.size <= LISTED else ()
        self.values = {name: x for part in self.space.parts.values() for name, x in part.items()}
        self.counts = {
            name: len({getattr(point, name) for point in self.points} or values) for name, values in self.values.items()
        }
        self.distributions = {name: IntDistribution(0, len(x) - 1) for name, x in self.values.items()}
        self.ledger = Ledger(storage.opened(self.url, self.path), self.name, self.distributions)
        self._samplers = (self.sampler,) if self.sampler else (GP, TPE) if find_spec("scipy") else (TPE,)
        self._warned = not storage.shared_badly(self.url)
        self._read()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error) -> None:
        self.ledger.release()

    @property
    def left(self) -> list[object]:
        """Return the points to try, in the order of the space; none of a space that is not listed."""
        return [point for point in self.points if self.unknown(point)]

    def unknown(self, config) -> bool:
        """Tell whether a configuration is a point without an outcome, that nobody is measuring."""
        return config not in self.outcomes and config not in self.busy and self.space.admits(config)

    def next(self, seconds: float) -> object | None:
        """Claim the configuration to try next when so many seconds are left; None where there is none to try.

        Where others hold all that is left it waits: a point comes back when its worker dies. One that holds points
        itself is never kept waiting.
        """
        until = time.monotonic() + seconds
        while True:
            self._read()
            config, way = self._chosen(until - time.monotonic())
            left = until - time.monotonic()
            if config is None and (not self.busy or self.ledger.holding or left <= 0):
                return None
            if config is None:
                self.wait(min(POLL, left))
            elif self.ledger.claim(self._params(config), way):
                return config

    def tell(self, config, outcome: Outcome) -> None:
        """Keep what became of the configuration that `next` returned; it is in the storage when this returns."""
        told = json.dumps(outcome.to_json())
        self.ledger.tell(self._params(config), outcome.value, told, violated=outcome.status != MEASURED)
        self._read()

    @property
    def ways(self) -> dict[str, int]:
        """Return how many trials were found in which way: first, exhaustive, neighbour, gp, tpe, random."""
        return self.ledger.ways()

    def best(self, within: float, most: int) -> list[object]:
        """Return the quickest configurations, at most so many, that take at most (1 + within) times the least."""
        timed = sorted((x.value, i) for i, x in enumerate(self.outcomes.values()) if x.status == MEASURED)
        configs = list(self.outcomes)
        return [configs[i] for value, i in timed if value <= timed[0][0] + math.log1p(within)][:most]

    def _read(self) -> None:
        """Take over what everybody has told."""
        self.ledger.read()
        for point, told in list(self.ledger.known.items())[len(self.outcomes) :]:
            self.outcomes[self._at(point)] = Outcome.from_json(json.loads(told))
        self.busy = {self._at(point) for point in self.ledger.busy}
        if not self._warned and self.ledger.others:
            self._warned = True
            warnings.warn("--storage: workers that share SQLite run trials twice; a server does not", stacklevel=2)

    def _chosen(self, seconds: float) -> tuple[object | None, str]:
        """Return an unknown configuration to try next, None where there is none, and the way it was found."""
        if len(self.outcomes.keys() | self.busy) >= self.size:
            return None, ""
        ways = {
            "first": lambda: next((x for x in self.first if self.unknown(x)), None),
            "exhaustive": lambda: self._last(seconds),
            "neighbour": self._neighbour,
            self._sampler: self._proposed,
            "random": self._drawn,
        }
        found = ((way(), name) for name, way in ways.items())
        return next((x for x in found if x[0] is not None), (None, ""))

    def _last(self, seconds: float) -> object | None:
        """Return a point of a space that can be tried to its end in so many seconds."""
        spent = [outcome.seconds for outcome in self.outcomes.values()]
        fits = len(spent) >= ENOUGH and sum(spent) / len(spent) * (self.size - len(spent)) <= seconds
        return self._screened(self.left) if fits else None

    def _neighbour(self) -> object | None:
        """Return a point that differs from the best one in one field, first in those that have the fewest values."""
        best, fields = self.best(0, 1), sorted(self.values.items(), key=lambda field: self.counts[field[0]])
        near = (replace(x, **{name: value}) for x in best for name, values in fields for value in values)
        return self._screened([x for x in near if self.unknown(x)])

    def _screened(self, configs: list) -> object | None:
        """Return the first of these, or the one of the least estimate; those that are out are told."""
        if not self.screen or not configs:
            return next(iter(configs), None)
        said = self.screen(configs)
        for config, reason in said.items():
            if isinstance(reason, str):
                self.tell(config, Outcome(PRUNED, 0.0, message=reason))
        return min((x for x in said if not isinstance(said[x], str)), key=said.get, default=None)

    @property
    def _sampler(self) -> str:
        return self._samplers[0 if len(self.outcomes) < FEW else -1]

    def _proposed(self) -> object | None:
        """Return what Optuna proposes, in a study of its own: a claim is one step, and asking takes many.

        What it proposes depends on the seed and on what everybody has told, not on how often it was asked.
        """
        name = self._sampler
        study = optuna.create_study(sampler=_made(name, f"{self.seed} {len(self.outcomes)}"))
        study.add_trials([self._finished(config, x) for config, x in self.outcomes.items()])
        study.add_trials([self._trial(config, state=TrialState.RUNNING) for config in sorted(self.busy, key=repr)])
        for _ in range(ASKS[name]):
            trial = study.ask(self.distributions)
            config = self._config(trial.params)
            if self.unknown(config) and self._screened([config]):
                return config
            outcome = self.outcomes.get(config)
            trial.set_constraint("failed", float(outcome is None or outcome.status != MEASURED))
            study.tell(trial, outcome.value if outcome else PENALTY)
        return None

    def _drawn(self) -> object | None:
        """Return a random point; None where many draws found none."""
        draw = random.Random(f"{self.seed} {len(self.outcomes)} {len(self.busy)}")
        drawn = ({name: draw.randrange(len(x)) for name, x in self.values.items()} for _ in range(DRAWS))
        configs = draw.sample(self.left, len(self.left)) if self.points else map(self._config, drawn)
        return next((x for x in configs if self.unknown(x) and self._screened([x])), None)

    def _finished(self, config, outcome: Outcome) -> FrozenTrial:
        failed = {"failed": float(outcome.status != MEASURED)}
        return self._trial(config, value=outcome.value, constraints=failed)

    def _trial(self, config, **about) -> FrozenTrial:
        return create_trial(params=self._params(config), distributions=self.distributions, **about)

    def _config(self, params: dict[str, int]):
        return self.space.kind(**self.space.fixed, **{name: self.values[name][i] for name, i in params.items()})

    def _at(self, point: tuple[int, ...]):
        return self._config(dict(zip(self.distributions, point, strict=True)))

    def _params(self, config) -> dict[str, int]:
        return {name: values.index(getattr(config, name)) for name, values in self.values.items()}


def forget(path: Path, name: str, url: str | None) -> None:
    """Forget the trials of a study; UsageError where somebody is at work on it. A journal that is none is deleted."""
    try:
        ledger.forget(storage.opened(url, path), name)
    except UsageError as error:
        if url or not isinstance(error.__cause__, storage.UNREADABLE):
            raise
        path.unlink()


def _made(name: str, seed: str) -> optuna.samplers.BaseSampler:
    """Make a sampler; a number from text is the same in every process."""
    number = random.Random(seed).getrandbits(32)
    if name == GP:
        return optuna.samplers.GPSampler(n_startup_trials=12, seed=number)
    return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=15, seed=number)
