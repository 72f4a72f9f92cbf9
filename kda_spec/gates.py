"""Turn raw activations into g, beta and normalised q and k, and their gradients back, in float64 for any finite input.

    softplus gate      g = -exp(A_log) * softplus(x + dt_bias)                  the gate of Kimi Linear (section 4)
    lower-bound gate   g = lower_bound * sigmoid(exp(A_log) * (x + dt_bias))    a gate in (lower_bound, 0)
    beta               sigmoid(x), or 2 * sigmoid(x) where negative eigenvalues of the transition are allowed
    l2norm             x / sqrt(sum x^2 + 1e-6)                                 along the last axis

x + dt_bias is rounded once, like any float64 sum. Infinite x is legal where its limit is: gates and beta, not l2norm.
"""

from __future__ import annotations

import numpy as np

L2NORM_EPS = 1e-6
# Below this softplus(x) and sigmoid(x) equal exp(x) to a relative 2e-16, so exp(A_log) can join the exponent.
EXPONENTIAL_TAIL = -36.0
# exp(A_log / 2) stays finite and positive inside; outside, exp(A_log) takes every product that is not 0 to 0 or to inf.
A_LOG_LIMIT = 1400.0


def softplus_gate(x, A_log, dt_bias=None) -> np.ndarray:
    """Return g = -exp(A_log) * softplus(x + dt_bias), [..., HV, K], natural log, in [-inf, 0] (section 4).

    x [..., HV, K], A_log [HV], dt_bias [HV * K] or [HV, K] or None. Raises ValueError for shapes that do not fit.
    """
    x, A_log = _biased(x, dt_bias), _per_head(A_log, x)
    return -_times_exp(np.logaddexp(0.0, x), A_log, x)


def softplus_gate_backward(dg, x, A_log, dt_bias=None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (dx, dA_log, ddt_bias) of `softplus_gate`, ddt_bias None for no dt_bias.

    dx = -dg * exp(A_log) * sigmoid(x + dt_bias), dA_log = sum dg * g, ddt_bias = sum dx. A zero dg gives zero, also
    where the gate is -inf.
    """
    dg, biased = _same_shape("dg", dg, x), _biased(x, dt_bias)
    g = softplus_gate(x, A_log, dt_bias)
    dx = -_product(dg, _times_exp(_sigmoid(biased), _per_head(A_log, biased), biased))
    return dx, _sum_to_heads(_product(dg, g)), _sum_to_bias(dx, dt_bias)


def lower_bound_gate(x, lower_bound: float, A_log=None, dt_bias=None) -> np.ndarray:
    """Return g = lower_bound * sigmoid(exp(A_log) * (x + dt_bias)), [..., HV, K], natural log, in [lower_bound, 0].

    x [..., HV, K], lower_bound < 0 and finite, A_log [HV] or None for no factor, dt_bias [HV * K] or [HV, K] or None.
    Raises ValueError for a lower bound or shapes that do not fit.
    """
    return _checked_bound(lower_bound) * _sigmoid(_sharpened(_biased(x, dt_bias), A_log))


def lower_bound_gate_backward(dg, x, lower_bound: float, A_log=None, dt_bias=None):
    """Return (dx, dA_log, ddt_bias) of `lower_bound_gate`, each in the shape of its input, None for what was None.

    With u = exp(A_log) * (x + dt_bias): du = dg * lower_bound * sigmoid(u) * sigmoid(-u), dx = exp(A_log) * du,
    dA_log = sum du * u, ddt_bias = sum dx.
    """
    u = _sharpened(_biased(x, dt_bias), A_log)
    du = _same_shape("dg", dg, x) * _checked_bound(lower_bound) * _sigmoid(u) * _sigmoid(-u)
    dA_log = None if A_log is None else _sum_to_heads(_product(du, u))
    dx = _sharpened(du, A_log)
    return dx, dA_log, _sum_to_bias(dx, dt_bias)


def beta_sigmoid(x, allow_neg_eigval: bool = False) -> np.ndarray:
    """Return beta = sigmoid(x), or 2 * sigmoid(x) where negative eigenvalues are allowed; any shape."""
    return (2.0 if allow_neg_eigval else 1.0) * _sigmoid(np.asarray(x, np.float64))


def beta_sigmoid_backward(dbeta, x, allow_neg_eigval: bool = False) -> np.ndarray:
    """Return dx = dbeta * (1 or 2) * sigmoid(x) * sigmoid(-x) of `beta_sigmoid`."""
    x = np.asarray(x, np.float64)
    return (2.0 if allow_neg_eigval else 1.0) * _same_shape("dbeta", dbeta, x) * _sigmoid(x) * _sigmoid(-x)


def l2norm(x) -> np.ndarray:
    """Return x / sqrt(sum x^2 + 1e-6) along the last axis; finite x of any magnitude."""
    x, scale, norm = _scaled_norm(x)
    return x / scale / norm


def l2norm_backward(dy, x) -> np.ndarray:
    """Return dx = (dy - y (y . dy)) / sqrt(sum x^2 + 1e-6) of `l2norm`, with y its result."""
    x, scale, norm = _scaled_norm(x)
    y, dy = x / scale / norm, _same_shape("dy", dy, x)
    return (dy - y * np.sum(y * dy, axis=-1, keepdims=True)) / norm / scale


def _scaled_norm(x) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, a power of two of at least 1 near max |x|, and sqrt(sum x^2 + 1e-6) over it: squares never overflow."""
    x = np.asarray(x, np.float64)
    largest = np.max(np.abs(x), axis=-1, keepdims=True, initial=1.0)
    scale = np.ldexp(1.0, np.frexp(largest)[1] - 1)
    return x, scale, np.sqrt(np.sum((x / scale) ** 2, axis=-1, keepdims=True) + L2NORM_EPS / scale / scale)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, z) / (1.0 + z)


def _times_exp(value: np.ndarray, A_log: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return exp(A_log) * value, where value ~ exp(x) in its tail: neither factor may over- or underflow alone."""
    half = np.exp(np.clip(A_log, -A_LOG_LIMIT, A_LOG_LIMIT) / 2)
    with np.errstate(over="ignore"):
        tail = np.exp(A_log + np.minimum(x, EXPONENTIAL_TAIL))
        return np.where(x < EXPONENTIAL_TAIL, tail, half * value * half)


def _sharpened(x: np.ndarray, A_log) -> np.ndarray:
    """Return exp(A_log) * x, [..., HV, K]; x itself where A_log is None."""
    if A_log is None:
        return x
    half = np.exp(np.clip(_per_head(A_log, x), -A_LOG_LIMIT, A_LOG_LIMIT) / 2)
    with np.errstate(over="ignore"):
        return half * x * half


def _product(gradient: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return gradient * factor, and 0 where the gradient is 0 even if the factor is infinite."""
    return gradient * np.where(gradient == 0, 0.0, factor)


def _biased(x, dt_bias) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim < 2:
        raise ValueError(f"x must have shape [..., HV, K], got {x.shape}")
    if dt_bias is None:
        return x
    HV, K = x.shape[-2:]
    dt_bias = np.asarray(dt_bias, np.float64)
    if dt_bias.shape not in ((HV * K,), (HV, K)):
        raise ValueError(f"dt_bias must have shape {(HV * K,)} or {(HV, K)}, got {dt_bias.shape}")
    return x + dt_bias.reshape(HV, K)


def _per_head(A_log, x: np.ndarray) -> np.ndarray:
    A_log = np.asarray(A_log, np.float64)
    if A_log.shape != (x.shape[-2],):
        raise ValueError(f"A_log must have shape {(x.shape[-2],)}, got {A_log.shape}")
    return A_log[:, None]


def _same_shape(name: str, gradient, x) -> np.ndarray:
    gradient, shape = np.asarray(gradient, np.float64), np.shape(x)
    if gradient.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {gradient.shape}")
    return gradient


def _checked_bound(lower_bound: float) -> float:
    if not -np.inf < lower_bound < 0:
        raise ValueError(f"lower_bound must be negative and finite, got {lower_bound}")
    return float(lower_bound)


def _sum_to_heads(x: np.ndarray) -> np.ndarray:
    HV, K = x.shape[-2:]
    return x.reshape(-1, HV, K).sum(axis=(0, 2))


def _sum_to_bias(dx: np.ndarray, dt_bias) -> np.ndarray | None:
    if dt_bias is None:
        return None
    return dx.reshape(-1, *dx.shape[-2:]).sum(axis=0).reshape(np.shape(dt_bias))
