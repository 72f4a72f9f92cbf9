"""Activations keep their digits everywhere: against 50-digit arithmetic, at extremes, at infinity."""

import mpmath
import numpy as np
import pytest

from kda_spec import (
    beta_sigmoid,
    beta_sigmoid_backward,
    l2norm,
    l2norm_backward,
    lower_bound_gate,
    lower_bound_gate_backward,
    softplus_gate,
    softplus_gate_backward,
)

# Both sides of the tail at -36, of overflow (709.8) and underflow (-745.1) of exp, and the ends of the range.
X = [-2000.0, -740.0, -700.0, -40.0, -36.5, -36.0, -35.9, -25.0, -1.0, -1e-9, 0.0, 1e-300, 1.0, 40.0, 700.0, 1e5, 1e300]
A_LOG = [-300.0, -5.0, 0.0, 1.5, 5.0, 300.0, 720.0, 1990.0]
LARGEST, SMALLEST = 1.7e308, 2.3e-308


def to_float(x) -> float:
    """Round a 50-digit number like float64 does, overflow to infinity included."""
    return float(x) if abs(x) < LARGEST else np.copysign(np.inf, float(mpmath.sign(x)))


def fifty_digits(function) -> np.ndarray:
    with mpmath.workdps(50):
        return np.array([[to_float(function(mpmath.mpf(x), mpmath.mpf(a))) for x in X] for a in A_LOG])


def agrees(actual: np.ndarray, expected: np.ndarray, tolerance=1e-13) -> bool:
    """Compare element by element; below the smallest normal number digits are lost by anybody."""
    finite = np.isfinite(expected)
    allowed = np.maximum(tolerance * np.abs(expected[finite]), SMALLEST)
    close = np.abs(actual[finite] - expected[finite]) <= allowed
    return bool(np.all(close) and np.array_equal(actual[~finite], expected[~finite]))


def on_grid(gate, *rest) -> np.ndarray:
    """Return gate(x) for every A_log (row) and x (column)."""
    return gate(np.broadcast_to(X, (len(A_LOG), len(X))), *rest)


def mp_sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def test_softplus_gate_has_thirteen_digits():
    expected = fifty_digits(lambda x, a: -mpmath.exp(a) * mpmath.log1p(mpmath.exp(x)))
    assert agrees(on_grid(softplus_gate, A_LOG), expected)


def test_softplus_gate_gradient_has_thirteen_digits():
    dx, _, _ = softplus_gate_backward(np.ones((len(A_LOG), len(X))), on_grid(np.array), A_LOG)
    assert agrees(dx, fifty_digits(lambda x, a: -mpmath.exp(a) * mp_sigmoid(x)))


def test_lower_bound_gate_has_thirteen_digits_of_its_argument():
    expected = fifty_digits(lambda x, a: -5 * mp_sigmoid(mpmath.exp(a) * x))
    # sigmoid turns the last bit of an argument u < 0 into a relative error u * 2^-53; |u| is at most 745 here.
    assert agrees(on_grid(lower_bound_gate, -5.0, A_LOG), expected, tolerance=1e-12)


@pytest.mark.parametrize("factor", [1, 2])
def test_beta_has_thirteen_digits(factor):
    expected = fifty_digits(lambda x, a: factor * mp_sigmoid(x))
    assert agrees(on_grid(beta_sigmoid, factor == 2), expected)


@pytest.mark.parametrize("magnitude", [0.0, 5e-324, 1e-200, 1e-8, 1e-3, 1.0, 1e8, 1e160, 1e308])
def test_l2norm_has_thirteen_digits_at_any_magnitude(magnitude):
    x = magnitude * np.array([[1.0, -0.5, 0.25], [0.3, 0.0, 0.0]])
    with mpmath.workdps(50):
        roots = [mpmath.sqrt(sum(mpmath.mpf(c) ** 2 for c in row) + mpmath.mpf(1e-6)) for row in x]
        expected = np.array([[float(mpmath.mpf(c) / root) for c in row] for row, root in zip(x, roots, strict=True)])
    assert agrees(l2norm(x), expected)
    assert np.all(np.isfinite(l2norm_backward(np.ones_like(x), x)))


def test_l2norm_takes_the_last_axis_and_zero_rows():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    assert np.allclose(np.linalg.norm(l2norm(x), axis=-1), 1, atol=1e-5)
    assert np.array_equal(l2norm(np.zeros((2, 4))), np.zeros((2, 4)))


def test_infinite_activations_reach_the_limits_of_the_gates():
    x, A_log = np.array([[-np.inf, np.inf]]), [0.5]
    assert np.array_equal(softplus_gate(x, A_log), [[0.0, -np.inf]])
    assert np.array_equal(lower_bound_gate(x, -5.0, A_log), [[0.0, -5.0]])
    assert np.array_equal(beta_sigmoid(x[0], True), [0.0, 2.0])
    assert np.array_equal(beta_sigmoid_backward(np.ones(2), x[0]), [0.0, 0.0])


@pytest.mark.parametrize("A_log", [-1e308, -1500.0, 0.0, 710.0, 1500.0, 1e308])
@pytest.mark.parametrize("x", [-1e308, -800.0, 0.0, 800.0, 1e308])
def test_no_finite_activation_makes_a_nan(x, A_log):
    x, A_log, dg = np.full((1, 1), x), np.full(1, A_log), np.zeros((1, 1))
    with np.errstate(all="raise", under="ignore"):
        assert softplus_gate(x, A_log) <= 0
        assert -5 <= lower_bound_gate(x, -5.0, A_log) <= 0
        assert not any(np.any(np.isnan(d)) for d in lower_bound_gate_backward(dg + 1, x, -5.0, A_log)[:2])
        assert all(np.all(d == 0) for d in softplus_gate_backward(dg, x, A_log)[:2])


def test_a_gate_that_overflowed_passes_no_nan_to_its_parameters():
    x, dg = np.array([[1e300, 1.0]]), np.array([[0.0, 1.0]])
    dx, dA_log, ddt_bias = softplus_gate_backward(dg, x, [700.0], [0.0, 0.0])
    assert np.isneginf(softplus_gate(x, [700.0])[0, 0])
    assert dx[0, 0] == 0 and np.all(np.isfinite(dA_log)) and ddt_bias[0] == 0


def test_bias_comes_flat_or_per_head():
    x = np.random.default_rng(1).standard_normal((2, 3, 4))
    bias = np.random.default_rng(2).standard_normal(12)
    for gate in (lambda b: softplus_gate(x, np.zeros(3), b), lambda b: lower_bound_gate(x, -5.0, None, b)):
        assert np.array_equal(gate(bias), gate(bias.reshape(3, 4)))
        assert not np.array_equal(gate(bias), gate(None))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: softplus_gate(x, np.zeros(4)), r"A_log must have shape \(3,\), got \(4,\)"),
        (lambda x: softplus_gate(x, np.zeros(3), np.zeros(11)), r"dt_bias must have shape \(12,\) or \(3, 4\), got"),
        (lambda x: softplus_gate(x[0, 0], np.zeros(3)), r"x must have shape \[..., HV, K\], got \(4,\)"),
        (lambda x: softplus_gate_backward(x[0], x, np.zeros(3)), r"dg must have shape \(2, 3, 4\), got \(3, 4\)"),
        (lambda x: lower_bound_gate(x, 0.0), "lower_bound must be negative and finite, got 0.0"),
        (lambda x: lower_bound_gate(x, -np.inf), "lower_bound must be negative and finite, got -inf"),
        (lambda x: beta_sigmoid_backward(x[0], x), r"dbeta must have shape \(2, 3, 4\), got \(3, 4\)"),
        (lambda x: l2norm_backward(x[0], x), r"dy must have shape \(2, 3, 4\), got \(3, 4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 3, 4)))
