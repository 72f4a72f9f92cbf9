"""Sequences among others: the state machine of an engine, and memory that is used again."""

import numpy as np
import pytest
import torch

from verify.mutants import CLEAN, find, target_of
from verify.poison import GUARD, guarded_allocations, trespassed
from verify.properties.isolation import same_addresses
from verify.properties.serving import Engine, serving
from verify.recipes import Recipe
from verify.runner import check
from verify.trial import Trial

RECIPE = Recipe(seed=3, T=12, K=4, V=3, gates="mild", betas="uniform")


def ratio(name: str, prop, recipe: Recipe = RECIPE) -> float:
    mutant = CLEAN if name == "clean" else find(name)
    return max(measure.ratio for measure in check(prop, Trial(target_of(mutant), recipe)))


def test_a_right_implementation_serves():
    assert ratio("clean", serving) <= 1


@pytest.mark.parametrize("name", ["state_of_the_last_call", "gates_of_batch_zero", "state_in_bfloat16"])
def test_what_mistakes_one_sequence_or_call_for_another_does_not_serve(name):
    assert ratio(name, serving) > 1


def stories(monkeypatch, recipe: Recipe) -> list[list[str]]:
    """Return what happened in every run of the machine."""
    seen, ended = [], Engine.teardown
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "teardown", lambda self: (seen.append(self.story), ended(self)))
        list(serving.check(Trial(target_of(CLEAN), recipe)))
    return seen


def test_equal_recipes_have_equal_stories_and_longer_ones_more_steps(monkeypatch):
    first, second = stories(monkeypatch, RECIPE), stories(monkeypatch, RECIPE)
    assert first == second and any(first)
    kinds = {step.split()[0] for seed in range(12) for story in stories(monkeypatch, Recipe(seed=seed, T=12))
             for step in story}  # fmt: skip
    assert kinds == {"prefill", "decode", "draft", "fork", "free"}
    assert max(map(len, stories(monkeypatch, Recipe(T=1)))) <= 5


def test_a_target_that_raises_has_its_story_told():
    def raises(*tensors, initial_state=None, **keywords):
        if initial_state is not None and initial_state.any():
            raise ValueError("no states here")
        return CLEAN.function(*tensors, initial_state=initial_state, **keywords)

    target = target_of(type(CLEAN)("raises", "", raises))
    worst = max(check(serving, Trial(target, RECIPE)), key=lambda m: m.ratio)
    assert worst.ratio == np.inf and "raised ValueError: no states here" in worst.what and "prefill" in worst.what


def test_what_is_kept_of_a_tensor_is_seen_when_it_holds_other_numbers():
    assert ratio("clean", same_addresses) == 0
    assert ratio("gates_kept_by_identity", same_addresses) > 1


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_write_beside_a_buffer_is_counted(at, dtype):
    with guarded_allocations() as blocks:
        x = torch.empty(3, 4, dtype=dtype)
        y = torch.ones(2, 5).to(dtype).new_empty(7, 2)
        z = torch.empty_like(y.t())
    assert (x.shape, y.shape, z.shape, z.stride()) == ((3, 4), (7, 2), (2, 7), (1, 2))
    for inside in (x, y, z):
        inside.fill_(1)
    assert len(blocks) == 3 and trespassed(blocks) == 0
    blocks[1][GUARD - 1 if at == 0 else -GUARD] = 0
    assert trespassed(blocks) == dtype.itemsize
