"""The timing logic against a clock that is moved by hand: rounds, shares, boxes, ratios within rounds."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from autotune import timing
from autotune.outcomes import BoxOver
from autotune.timing import GRAPH, LAUNCHED, Box, CudaStopwatch, Effort, Spread, race, ratio


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self):
        self.seconds = 0.0
        self.calls = []

    def now(self) -> float:
        return self.seconds

    def runner(self, name: str, seconds: float):
        def run() -> float:
            self.seconds += seconds
            self.calls.append(name)
            return seconds * 1e3

        return run


def run(clock: Clock, costs: dict[str, float], effort: Effort, box_seconds: float = 1e9):
    runners = {name: clock.runner(name, seconds) for name, seconds in costs.items()}
    return race(runners, effort, Box(box_seconds, clock.now))


def test_every_round_times_everybody_once_in_an_order_of_its_own():
    clock = Clock()
    samples, raised = run(clock, dict.fromkeys("abcd", 1.0), Effort(least=6, most=6, seconds=100))
    rounds = [clock.calls[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3
    assert all(list(found) == list(range(6)) for found in samples.values()) and raised == {}


def test_orders_are_the_same_in_every_run():
    first, second = Clock(), Clock()
    for clock in (first, second):
        run(clock, dict.fromkeys("abcd", 1.0), Effort(4, 4, 100))
    assert first.calls == second.calls


@pytest.mark.parametrize(
    ("effort", "rounds"),
    [(Effort(3, 50, 10.0), 10), (Effort(3, 5, 10.0), 5), (Effort(3, 50, 0.5), 3)],
    ids=["seconds", "most", "least"],
)
def test_rounds_end_with_the_seconds_between_least_and_most(effort, rounds):
    samples, _ = run(Clock(), {"a": 1.0}, effort)
    assert len(samples["a"]) == rounds


def test_a_slow_entrant_sits_out_and_costs_the_others_nothing():
    samples, _ = run(Clock(), {"fast": 0.01, "slow": 5.0}, Effort(least=3, most=40, seconds=1.0))
    assert len(samples["slow"]) == 3
    assert len(samples["fast"]) == 40


def test_the_box_ends_a_race_behind_the_least_rounds_and_keeps_it():
    samples, _ = run(Clock(), {"a": 1.0, "b": 1.0}, Effort(2, 50, 100.0), box_seconds=7.0)
    assert len(samples["a"]) == len(samples["b"]) == 4


def test_a_box_that_ends_before_the_least_rounds_is_said():
    with pytest.raises(BoxOver):
        run(Clock(), {"a": 1.0, "b": 1.0}, Effort(5, 50, 100.0), box_seconds=7.0)


def test_a_runner_that_raises_is_dropped_and_the_others_go_on():
    clock, error = Clock(), RuntimeError("illegal address")

    def broken() -> float:
        raise error

    runners = {"bad": broken, "good": clock.runner("good", 1.0)}
    samples, raised = race(runners, Effort(4, 4, 100), Box(1e9, clock.now))
    assert raised == {"bad": error}
    assert len(samples["good"]) == 4 and samples["bad"] == {}


def test_nobody_to_time_is_no_race():
    assert race({}, Effort(3, 3, 1), Box(1.0, Clock().now)) == ({}, {})


def test_a_ratio_is_taken_within_rounds_and_survives_a_drift():
    drift = {turn: 2.0**turn for turn in range(6)}
    over, under = ({turn: factor * x for turn, x in drift.items()} for factor in (3.0, 1.5))
    assert ratio(over, under) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 6)


def test_a_ratio_counts_common_rounds_only():
    assert ratio({0: 4.0, 2: 9.0}, {0: 2.0, 1: 5.0}).count == 1
    assert ratio({0: 4.0}, {1: 2.0}) is None


@pytest.mark.parametrize(
    ("values", "median", "low", "high"),
    [([7.0], 7, 7, 7), ([1.0, 3.0], 2, 1.5, 2.5), ([5.0, 1.0, 4.0, 2.0, 3.0], 3, 2, 4)],
)
def test_quartiles(values, median, low, high):
    assert Spread.of(values) == Spread(median, low, high, min(values), max(values), len(values))


def test_a_box_counts_down_to_nothing():
    clock = Clock()
    box = Box(10, clock.now)
    clock.seconds = 4
    assert box.left == 6
    box.check()
    clock.seconds = 11
    assert box.left == 0
    with pytest.raises(BoxOver):
        box.check()


def test_the_largest_cache_is_read_from_the_system(tmp_path):
    for index, size in enumerate(("32K", "1024K", "33792K", "")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert timing.cpu_cache_bytes(tmp_path) == 33792 << 10
    assert timing.cpu_cache_bytes(tmp_path / "nowhere") == 0


def test_the_flush_on_a_cpu_is_twice_its_largest_cache():
    assert timing.CpuStopwatch().flushed_bytes >= 2 * timing.cpu_cache_bytes()


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for torch.cuda: events, streams and graphs write down what happens to them, in order."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait for event")

        def elapsed_time(self, end):
            return 1.25

    class Graph:
        def replay(self):
            log.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda given: contextlib.nullcontext(),
        "graph": lambda given: contextlib.nullcontext(log.append("capture")),
        "synchronize": lambda: log.append("synchronize"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    watch = object.__new__(CudaStopwatch)
    watch._flush = SimpleNamespace(sum=lambda: log.append("flush"))
    return watch, log


@pytest.mark.parametrize(
    ("mode", "order"),
    [
        (LAUNCHED, ["flush", "synchronize", "event", "call", "event", "wait for event"]),
        (GRAPH, ["flush", "event", "call", "event", "wait for event"]),
    ],
)
def test_a_launch_starts_on_an_idle_device_and_a_replay_behind_the_flush(cuda, mode, order):
    watch, log = cuda
    assert watch.milliseconds(lambda: log.append("call"), mode) == 1.25
    assert log == order


def test_a_graph_is_captured_warm_and_its_outputs_are_poisoned_before_the_replay(cuda):
    watch, log = cuda
    output = torch.ones(3)

    def call():
        log.append("call")
        return (output,)

    replay, outputs = watch.prepare(call, GRAPH)
    assert log == ["call", "synchronize", "capture", "call", "replay", "synchronize"]
    assert outputs == (output,) and all(map(math.isnan, output.tolist()))
    replay()
    assert log[-1] == "replay"


def test_a_launch_needs_no_preparation(cuda):
    watch, log = cuda
    assert watch.prepare(log.clear, LAUNCHED) == (log.clear, None) and log == []
