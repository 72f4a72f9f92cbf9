"""Inputs know their sizes, refuse what does not fit and say what they expected; the domain is checked by name."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from kda_spec import Inputs, Sizes, check_domain

B, T, H, HV, K, V = 2, 3, 2, 4, 5, 6
GOOD = {
    "q": np.ones((B, T, H, K)),
    "k": np.full((B, T, H, K), 0.1),
    "v": np.ones((B, T, HV, V)),
    "g": -np.ones((B, T, HV, K)),
    "beta": np.ones((B, T, HV)),
}
PACKED = {name: x[:1] for name, x in GOOD.items()}


def test_sizes_and_defaults_follow_from_the_shapes():
    inputs = Inputs(**GOOD)
    assert inputs.sizes == Sizes(B, T, H, HV, K, V, N=B)
    assert inputs.resolved_scale == K**-0.5 and Inputs(**GOOD, scale=2).resolved_scale == 2.0
    assert list(inputs.sequences()) == [(0, slice(0, T), 0), (1, slice(0, T), 1)]


def test_packed_sequences_are_slices_of_one_row_empty_ones_included():
    inputs = Inputs(**PACKED, cu_seqlens=(0, 2, 2, 3))
    assert inputs.sizes.N == 3
    assert list(inputs.sequences()) == [(0, slice(0, 2), 0), (0, slice(2, 2), 1), (0, slice(2, 3), 2)]


def test_arrays_become_float64_without_changing_a_value():
    inputs = Inputs(**{name: x.astype(np.float32) for name, x in GOOD.items()})
    assert all(getattr(inputs, name).dtype == np.float64 for name in GOOD)
    assert np.array_equal(inputs.k, GOOD["k"].astype(np.float32))


def test_inputs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inputs(**GOOD).q = None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": np.ones((B, T, K))}, r"q must have 4 axes, got shape \(2, 3, 5\)"),
        ({"q": np.ones((B, T, 0, K))}, r"q must have B, H, K of at least 1"),
        ({"k": np.ones((B, T, H, 4))}, r"k must have shape \(2, 3, 2, 5\), got \(2, 3, 2, 4\)"),
        ({"v": np.ones((B, T, 3, V))}, r"v must have V .* and HV a multiple of H = 2, got shape \(2, 3, 3, 6\)"),
        ({"v": np.ones((B, 4, HV, V))}, r"v must have shape \(2, 3, 4, 6\), got \(2, 4, 4, 6\)"),
        ({"g": np.ones((B, T, H, K))}, r"g must have shape \(2, 3, 4, 5\), got \(2, 3, 2, 5\)"),
        ({"beta": np.ones((B, T, H))}, r"beta must have shape \(2, 3, 4\), got \(2, 3, 2\)"),
        ({"beta": np.ones((B, T, HV)) * 1j}, r"beta must be an array of real numbers, got dtype complex128"),
        ({"q": None}, r"q must be an array of real numbers, got dtype object"),
        ({"initial_state": np.ones((1, HV, K, V))}, r"state must have shape \(2, 4, 5, 6\), got \(1, 4, 5, 6\)"),
        ({"cu_seqlens": (0, 3)}, r"cu_seqlens needs B = 1 \(sequences packed along T\), got B = 2"),
    ],
)
def test_a_wrong_shape_is_named_with_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        Inputs(**(GOOD | change))


@pytest.mark.parametrize("cu_seqlens", [(), (0,), (1, 3), (0, 2), (0, 4), (0, 2, 1, 3)])
def test_offsets_must_rise_from_zero_to_T(cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T = 3"):
        Inputs(**PACKED, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("cu_seqlens", [(0.0, 3.0), 3])
def test_offsets_must_be_integers(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must be a sequence of integers"):
        Inputs(**PACKED, cu_seqlens=cu_seqlens)


def test_offsets_may_come_as_an_integer_array():
    assert Inputs(**PACKED, cu_seqlens=np.array([0, 1, 3])).cu_seqlens == (0, 1, 3)


def test_every_family_lies_in_the_domain(cases: SimpleNamespace, family):
    assert check_domain(cases.draw(family, B=2, T=40, K=8)) is None


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("q", np.inf, r"q must be finite, got inf at \(0, 1, 0, 0\)"),
        ("k", np.nan, r"k must be finite, got nan"),
        ("v", -np.inf, r"v must be finite, got -inf"),
        ("g", 0.5, r"g must lie in \[-inf, 0\], got 0.5"),
        ("g", np.nan, r"g must lie in \[-inf, 0\], got nan"),
        ("beta", -0.1, r"beta must be at least 0 and finite, got -0.1"),
        ("beta", np.nan, r"beta must be at least 0 and finite, got nan"),
        ("beta", 100.0, r"beta \* \|\|k\|\|\^2 must be at most 2, got 5.0"),
    ],
)
def test_a_value_outside_the_domain_is_named(name, value, message):
    changed = GOOD[name].copy()
    changed[(0, 1) + (0,) * (changed.ndim - 2)] = value
    with pytest.raises(ValueError, match=message):
        check_domain(Inputs(**(GOOD | {name: changed})))


@pytest.mark.parametrize("change", [{"scale": np.inf}, {"initial_state": np.full((B, HV, K, V), np.nan)}])
def test_scale_and_state_must_be_finite(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be finite"):
        check_domain(Inputs(**GOOD, **change))


def test_a_gate_of_minus_infinity_is_in_the_domain():
    assert check_domain(Inputs(**(GOOD | {"g": np.full((B, T, HV, K), -np.inf)}))) is None
