"""One case: everybody runs, is compared and timed in common rounds, and what raises is a result."""

import itertools
from dataclasses import replace

import pytest
import torch

from autotune import store
from autotune.cases import CASES
from autotune.contest import Entrant, Stage, contest, relative_error
from autotune.outcomes import BoxOver, DeviceLost
from autotune.timing import GRAPH, LAUNCHED, Box, Effort
from impls import find
from impls.peers.fla import FLA

SMALL = replace(next(case for case in CASES if case.name == "small-bounded"), T=4)
CEILINGS = {"copy": {"bytes_per_second": 1e9}, "matmul": {"float32": {"flops_per_second": 1e12}}}


class Watch:
    """A stopwatch that reads times from the calls: a function's `ms` in each mode."""

    modes = (LAUNCHED, GRAPH)
    effort = Effort(least=3, most=3, seconds=1e9)
    warm_calls = 1

    def __init__(self):
        self.lost = False

    def settle(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def prepare(self, call, mode):
        if mode == GRAPH and getattr(call.func, "unfit", False):
            raise RuntimeError("operation not permitted when stream is capturing")
        return call, call() if mode == GRAPH else None

    def milliseconds(self, call, mode):
        return call.func.ms if mode == LAUNCHED else call.func.ms / 2


def function(ms=1.0, offset=0.0, error=None, unfit=False, counts=None):
    """Make an implementation that adds to the right answer, or raises."""

    def run(**arguments):
        if counts is not None:
            next(counts)
        if error is not None:
            raise error
        o, state = find("chunk_torch").call(**arguments)
        return o + offset * o, state

    run.ms, run.unfit = ms, unfit
    return run


def entrant(name: str, run, ours: bool = False, refused=None) -> Entrant:
    row = replace(find("chunk_torch") if ours else FLA, name=name, load=lambda: run)
    if ours:
        object.__setattr__(row, "call", run)
    return Entrant(row, ours, refused)


def held(*entrants: Entrant, watch: Watch | None = None, box: Box | None = None, begun: list | None = None) -> dict:
    """Hold the contest; returns its record, which follows the schema."""
    begun = [] if begun is None else begun
    stage = Stage("cpu", "float32", watch or Watch(), CEILINGS, box or Box(1e9), begun.append)
    record = contest(SMALL, list(entrants), stage)
    schema = {**store.DEFINITIONS["$defs"]["case"], "$defs": store.DEFINITIONS["$defs"]}
    store.Draft202012Validator(schema).validate(record)
    return record


def of(record: dict, name: str) -> dict:
    return next(entry for entry in record["implementations"] if entry["name"] == name)


def test_times_ratios_and_floor():
    record = held(entrant("ours", function(ms=2.0), ours=True), entrant("peer", function(ms=6.0)))
    assert of(record, "ours")["ms"][LAUNCHED]["median"] == 2.0 and of(record, "peer")["ms"][GRAPH]["median"] == 3.0
    assert of(record, "peer")["over_floor"][LAUNCHED] == 6.0 / record["floor"]["ms"]
    found = [(x["ours"], x["other"], x["mode"], x["other_over_ours"]["median"]) for x in record["ratios"]]
    assert found == [("ours", "peer", GRAPH, 3.0), ("ours", "peer", LAUNCHED, 3.0)]


def test_ours_are_compared_with_each_other_both_ways():
    record = held(entrant("a", function(ms=1.0), ours=True), entrant("b", function(ms=4.0), ours=True))
    found = {(x["ours"], x["other"]): x["other_over_ours"]["median"] for x in record["ratios"]}
    assert found == {("a", "b"): 4.0, ("b", "a"): 0.25}


def test_a_fast_wrong_answer_is_visible():
    record = held(entrant("ours", function(), ours=True), entrant("peer", function(ms=0.1, offset=0.5)))
    assert of(record, "ours")["errors"][GRAPH] == {"o": 0.0, "final_state": 0.0}
    assert of(record, "peer")["errors"][LAUNCHED]["o"] == pytest.approx(0.5)
    assert of(record, "peer")["errors"][GRAPH]["o"] == pytest.approx(0.5)


def test_nan_is_told_as_a_string():
    record = held(entrant("ours", function(), ours=True), entrant("peer", function(offset=float("nan"))))
    assert of(record, "peer")["errors"][LAUNCHED]["o"] == "nan"


@pytest.mark.parametrize(
    ("error", "ours", "status"),
    [
        (ValueError("bounded gate only"), False, "unsupported"),
        (NotImplementedError("no varlen"), False, "unsupported"),
        (RuntimeError("no kernel image"), False, "failed"),
        (ImportError("libcudart"), False, "failed"),
        (ValueError("K must be"), True, "failed"),
        (torch.OutOfMemoryError("out of memory"), True, "failed"),
    ],
)
def test_what_raises_is_recorded_with_its_message_and_the_others_go_on(error, ours, status):
    record = held(entrant("good", function(), ours=True), entrant("bad", function(error=error), ours=ours))
    bad = of(record, "bad")
    assert (bad["status"], bad["message"]) == (status, f"{type(error).__name__}: {error}")
    assert bad["ms"] == {} and of(record, "good")["ms"].keys() == {LAUNCHED, GRAPH}
    assert record["ratios"] == []


def test_what_cannot_be_captured_is_still_timed_launched():
    record = held(entrant("ours", function(), ours=True), entrant("peer", function(unfit=True)))
    peer = of(record, "peer")
    assert peer["status"] == "measured" and peer["ms"].keys() == {LAUNCHED}
    assert "capturing" in peer["failures"][GRAPH]
    assert [x["mode"] for x in record["ratios"]] == [LAUNCHED]


def test_what_is_not_verified_does_not_run():
    counts = itertools.count()
    refused = entrant("ours", function(counts=counts), ours=True, refused=("not verified", "python -m verify failed"))
    record = held(refused, entrant("peer", function()))
    assert next(counts) == 0
    assert (of(record, "ours")["status"], of(record, "ours")["ms"]) == ("not verified", {})
    assert of(record, "peer")["ms"] and of(record, "peer")["errors"] == {}  # nothing right to compare with


def test_the_first_call_and_the_warm_ones_are_outside_the_timing():
    counts = itertools.count()
    record = held(entrant("ours", function(counts=counts), ours=True))
    assert next(counts) == 1 + Watch.warm_calls + 1  # the last one is the graph's
    assert of(record, "ours")["first_call_s"] >= 0


def test_a_race_in_which_a_mode_raises_drops_the_entrant():
    class Watch_(Watch):
        def milliseconds(self, call, mode):
            if call.func.ms == 7:
                raise RuntimeError("launch failed")
            return super().milliseconds(call, mode)

    record = held(entrant("ours", function(), ours=True), entrant("peer", function(ms=7)), watch=Watch_())
    assert of(record, "peer")["status"] == "failed" and "timed: RuntimeError" in of(record, "peer")["message"]
    assert of(record, "ours")["ms"].keys() == {LAUNCHED, GRAPH}


def test_a_lost_device_ends_the_case_and_names_who_lost_it():
    watch = Watch()

    def fatal(**arguments):
        watch.lost = True
        raise RuntimeError("illegal memory access")

    with pytest.raises(DeviceLost, match="the device was lost: RuntimeError: illegal") as caught:
        held(entrant("ours", function(), ours=True), entrant("peer", fatal), watch=watch)
    assert caught.value.implementation == "peer"


def test_everybody_is_named_before_the_first_call_and_nobody_during_the_race():
    begun = []
    held(entrant("ours", function(), ours=True), entrant("peer", function()), begun=begun)
    assert begun == ["ours", "peer", None]


def test_a_box_that_is_over_starts_nobody():
    counts = itertools.count()
    with pytest.raises(BoxOver):
        held(entrant("ours", function(counts=counts), ours=True), box=Box(0))
    assert next(counts) == 0


@pytest.mark.parametrize(
    ("x", "y", "error"), [([3.0, 4.0], [3.0, 0.0], 4 / 3), ([0.0], [0.0], 0.0), ([1.0], [0.0], float("inf"))]
)
def test_relative_error(x, y, error):
    assert relative_error(torch.tensor(x), torch.tensor(y)) == pytest.approx(error)
