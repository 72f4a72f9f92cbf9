"""Rounding is torch's, bit for bit; draws are fixed forever, and what their names say."""

import numpy as np
import pytest
import torch

from verify.exact import LARGEST, SMALLEST_STEP, UNIT_ROUNDOFF, Dice, round_to, unit_rows

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, 65504.0, 65519.9, 65520.0, 3.3895e38, 3.4e38, 1e-45, 6e-8, 3e-8])


def float32_patterns() -> np.ndarray:
    """Random words, words just around every tie of bfloat16 and tf32, and every float16 tie's neighbourhood."""
    words = Dice(1, "patterns").raw((20_000,)).astype(np.uint32)
    ties = [(words & np.uint32(0xFFFF0000)) + np.uint32(0x8000 + d) for d in (-1, 0, 1)]
    ties += [(words & np.uint32(0xFFFFE000)) + np.uint32(0x1000 + d) for d in (-1, 0, 1)]
    subnormal = words & np.uint32(0x807FFFFF)
    x = np.concatenate([words, *ties, subnormal]).view(np.float32)
    return np.concatenate([x[np.isfinite(x)].astype(np.float64), SPECIAL, -SPECIAL])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_equals_torchs_cast_on_float32_patterns(dtype):
    x = float32_patterns()
    x = x[np.abs(x) < LARGEST["float32"]]
    expected = torch.from_numpy(x).float().to(getattr(torch, dtype)).double().numpy()
    assert np.array_equal(round_to(x, dtype), expected)


def test_rounding_float64_to_float16_happens_once():
    half = 1 + 2.0**-11
    x = np.array([half, half + 2.0**-40, half - 2.0**-40])  # a detour over float32 would see three ties
    assert np.array_equal(round_to(x, "float16"), [1.0, 1 + 2.0**-10, 1.0])


def test_rounding_float64_to_float16_is_nearest_on_many():
    x = Dice(2, "halves").normal((20_000,)) * 2.0 ** Dice(2, "e").integers(-26, 13, (20_000,))
    error = np.abs(round_to(x, "float16") - x)
    assert np.all(error <= np.maximum(UNIT_ROUNDOFF["float16"] * np.abs(x), SMALLEST_STEP["float16"] / 2))


def test_rounding_to_tf32_keeps_ten_bits_and_cuts_the_rest():
    x = float32_patterns()
    x = x[(np.abs(x) > 2.0**-126) & (np.abs(x) < 2.0**127)]
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 10)
    assert np.array_equal(round_to(x, "tf32"), np.trunc(x / step) * step)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "float32", "float64"])
def test_rounding_twice_changes_nothing_and_keeps_infinities(dtype):
    x = round_to(float32_patterns(), dtype)
    assert np.array_equal(round_to(x, dtype), x)
    assert np.array_equal(round_to(np.array([np.inf, -np.inf]), dtype), [np.inf, -np.inf])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_unit_roundoff_is_half_the_spacing_above_one(dtype):
    u = UNIT_ROUNDOFF[dtype]
    assert round_to(np.array([1 + 2 * u]), dtype) == 1 + 2 * u
    assert round_to(np.array([1 + u]), dtype) == 1.0


def test_named_draws_do_not_depend_on_what_was_drawn_before():
    alone = Dice(7, "b", 3).normal((5,))
    Dice(7, "a").raw((100,))
    assert np.array_equal(Dice(7, "b", 3).normal((5,)), alone)


@pytest.mark.parametrize("other", [(8, "b", 3), (7, "c", 3), (7, "b", 4), (7, "b")])
def test_other_names_give_other_draws(other):
    assert not np.array_equal(Dice(*other).raw((4,)), Dice(7, "b", 3).raw((4,)))


def test_the_stream_is_pinned():
    """A change here changes every recipe's numbers and every recorded hash: raise the recipe version with it."""
    assert Dice(0, "pin").raw((3,)).tolist() == PINNED_RAW
    assert Dice(0, "pin").integers(-4, 5, (8,)).tolist() == PINNED_INTEGERS
    assert Dice(0, "pin").bell((3,)).tolist() == PINNED_BELL
    assert Dice(0, "pin").permutation(6).tolist() == PINNED_ORDER


PINNED_RAW = [3015293564964846089, 18357929596583230780, 13208064217250703900]
PINNED_INTEGERS = [-2, -3, 2, 1, -4, -4, 0, -4]
PINNED_BELL = [-52236, 23684, 105583]
PINNED_ORDER = [5, 0, 4, 2, 3, 1]


def test_normal_draws_have_the_moments_of_a_normal_distribution():
    x = Dice(3, "moments").normal((200_000,))
    assert abs(np.mean(x)) < 0.01
    assert abs(np.std(x) - 1) < 0.01
    assert abs(np.mean(x**4) / np.var(x) ** 2 - 2.9) < 0.1  # a sum of 12 uniforms: 3 - 6/5/12
    assert np.max(np.abs(x)) < 6
    assert np.array_equal(x * 2**16, np.rint(x * 2**16))


def test_uniform_draws_fill_the_unit_interval_in_steps():
    u = Dice(4, "u").uniform((100_000,))
    assert 0 <= np.min(u) < 1e-3
    assert 1 - 1e-3 < np.max(u) < 1
    assert np.array_equal(u * 2**24, np.rint(u * 2**24))


@pytest.mark.parametrize("K", [1, 2, 33, 64])
def test_unit_rows_have_norm_one_within_three_roundings(K):
    rows = unit_rows(Dice(5, "rows", K).bell((500, K)))
    assert np.max(np.abs(np.linalg.norm(rows, axis=-1) - 1)) < 3 * 2.0**-52


def test_a_row_of_zeros_stays_zero():
    assert np.array_equal(unit_rows(np.zeros((2, 3), int)), np.zeros((2, 3)))
