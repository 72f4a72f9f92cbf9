"""The clean control passes every property; every mutant differs from it in one part, and dies on the quick profile."""

import math
from functools import cache

import pytest
import torch

from verify.claims import Property
from verify.mutants import CLEAN, MUTANTS, Mutant, find, target_of
from verify.plan import PROFILES, Demands
from verify.properties import PROPERTIES
from verify.recipes import Recipe, drawn, recipes, words
from verify.trial import TargetRaised, Trial

QUICK = PROFILES["quick"]
NAMES = [mutant.name for mutant in MUTANTS]

UNSEEN_BY_THE_REFERENCE = {
    "gates_assumed_contiguous": {"layouts"},
    "nan_clamped_away": {"nan_shows"},
    "final_state_aliases_initial": {"purity"},
    "values_destroyed": {"purity"},
    "one_scale_for_the_batch": {"neighbours", "nan_stays", "value_independence", "causality"},
    "order_differs_by_call": {"determinism"},
    "one_call_in_ten": {"determinism"},
    "unwritten_part_times_zero": {"unwritten"},
    "gates_kept_by_identity": {"same_addresses"},
    "last_row_written_twice": {"purity"},
    "state_unasked": {"final_state_flag"},
    "last_of_a_thousand_programs": {"crowd"},
}
"""Bugs that agree with the definition on the base call: only these properties are there to see them."""


CLASSES = {
    "future leak through an anchor": "anchor_in_the_future",
    "exp before mask, NaN gradients": "exponential_before_mask",
    "overflow of one-sided rescaling": "one_sided_rescaling",
    "ragged tail": "tail_without_mask",
    "tail of one token": "last_row_zero",
    "head offset": "gates_of_head_zero",
    "stride-blindness": "gates_assumed_contiguous",
    "unmasked channel tail": "gates_past_the_row",
    "NaN hidden by a clamp": "nan_clamped_away",
    "state of an empty sequence": "empty_sequence_uninitialised",
    "state layout swapped": "state_read_transposed",
    "state in bfloat16": "state_in_bfloat16",
    "padded slots": "padding_writes_the_last_slot",
    "gate off by one": "gates_one_token_late",
    "gradient term dropped": "beta_gradient_of_solve_missing",
    "gradient of the final state": "final_state_gradient_dropped",
    "reverse sum as a difference": "gate_gradient_by_difference",
    "offsets of 32 bits": "offsets_in_few_bits",
    "aliasing": "final_state_aliases_initial",
    "nondeterminism": "order_differs_by_call",
    "buffer left unwritten": "unwritten_part_times_zero",
    "write past a buffer": "last_row_written_twice",
    "results kept from an earlier call": "gates_kept_by_identity",
    "chunk-size path": "chunk_of_32_broken",
    "split reduction": "query_gradient_of_first_tile",
    "batch dependence": "one_scale_for_the_batch",
}
"""Classes of bugs that escaped other people's tests, as far as a CPU can have them, and a mutant of each."""


@cache
def drawings(dtype: str, count: int) -> list[Recipe]:
    strategy = recipes((dtype,), tokens=QUICK.tokens, work=QUICK.work, chunks=(16, 32))
    return [drawn(strategy, number) for number in range(count)]


def fails(prop: Property, trial: Trial) -> bool:
    if not prop.applies(trial):
        return False
    try:
        return any(measure.ratio > 1 for measure in prop.check(trial))
    except TargetRaised:
        return True


def killers(mutant: Mutant, recipe: Recipe, names: set[str] | None = None) -> list[str]:
    trial = Trial(target_of(mutant), recipe, QUICK.demands if names else Demands())  # a crowd takes 0.2 s
    return [p.name for p in PROPERTIES if (names is None or p.name in names) and fails(p, trial)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_clean_control_passes_every_property(dtype):
    alarms = {words(recipe): found for recipe in drawings(dtype, 60) if (found := killers(CLEAN, recipe))}
    assert alarms == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_mutant_dies_on_the_quick_profile(name):
    expected = UNSEEN_BY_THE_REFERENCE.get(name)
    tried = [recipe for pair in zip(*(drawings(d, 24) for d in QUICK.dtypes), strict=True) for recipe in pair]
    assert any(killers(find(name), recipe, expected) for recipe in tried)


@pytest.mark.parametrize("name", UNSEEN_BY_THE_REFERENCE)
def test_some_bugs_agree_with_the_definition_and_need_a_property(name):
    reference = {"reference_forward", "reference_backward"}
    assert not any(killers(find(name), recipe, reference) for recipe in drawings("float32", 12))


def test_mutants_are_many_and_named_after_different_bugs():
    assert len(MUTANTS) >= 55
    assert set(CLASSES.values()) <= set(NAMES) and len(set(CLASSES.values())) == len(CLASSES)
    assert len(set(NAMES) | {CLEAN.name}) == len(MUTANTS) + 1
    assert len({mutant.imitates for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutant_replaces_exactly_one_part(mutant):
    kind = type(mutant.function)
    replaced = [name for name in vars(kind) if not name.startswith("__")]
    assert len(replaced) == 1
    assert kind.__bases__ == (type(CLEAN.function),)


def test_an_unknown_mutant_is_refused_with_the_known_names():
    assert find("clean") is CLEAN
    with pytest.raises(KeyError, match=r"unknown mutant 'chunk'; known: clean, .*state_not_decayed"):
        find("chunk")


def test_the_clean_control_computes_in_float32_at_least():
    q = torch.ones(1, 3, 1, 2, dtype=torch.bfloat16)
    o, S = CLEAN.function(q, q, q, -q, q[..., 0] / 4, output_final_state=True)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert CLEAN.function(*(x.double() for x in (q, q, q, -q, q[..., 0])))[0].dtype == torch.float64


def test_a_write_and_a_read_of_one_token_by_hand():
    k, v = torch.tensor([0.6, 0.8]).view(1, 1, 1, 2), torch.tensor([2.0, 3.0, 5.0]).view(1, 1, 1, 3)
    state = torch.zeros(1, 1, 2, 3)
    gates, beta = torch.full((1, 1, 1, 2), -math.inf), torch.full((1, 1, 1), 0.5)
    o, S = CLEAN.function(k, k, v, gates, beta, scale=2.0, initial_state=state + 7.0, output_final_state=True)
    torch.testing.assert_close(o.view(3), v.view(3))
    torch.testing.assert_close(S.view(2, 3), torch.outer(k.view(2), v.view(3)) / 2)
