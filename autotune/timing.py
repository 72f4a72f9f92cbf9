"""Measure calls: cold cache, one clock per kind of device, rounds in which everybody runs once, quartiles.

What is compared runs in the same rounds, in an order drawn anew for each round, and ratios are taken within a round:
clocks, temperature and neighbours drift over seconds and would otherwise decide between versions.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autotune.outcomes import BoxOver

LAUNCHED, GRAPH = "launched", "graph"
"""Modes: launched from Python on an idle device, and replayed from a CUDA graph without the host's share."""


@dataclass(frozen=True)
class Effort:
    """How often a case is timed: rounds at least and at most, and the seconds after which the least is enough."""

    least: int
    most: int
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a sample, and its size."""

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Summarise at least one value; the quartiles of a single one are that value."""
        ordered = sorted(values)
        low, median, high = (
            statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered[:1] * 3
        )
        return Spread(median, low, high, ordered[0], ordered[-1], len(ordered))

    def over(self, x: float) -> "Spread":
        """Return the spread of the sample divided by a number."""
        return Spread(self.median / x, self.low / x, self.high / x, self.least / x, self.most / x, self.count)

    def leaves_out(self, x: float) -> bool:
        """Tell whether a number is outside the quartiles."""
        return not self.low <= x <= self.high

    def to_json(self) -> dict[str, float | int]:
        """Return a dictionary of JSON values."""
        return asdict(self)


class Box:
    """A budget of seconds, counted from its making."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self.now = now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._end - self.now())

    def check(self) -> None:
        """Raise BoxOver once nothing is left."""
        if self.left == 0:
            raise BoxOver


Samples = dict[int, float]
"""Milliseconds by round: an entrant that is slow sits rounds out."""


def race(
    runners: Mapping[Hashable, Callable[[], float]], effort: Effort, box: Box
) -> tuple[dict[Hashable, Samples], dict[Hashable, Exception]]:
    """Time every runner once a round; returns samples in milliseconds, and what those that raised were dropped for.

    After the least number of rounds a runner that has used its share of the seconds sits out, so that a slow one costs
    the others no samples. Raises BoxOver where the box ends before the least number of rounds.
    """
    samples: dict[Hashable, Samples] = {key: {} for key in runners}
    spent = dict.fromkeys(runners, 0.0)
    raised: dict[Hashable, Exception] = {}
    for turn in range(effort.most):
        share = effort.seconds / len(runners) if runners else 0
        order = [key for key in runners if key not in raised and (turn < effort.least or spent[key] < share)]
        random.Random(turn).shuffle(order)
        if not order or (turn >= effort.least and box.left == 0):
            break
        for key in order:
            if turn < effort.least:
                box.check()
            begun = box.now()
            try:
                samples[key][turn] = runners[key]()
            except Exception as error:
                raised[key] = error
            spent[key] += box.now() - begun
    return samples, raised


def ratio(over: Samples, under: Samples) -> Spread | None:
    """Return the spread of over / under within the rounds that both ran in; None where there is none."""
    quotients = [over[turn] / under[turn] for turn in sorted(over.keys() & under.keys())]
    return Spread.of(quotients) if quotients else None


class CpuStopwatch:
    """Times calls on the CPU with the host's clock."""

    modes = (LAUNCHED,)
    effort = Effort(least=5, most=30, seconds=10.0)
    warm_calls = 0
    """Calls behind the first one before anything counts; a CPU needs none, and each may take seconds."""

    def __init__(self):
        self.flushed_bytes = max(2 * cpu_cache_bytes(), 64 << 20)
        self._flush = torch.ones(self.flushed_bytes // 4)

    def settle(self) -> None:
        """Wait for the device: a call on the CPU has ended when it returns."""

    def prepare(self, call: Callable[[], tuple], mode: str) -> tuple[Callable[[], object], tuple | None]:
        """Return what is to be timed in this mode; no outputs of its own."""
        return call, None

    def milliseconds(self, call: Callable[[], object], mode: str) -> float:
        """Time one call with a cold cache. Reading flushes it: written lines would still be on their way out."""
        self._flush.sum()
        begun = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begun) / 1e6


class CudaStopwatch:
    """Times calls on one CUDA device with its events."""

    modes = (LAUNCHED, GRAPH)
    effort = Effort(least=10, most=100, seconds=3.0)
    warm_calls = 2

    def __init__(self, device: str):
        torch.cuda.set_device(device)
        L2 = torch.cuda.get_device_properties(device).L2_cache_size
        # 256 MiB take longer to read (60 us at 4.3 TB/s) than the host needs to enqueue an event and a graph.
        self.flushed_bytes = max(2 * L2, 256 << 20)
        self._flush = torch.ones(self.flushed_bytes // 4, device=device)

    def settle(self) -> None:
        """Wait for the device; raises what an earlier call has done to it."""
        torch.cuda.synchronize()

    def prepare(self, call: Callable[[], tuple], mode: str) -> tuple[Callable[[], object], tuple | None]:
        """Return what is to be timed: the call, or the replay of a graph of it with the outputs that it writes.

        The outputs of a graph are poisoned and computed by one replay, so that a graph that lost a kernel shows.
        """
        if mode == LAUNCHED:
            return call, None
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        for output in outputs:
            output.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, outputs

    def milliseconds(self, call: Callable[[], object], mode: str) -> float:
        """Time one call with a cold L2 cache, in the device's own time.

        LAUNCHED starts on an idle device, so the host's work until the last launch counts: what a caller waits for.
        GRAPH is enqueued while the flush still runs, so that only the device's time counts.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        if mode == LAUNCHED:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


Stopwatch = CpuStopwatch | CudaStopwatch


def stopwatch(device: str) -> Stopwatch:
    """Return the stopwatch of cpu or cuda:N."""
    return CpuStopwatch() if device == "cpu" else CudaStopwatch(device)


def cpu_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache of the first core, as Linux tells it; 0 where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = (path.read_text().strip() for path in folder.glob("index*/size"))
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units), default=0)
