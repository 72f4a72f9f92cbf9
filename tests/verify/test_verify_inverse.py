"""The inverse that a kernel keeps is bounded; deep profiles steer towards what is worst."""

from dataclasses import replace

import pytest
import torch

from verify.inverses import CHUNK, tree_inverse
from verify.mutants import CLEAN, find, target_of
from verify.plan import PROFILES
from verify.properties.definition import inverse_norm
from verify.recipes import Recipe, aimed, recipes
from verify.resolve import resolve
from verify.runner import check
from verify.trial import Trial

COLLINEAR = Recipe(seed=1, T=33, K=4, V=2, keys="repeated", gates="zero", betas="one")


def worst(target, recipe: Recipe) -> float:
    trial = Trial(target, recipe)
    return max(m.ratio for m in check(inverse_norm, trial)) if inverse_norm.applies(trial) else 0.0


@pytest.mark.parametrize("gates", ["zero", "strong", "resets_inf"])
@pytest.mark.parametrize("betas", ["one", "tiny", "zero", "above_one", "largest"])
def test_our_inverses_keep_the_bound(betas, gates):
    recipe = replace(COLLINEAR, betas=betas, gates=gates, keys="near_collinear")
    assert worst(resolve("chunk_torch", "cpu"), recipe) <= 1 and worst(target_of(CLEAN), recipe) <= 1


def test_a_chunk_that_needs_no_padding_is_judged_too():
    recipe = Recipe(T=CHUNK, G=2, keys="repeated", gates="mild")  # of one channel: its rows are no contiguous copy
    assert worst(resolve("chunk_torch", "cpu"), recipe) <= 1


@pytest.mark.parametrize("name", ["float16_neumann_inverse", "first_order_inverse"])
def test_an_inverse_that_explodes_does_not(name):
    assert worst(target_of(find(name)), COLLINEAR) > 1


def test_who_keeps_no_inverse_is_not_asked():
    assert not inverse_norm.applies(Trial(resolve("recurrent_torch", "cpu"), COLLINEAR))


def test_the_inverse_of_the_tree_inverts_the_triangle():
    k, beta = torch.randn(1, CHUNK, 1, 5, dtype=torch.float64), torch.rand(1, CHUNK, 1, dtype=torch.float64)
    X = tree_inverse(k, torch.zeros_like(k), beta)[0, 0, 0]
    L = torch.tril(k[0, :, 0] @ k[0, :, 0].T, -1)
    torch.testing.assert_close((torch.diag(1 / beta[0, :, 0]) + L) @ X, torch.eye(CHUNK, dtype=torch.float64))


def test_recipes_are_steered_towards_what_is_worst():
    met = []

    def long(recipe: Recipe) -> float:
        met.append(recipe.plant + recipe.seed / 2**16)
        return met[-1]

    aimed(recipes(("float32",), tokens=9, work=1000), 3, 200, long)
    assert len(met) >= 150 and sum(met[-50:]) > sum(met[:50])


def test_the_deep_profile_judges_aimed_recipes_behind_the_drawn(judged, monkeypatch):
    assert PROFILES["deep"].aimed
    monkeypatch.setitem(PROFILES, "smoke", replace(PROFILES["smoke"], aimed=6))
    found = judged("recurrent_torch", ("reference_forward",), examples=3)
    numbers = [x["number"] for x in found if x["kind"] == "case"]
    assert numbers == list(range(9))
