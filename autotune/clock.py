"""Time configurations beside the default, in common rounds, and decide between the quickest in a new process."""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch

from autotune.arguments import implementation_of
from autotune.cases import Case, draw
from autotune.contest import relative_error
from autotune.outcomes import BoxOver
from autotune.paired import LEVEL, TIE, signed_rank
from autotune.pinning import Conditions, Pinning, load, pinned
from autotune.search import FAILED, MEASURED, WRONG, Outcome
from autotune.timing import Box, Effort, Samples, Spread, Stopwatch, race, ratio, stopwatch

FIRST = Effort(least=3, most=3, seconds=0)
MORE = Effort(least=4, most=12, seconds=1.5)
FINAL = Effort(least=9, most=25, seconds=12.0)
HOPELESS = 1.3
"""Times the default after three rounds from which on no further round is spent."""
DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
"""Relative difference to the default's outputs from which on a configuration is wrong: a sieve, the judge decides.
Another chunk length rounds elsewhere: 2e-6 in float32, and one rounding of the outputs, were the most seen."""


@dataclass(frozen=True)
class Bench:
    """What is timed: an implementation on inputs drawn for a case; picklable."""

    implementation: str
    case: Case
    dtype: str
    device: str
    threads: int

    def calls(self) -> Callable[[object], Callable[[], tuple]]:
        """Draw the inputs; returns a function from a configuration to its call."""
        torch.set_num_threads(self.threads)
        arguments = draw(self.case, self.device, self.dtype)
        call = implementation_of(self.implementation).call
        return lambda config: partial(call, **arguments, config=config)


@dataclass(frozen=True)
class Standing:
    """What the final race says of one configuration."""

    config: object
    ms: Spread
    over_default: Spread
    different: bool
    """Whether it can be told from the default."""
    conditions: Conditions | None = None
    """What the race ran under; None where times were recorded elsewhere."""


class Clock:
    """Times candidates against the default of one bench."""

    def __init__(self, bench: Bench, default: object, box: Box):
        self.bench, self.box, self.watch = bench, box, stopwatch(bench.device)
        self.usual, self.calls = default, bench.calls()
        self.conditions: Conditions | None = None
        """What the latest trial was timed under."""
        call = self.calls(default)
        with torch.no_grad():
            self.expected = call()
            self.default = prepared(self.watch, call)

    @torch.no_grad()
    def outcome(self, config) -> Outcome:
        """Compile, compare and time one configuration. Raises BoxOver where the box ends before three rounds."""
        begun = time.monotonic()
        call = self.calls(config)
        try:
            if wrong := self._wrong(call(), call()):
                return Outcome(WRONG, time.monotonic() - begun, message=wrong)
            samples = self._timed(prepared(self.watch, call))
        except BoxOver:
            raise
        except Exception as error:  # whatever a candidate raises is a result of the search, not its end
            return Outcome(FAILED, time.monotonic() - begun, message=f"{type(error).__name__}: {error}"[:500])
        mine, under = Spread.of(list(samples[0].values())), self.conditions.to_json()
        return Outcome(MEASURED, time.monotonic() - begun, ratio(*samples), mine, conditions=under)

    def raced(self, configs: list) -> list[Standing]:
        """Do what `raced` does, against the default of this clock."""
        return raced(self.bench, configs, self.usual)

    def _timed(self, call: Callable) -> tuple[Samples, Samples]:
        before = load()
        with held(self.bench) as pinning:
            samples = self._rounds(call, FIRST)
            if ratio(*samples).median < HOPELESS:
                samples = self._rounds(call, MORE)
        self.conditions = Conditions(pinning, before, load())
        return samples

    def _rounds(self, call: Callable, effort: Effort) -> tuple[Samples, Samples]:
        runners = {0: call, 1: self.default}
        timed = {key: partial(self.watch.milliseconds, x, self.watch.modes[-1]) for key, x in runners.items()}
        samples, raised = race(timed, effort, self.box)
        if raised:
            raise next(iter(raised.values()))
        return samples[0], samples[1]

    def _wrong(self, first: tuple, second: tuple) -> str | None:
        for name, x, again, expected in zip(("o", "final state"), first, second, self.expected, strict=True):
            if not torch.equal(x, again):
                return f"{name} differs between two calls"
            if not (error := relative_error(x, expected)) <= DIFFERENCE[self.bench.dtype]:
                return f"{name} is {error:.1e} away from the default's"
        return None


def prepared(watch: Stopwatch, call: Callable[[], tuple]) -> Callable[[], object]:
    """Return what is timed of a warm call: on CUDA a graph of it, without the host's share: it is common to all."""
    return watch.prepare(call, watch.modes[-1])[0]


def held(bench: Bench) -> AbstractContextManager[Pinning]:
    """Hold the threads that are timed on cores of their own. A GPU's time is its own: there the host's stay free."""
    if bench.device == "cpu":
        return pinned(bench.threads)
    return contextlib.nullcontext(Pinning((), "timed by the clock of the device"))


def raced(bench: Bench, configs: list, default: object) -> list[Standing]:
    """Time configurations and the default in common rounds in a new process; the default first, then as given.

    A configuration that fails there is left out. Raises what the default raises.
    """
    silent = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is this process's to answer
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, silent) as pool:
        return pool.submit(_raced, bench, configs, default, FINAL).result()


def _raced(bench: Bench, configs: list, default: object, effort: Effort) -> list[Standing]:
    calls, watch = bench.calls(), stopwatch(bench.device)
    everybody = [default, *(config for config in configs if config != default)]
    runners = {}
    with torch.no_grad():
        for config in everybody:
            call = calls(config)
            with contextlib.nullcontext() if config == default else contextlib.suppress(Exception):
                call()
                runners[config] = partial(watch.milliseconds, prepared(watch, call), watch.modes[-1])
        before = load()
        with held(bench) as pinning:
            samples, raised = race(runners, effort, Box(math.inf))
    conditions = Conditions(pinning, before, load())
    if default in raised:
        raise raised[default]
    found = []
    for config in (x for x in runners if x not in raised):
        mine, theirs = samples[config], samples[default]
        different = config != default and told_apart(mine, theirs)
        found.append(Standing(config, Spread.of(list(mine.values())), ratio(mine, theirs), different, conditions))
    return found


def told_apart(mine: Samples, theirs: Samples) -> bool:
    """Tell whether two are different: by the test, and by three quarters of the rounds.

    By the test alone a block length won one race by 1.21 (0.97 to 1.31) that was 0.99 in the next.
    """
    differences = [math.log(mine[turn] / theirs[turn]) for turn in mine.keys() & theirs.keys()]
    return signed_rank(differences) <= LEVEL and ratio(mine, theirs).leaves_out(1)


def ranked(standings: list[Standing]) -> list[Standing]:
    """Order the standings: the one to choose first, those that tie with it behind it, then the rest by time.

    What cannot be told from the default, or gains less than a tie, counts as the default's equal: it stays. Among those
    within a tie of the quickest the first given wins, so that files change for a reason only.
    """
    default, *others = standings
    better = [x for x in others if x.different and x.over_default.median < 1 - TIE]
    if not better:
        return [default, *sorted(others, key=lambda x: x.over_default.median)]
    least = min(x.over_default.median for x in better)
    tied = [x for x in better if x.over_default.median <= least * (1 + TIE)]
    rest = sorted((x for x in standings if x not in tied), key=lambda x: x.over_default.median)
    return [*tied, *rest]
