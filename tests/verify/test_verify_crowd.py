"""A crowd has the programs that are asked for, and shows what no small case does; equal calls are really repeated."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from impls.plan import Launch
from verify.plan import PROFILES, Demands
from verify.properties.crowd import DRAWN, _mixed, crowd, many_sequences
from verify.properties.isolation import determinism
from verify.recipes import Recipe
from verify.resolve import resolve
from verify.targets import STANDARD, Target, default_contract
from verify.trial import Trial

OURS = resolve("recurrent_torch", "cpu")
RECIPE = Recipe(T=4, H=2, K=4, V=3, gates="mild", betas="largest", state=True)
PACKED = Recipe(T=7, lengths=(4, 3), H=2, K=4, V=3, gates="mild")
MANY = Demands(programs=64)


def target(change, backward: bool = False) -> Target:
    """Return our implementation with its results changed by change(o, S)."""
    named = STANDARD - {"chunk_size"}

    def function(*arguments, **keywords):
        return change(*OURS.function(*arguments, **keywords))

    return Target("changed", function, default_contract, ("float32",), named=named, backward=backward)


def worst(prop, trial: Trial) -> float:
    return max(measure.ratio for measure in prop.check(trial))


@pytest.mark.parametrize("recipe", [RECIPE, PACKED], ids=["equal lengths", "packed"])
def test_a_crowd_mixes_few_sequences_into_many(recipe):
    case = _mixed(Trial(OURS, recipe, MANY), 50)
    lengths = [span.stop - span.start for _, span in case.sequences()]
    assert case.N == 50 > DRAWN and max(lengths) == lengths[-1] == MANY.tokens
    assert (min(lengths) == 0) == bool(recipe.lengths)
    digests = [case.sequence(n).digest() for n in range(50) if lengths[n]]
    assert len(set(digests)) > 0.9 * len(digests) > 30
    square = np.repeat(np.sum(case.k**2, axis=-1), recipe.G, axis=2)
    assert np.all(case.beta * square <= 2)


@pytest.mark.parametrize("recipe", [RECIPE, PACKED], ids=["equal lengths", "packed"])
def test_ours_passes_in_a_crowd_with_its_gradients(recipe):
    trial = Trial(OURS, recipe, MANY)
    assert worst(crowd, trial) < 1
    assert trial.met == {"pairs": 64} and any("dk" in m.what for m in crowd.check(trial))


def spoiled(n: int, factor: float):
    def change(o, S):
        return torch.cat([o[:n], factor * o[n : n + 1], o[n + 1 :]]), S

    return change


@pytest.mark.parametrize("n, factor", [(0, 1.01), (31, 1.01), (20, float("nan"))], ids=["first", "last", "NaN"])
def test_one_wrong_sequence_of_many_is_found(n, factor):
    assert worst(crowd, Trial(target(spoiled(n, factor)), RECIPE, MANY)) > 1


NARROW = replace(RECIPE, H=1, G=1, K=4, V=4)


@pytest.mark.parametrize("n, factor, found", [(40, 1.0, False), (40, 1.01, True)])
def test_a_call_of_many_sequences_looks_at_the_last(n, factor, found):
    trial = Trial(target(spoiled(n, factor)), NARROW, Demands(sequences=n + 1))
    assert many_sequences.applies(trial) and (worst(many_sequences, trial) > 1) == found


@pytest.mark.parametrize("profile, asked", [("deep", True), ("ci", False), ("quick", False)])
def test_only_deep_asks_for_more_sequences_than_a_side_of_a_grid_holds(profile, asked):
    demands = PROFILES[profile].demands
    assert many_sequences.applies(Trial(OURS, NARROW, demands)) == asked
    assert demands.sequences > 65_535 or not asked


def test_a_workspace_that_is_not_written_is_found_in_a_crowd():
    empty = torch.empty
    read = target(lambda o, S: (o + 0 * empty(10**7 + o.numel())[: o.numel()].view(o.shape), S))
    assert worst(crowd, Trial(read, RECIPE, MANY)) > 1


def test_programs_are_counted_as_kernels_are_launched():
    recipe, demands = Recipe(T=2, K=4, V=4, gates="mild"), Demands(programs=5, tokens=2)
    trial = Trial(resolve("chunk_triton", "interpret"), recipe, demands)
    assert worst(crowd, trial) < 1
    assert trial.met == {"pairs": 5, "programs": 5}


class _Kernel:
    arg_names = ()

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.parametrize("share, pairs, programs", [(2, 128, 64), (64, 1024 // 2, 8)], ids=["enough", "given up"])
def test_a_crowd_grows_until_each_launch_has_enough_programs(share, pairs, programs):
    def launching(o, S):
        Launch("walk", _Kernel(), S.shape[0] * S.shape[1] // share, (), {}, {}).run({}, {})
        return o, S

    trial = Trial(target(launching), RECIPE, MANY)
    list(crowd.check(trial))
    assert trial.met == {"pairs": pairs, "programs": programs}


def one_in(count: int) -> Target:
    calls = itertools.count(1)
    return target(lambda o, S: (o + (1e-7 if next(calls) % count == 0 else 0.0), S))


@pytest.mark.parametrize("profile, found", [("tune", True), ("quick", False)])
def test_a_call_in_ten_that_differs_needs_ten_calls(profile, found):
    trial = Trial(one_in(10), RECIPE, PROFILES[profile].demands)
    assert (worst(determinism, trial) > 1) == found
    assert trial.runs == trial.met["repeats"] == PROFILES[profile].demands.repeats


def test_a_crowd_is_repeated_on_a_device(monkeypatch):
    monkeypatch.setattr(Target, "place", "cpu:0")  # another name than that of the workers' only thread
    trial = Trial(one_in(10), RECIPE, Demands(repeats=10, programs=64))
    assert worst(crowd, trial) > 1 and trial.runs == trial.met["repeats"] == 10


def test_a_run_says_what_its_demands_came_to(judged):
    found = judged("recurrent_torch", ("determinism", "crowd", "reference_backward"), profile="tune", examples=3)
    counts = found[-1]["counts"]
    assert counts["repeats"] == 10 and counts["pairs"] >= 1024 and counts["backward"] >= 2
    assert sum("crowd" in x["results"] for x in found if x["kind"] == "case") == 1


def test_a_replay_repeats_as_often_as_the_profile_that_repeats_most(judged):
    found = judged("recurrent_torch", ("determinism",), recipe=RECIPE.to_json())
    assert found[-1]["counts"]["runs"] == 10
