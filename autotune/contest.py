"""One case: warm everybody up, compare the outputs, race in common rounds; the result is a record of JSON values."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from autotune.cases import Case, draw
from autotune.floors import floor
from autotune.outcomes import DeviceLost
from autotune.timing import LAUNCHED, Box, Samples, Spread, Stopwatch, race, ratio
from impls.table import Impl
from verify.records import number

MEASURED, UNSUPPORTED, FAILED, UNVERIFIED = "measured", "unsupported", "failed", "not verified"
REFUSALS = (ValueError, NotImplementedError)
"""What a peer raises for a case that it does not cover; anything else, and any exception of ours, is a failure."""


@dataclass(frozen=True)
class Entrant:
    """One implementation in a case; `refused` is the status and the reason of one that does not run, else None."""

    impl: Impl
    ours: bool
    refused: tuple[str, str] | None = None

    def function(self) -> Callable:
        """Import it and return what is timed: with our own checks of arguments for ours, without them for a peer."""
        return self.impl.call if self.ours else self.impl.load()


@dataclass
class Report:
    """What is known of one entrant in one case."""

    entrant: Entrant
    results: tuple[str, ...]
    """What it returns, by name."""
    status: str = MEASURED
    message: str | None = None
    first_call_s: float | None = None
    errors: dict[str, dict] = field(default_factory=dict)
    """Relative error of outputs against the first of ours, by mode."""
    failures: dict[str, str] = field(default_factory=dict)
    """What a mode raised, by mode."""
    samples: dict[str, Samples] = field(default_factory=dict)

    def drop(self, status: str, message: str) -> None:
        """Take it out of the race."""
        self.status, self.message, self.samples = status, message, {}

    def to_json(self, floor_ms: float) -> dict:
        """Return a dictionary of JSON values."""
        times = {mode: Spread.of(list(samples.values())) for mode, samples in self.samples.items()}
        return {
            "name": self.entrant.impl.name,
            "ours": self.entrant.ours,
            "status": self.status,
            "message": self.message,
            "first_call_s": self.first_call_s,
            "errors": self.errors,
            "failures": self.failures,
            "ms": {mode: spread.to_json() for mode, spread in times.items()},
            "over_floor": {mode: spread.median / floor_ms for mode, spread in times.items()},
        }


@dataclass(frozen=True)
class Stage:
    """Where a case runs, and whom to tell."""

    device: str
    dtype: str
    watch: Stopwatch
    ceilings: dict
    box: Box
    begins: Callable[[str | None], None]
    """Called with the name of the entrant whose first call comes next, which may take the process down with it, and
    with None when all have survived."""


def contest(case: Case, entrants: list[Entrant], stage: Stage) -> dict:
    """Time everybody on one case; returns its record. Raises BoxOver if there is no time, DeviceLost if the device is.

    An entrant that raises is recorded with its message, and the others go on.
    """
    begun = stage.box.now()
    reports = [Report(entrant, case.results) for entrant in entrants]
    arguments = draw(case, stage.device, stage.dtype)
    runners: dict[tuple[int, str], Callable[[], float]] = {}
    reference = None
    with torch.no_grad():
        for i, report in enumerate(reports):
            stage.box.check()
            outputs, prepared = _warm(report, arguments, stage, reference)
            runners |= {(i, mode): runner for mode, runner in prepared.items()}
            reference = outputs if reference is None and report.entrant.ours else reference
            del outputs
        stage.begins(None)
        samples, raised = race(runners, stage.watch.effort, stage.box)
    for (i, mode), found in samples.items():
        reports[i].samples[mode] = found
    for (i, mode), error in raised.items():
        _survived(reports[i], stage.watch, error)
        reports[i].drop(FAILED, f"{mode}, timed: {_told(error)}")
    return _record(case, reports, stage, stage.box.now() - begun)


def _warm(report: Report, arguments: dict, stage: Stage, reference: tuple | None) -> tuple[tuple | None, dict]:
    """Run an entrant until only timing is left to do; returns its outputs and its runners by mode, for the race."""
    if report.entrant.refused:
        report.drop(*report.entrant.refused)
        return None, {}
    stage.begins(report.entrant.impl.name)
    begun = time.perf_counter()
    try:
        call = partial(report.entrant.function(), **arguments)
        outputs = call()
        stage.watch.settle()
        report.first_call_s = time.perf_counter() - begun
        for _ in range(stage.watch.warm_calls):
            call()
        stage.watch.settle()
    except Exception as error:
        _survived(report, stage.watch, error)
        refused = isinstance(error, REFUSALS) and not report.entrant.ours
        report.drop(UNSUPPORTED if refused else FAILED, _told(error))
        return None, {}
    reference = outputs if reference is None and report.entrant.ours else reference
    _compare(report, LAUNCHED, outputs, reference)
    return outputs, _prepare(report, call, stage, reference)


def _prepare(report: Report, call: Callable, stage: Stage, reference: tuple | None) -> dict[str, Callable[[], float]]:
    runners = {}
    for mode in stage.watch.modes:
        try:
            timed, outputs = stage.watch.prepare(call, mode)
        except Exception as error:
            _survived(report, stage.watch, error)
            report.failures[mode] = _told(error)
            continue
        if outputs is not None:
            _compare(report, mode, outputs, reference)
        runners[mode] = partial(stage.watch.milliseconds, timed, mode)
    return runners


def _survived(report: Report, watch: Stopwatch, error: Exception) -> None:
    """Raise DeviceLost if, behind an exception, the device does not answer any more."""
    try:
        watch.settle()
    except Exception as lost:
        raise DeviceLost(report.entrant.impl.name, f"the device was lost: {_told(error)}") from lost


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def _compare(report: Report, mode: str, outputs: tuple, reference: tuple | None) -> None:
    if reference is not None:
        found = (relative_error(x, y) for x, y in zip(outputs, reference, strict=True))
        report.errors[mode] = dict(zip(report.results, map(number, found), strict=True))


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return ||x - y|| / ||y|| in float32; NaN stays, 0 / 0 is 0."""
    x, y = x.float(), y.float()
    difference, size = (x - y).norm().item(), y.norm().item()
    return 0.0 if difference == 0 == size else difference / size if size else float("inf")


def _record(case: Case, reports: list[Report], stage: Stage, seconds: float) -> dict:
    least = floor(case, stage.dtype, stage.ceilings)
    ours = [report for report in reports if report.entrant.ours]
    return {
        "name": case.name,
        "sizes": {name: getattr(case.sizes, name) for name in ("B", "T", "H", "HV", "K", "V", "N")},
        "lengths": None if case.lengths is None else list(case.lengths),
        "lower_bound": case.lower_bound,
        "dtype": stage.dtype,
        "seconds": seconds,
        "floor": least,
        "implementations": [report.to_json(least["ms"]) for report in reports],
        "ratios": [entry for our in ours for other in reports for entry in _ratios(our, other)],
    }


def _ratios(our: Report, other: Report) -> list[dict]:
    """Say how many times as long as one of ours another takes, round by round."""
    if our is other:
        return []
    names = {"ours": our.entrant.impl.name, "other": other.entrant.impl.name}
    modes = our.samples.keys() & other.samples.keys()
    spreads = {mode: ratio(other.samples[mode], our.samples[mode]) for mode in sorted(modes)}
    return [{**names, "mode": mode, "other_over_ours": x.to_json()} for mode, x in spreads.items() if x]
