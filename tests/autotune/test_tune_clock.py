"""The clock: wrong and failing candidates are told apart from slow ones, and what ties does not change the choice."""

from dataclasses import replace

import pytest
import torch

from autotune import clock
from autotune.cases import Case
from autotune.clock import Bench, Clock, Standing, raced, ranked, told_apart
from autotune.outcomes import BoxOver
from autotune.search import FAILED, MEASURED, WRONG
from autotune.timing import Box, Effort, Spread
from impls import ChunkTorchConfig

BENCH = Bench("chunk_torch", Case("tiny", 1, 64, 2, 16, 16), "float32", "cpu", 1)
DEFAULT = ChunkTorchConfig()


@pytest.fixture
def timer():
    return Clock(BENCH, DEFAULT, Box(1e6))


def test_a_candidate_is_timed_beside_the_default(timer):
    found = timer.outcome(ChunkTorchConfig(chunk_size=16))
    assert found.status == MEASURED and found.ratio.count >= 3 and found.ms.median > 0 and found.seconds > 0


def test_a_candidate_that_raises_is_recorded(timer):
    found = timer.outcome(ChunkTorchConfig(chunk_size=17))
    assert found.status == FAILED and "chunk_size" in found.message


@pytest.mark.parametrize(
    ("change", "message"), [(lambda o, i: o * 1.001, "away"), (lambda o, i: o + i * 1e-7, "differs")]
)
def test_wrong_and_unrepeatable_results_are_not_timed(timer, change, message):
    right, turn = timer.calls, iter(range(100))

    def broken(config):
        def call():
            o, S = right(config)()
            return change(o, next(turn)), S

        return call

    timer.calls = broken
    found = timer.outcome(DEFAULT)
    assert found.status == WRONG and message in found.message and found.ratio is None


def test_a_hopeless_candidate_costs_three_rounds(timer, monkeypatch):
    monkeypatch.setattr(timer.watch, "milliseconds", lambda call, mode: 10.0 if call is not timer.default else 1.0)
    found = timer.outcome(DEFAULT)
    assert (found.ratio.median, found.ratio.count) == (10.0, 3)


def test_the_end_of_the_box_is_no_outcome():
    timer = Clock(BENCH, DEFAULT, Box(0))
    with pytest.raises(BoxOver):
        timer.outcome(DEFAULT)


def test_the_final_race_runs_in_another_process_with_the_default_first(monkeypatch):
    monkeypatch.setattr(clock, "FINAL", Effort(least=3, most=3, seconds=0.0))
    configs = [ChunkTorchConfig(chunk_size=32), DEFAULT]
    standings = raced(BENCH, configs, DEFAULT)
    assert [x.config for x in standings] == [DEFAULT, configs[0]]
    assert standings[0].over_default.median == 1.0 and not standings[0].different
    assert standings[1].ms.count >= clock.FINAL.least


def test_a_finalist_that_fails_in_the_race_is_left_out(monkeypatch):
    monkeypatch.setattr(clock, "FINAL", Effort(least=3, most=3, seconds=0.0))
    standings = raced(BENCH, [ChunkTorchConfig(chunk_size=17), ChunkTorchConfig(chunk_size=32)], DEFAULT)
    assert [x.config.chunk_size for x in standings] == [16, 32]


@pytest.mark.parametrize(
    ("ratios", "different"),
    [([0.8] * 9, True), ([1.2] * 9, True), ([0.8] * 4, False), ([0.7] * 9 + [1.03] * 4, False), ([1.0] * 9, False)],
    ids=["quicker", "slower", "too few rounds", "a quarter disagrees", "equal"],
)
def test_what_is_told_apart(ratios, different):
    theirs = dict.fromkeys(range(len(ratios)), 10.0)
    assert told_apart({turn: 10.0 * x for turn, x in enumerate(ratios)}, theirs) == different


def standing(heads: int, median: float, different: bool = True) -> Standing:
    spread = Spread(median, median, median, median, median, 9)
    return Standing(replace(DEFAULT, heads=heads), spread, spread, different)


@pytest.mark.parametrize(
    ("others", "first"),
    [
        ([standing(4, 0.8)], 4),
        ([standing(4, 0.8, different=False)], 16),
        ([standing(4, 0.995)], 16),
        ([standing(4, 0.8), standing(8, 0.5)], 8),
        ([standing(4, 0.504), standing(8, 0.5)], 4),
        ([standing(4, 1.5)], 16),
        ([], 16),
    ],
    ids=["quicker", "noise", "less than a tie", "quickest", "a tie goes to the first", "slower", "nobody else"],
)
def test_who_is_chosen(others, first):
    default = standing(16, 1.0, different=False)
    order = ranked([default, *others])
    assert order[0].config.heads == first and {x.config for x in order} == {x.config for x in (default, *others)}


def test_inputs_are_drawn_once_for_all_configurations():
    assert torch.equal(BENCH.calls()(DEFAULT)()[0], BENCH.calls()(DEFAULT)()[0])
