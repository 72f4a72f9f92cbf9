"""The approximate softplus keeps 16-bit accuracy over its three pieces, with what NVIDIA's instructions may lose."""

from types import SimpleNamespace

import numpy as np
import pytest

from impls import activations_triton

# PTX ISA: ex2.approx.ftz.f32 errs by 2^-22.5 relatively, lg2.approx.ftz.f32 by 2^-22 on either side of 1; both flush.
EX2, LG2 = 2.0**-22, 2.0**-22
BOUND = 2.0**-10
"""Of the relative error in base 2: 9.0e-4 measured, at x = -12 where lg2 takes over; half a bfloat16 ulp is 2e-3."""


def flushed(x):
    return np.where(np.abs(x) < 2.0**-126, 0.0, x).astype(np.float32)


@pytest.fixture
def approximate(monkeypatch):
    """Return softplus_base2 with APPROXIMATE on NumPy's float32, its instructions off by a given share of their error.

    The interpreter has no such instructions: the source itself runs, thresholds and all, on another `tl`.
    """

    def softplus(x, share):
        def lg2(*source_and_constraints, dtype, **options):
            return flushed(np.log2(source_and_constraints[2][0].astype(np.float64)) + share * LG2)

        numpy_tl = SimpleNamespace(inline_asm_elementwise=lg2, where=np.where, float32=np.float32)
        monkeypatch.setattr(activations_triton, "tl", numpy_tl)
        monkeypatch.setattr(activations_triton, "LOG2E", np.float32(np.log2(np.e)))
        monkeypatch.setattr(
            activations_triton,
            "exp2",
            lambda x, approximate: flushed(np.exp2(x.astype(np.float64)) * (1 + share * EX2)),
        )
        with np.errstate(over="ignore"):
            return activations_triton.softplus_base2.fn(x, True)

    return softplus


@pytest.mark.parametrize("share", [-1.0, 0.0, 1.0])
def test_the_approximate_softplus_is_exact_enough_for_operands_of_16_bits(approximate, share):
    y = np.linspace(-100, 100, 400_001)
    x = (y * np.log2(np.e)).astype(np.float32)
    exact = np.maximum(x, 0) / np.log2(np.e) + np.log1p(np.exp(-np.abs(x.astype(np.float64)) / np.log2(np.e)))
    found = approximate(x, share).astype(np.float64) / np.log2(np.e)
    smallest = 2.0**-126
    assert np.isfinite(found).all() and (found >= 0).all()
    error = np.abs(found - exact) / exact
    assert error[exact > 2 * smallest].max() <= BOUND
    assert np.abs(found - exact)[exact <= 2 * smallest].max() <= 2 * smallest
