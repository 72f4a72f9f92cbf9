"""Compute Kimi Delta Attention token by token: THE definition, that every other form in this project is compared with.

Three forms of one recurrence, from the general to the special, each float64 and vectorised over all leading axes:

    general DPLR      S_t = (Diag(exp g_t) - a_t b_t^T) S_{t-1} + k_t v_t^T                       section 6.2
    constrained DPLR  the same with a_t = beta_t k_t, b_t = k_t * exp g_t, v_t <- beta_t v_t      section 6.2
    KDA               S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T       equation 1
"""

from __future__ import annotations

import numpy as np

from kda_spec.types import Inputs, Outputs


def general_dplr(q, k, v, a, b, g, S0=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Run the diagonal-plus-low-rank recurrence (section 6.2).

        S_t = Diag(exp g_t) S_{t-1}       every channel forgets at its own rate
              - a_t (b_t^T S_{t-1})       what the old state holds at b_t is erased along a_t
              + k_t v_t^T                 the new pair is written
        o_t = scale * S_t^T q_t           and read

    q, k, a, b, g [..., T, K] (g natural log), v [..., T, V], S0 [..., K, V] or None for zeros, scale None for K**-0.5.
    Returns o [..., T, V] and the state after the last token [..., K, V], a copy of S0 when T = 0.
    Raises ValueError for shapes that do not fit.
    """
    rows = _rows(q=q, k=k, a=a, b=b, g=g)
    v, S, scale = _values_state_scale(v, S0, scale, rows["q"])
    o = np.empty_like(v)
    q, b, k, a = scale * rows["q"], rows["b"], _columns(rows["k"]), _columns(rows["a"])
    alpha = _columns(np.exp(rows["g"]))
    for t in range(len(v)):
        S = alpha[t] * S - a[t] * (b[t] @ S) + k[t] * v[t]
        o[t] = q[t] @ S
    return _tokens_last(o), S


def constrained_dplr(q, k, v, g, beta, S0=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Run KDA in its expanded form, as the member of general DPLR with a and b bound to k (section 6.2).

        S_t = (Diag(alpha_t) - (beta_t k_t) (k_t * alpha_t)^T) S_{t-1} + k_t (beta_t v_t)^T,   alpha_t = exp g_t

    Arguments, results and errors as in `kda`.
    """
    k, v, g = (np.asarray(x, np.float64) for x in (k, v, g))
    beta = _coefficients(beta, k)
    return general_dplr(q, k, beta * v, beta * k, k * np.exp(g), g, S0, scale)


def kda(q, k, v, g, beta, S0=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Run Kimi Delta Attention (equation 1).

        S~_t = Diag(exp g_t) S_{t-1}                        every channel forgets at its own rate
        S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T       what is held at k_t moves by beta_t towards v_t
        o_t  = scale * S_t^T q_t                            read

    q, k, g [..., T, K] (g natural log, <= 0), v [..., T, V], beta [..., T], S0 [..., K, V] or None for zeros,
    scale None for K**-0.5. Returns o [..., T, V] and the state after the last token [..., K, V], a copy of S0 when
    T = 0. Raises ValueError for shapes that do not fit.
    """
    beta = _coefficients(beta, np.asarray(k))
    rows = _rows(q=q, k=k, g=g, beta_k=beta * k)
    v, S, scale = _values_state_scale(v, S0, scale, rows["q"])
    o = np.empty_like(v)
    q, k, alpha, beta_k = scale * rows["q"], rows["k"], _columns(np.exp(rows["g"])), _columns(rows["beta_k"])
    for t in range(len(v)):
        S = alpha[t] * S
        S = S + beta_k[t] * (v[t] - k[t] @ S)
        o[t] = q[t] @ S
    return _tokens_last(o), S


def recurrent(inputs: Inputs) -> Outputs:
    """Run KDA on a whole call: o [B, T, HV, V] and final_state [N, HV, K, V].

    Value head h reads query/key head h // (HV // H). Packed sequences (cu_seqlens) are separate runs, each from its own
    initial state; an empty one passes its state through as a copy.
    """
    sizes = inputs.sizes
    o = np.empty((sizes.B, sizes.T, sizes.HV, sizes.V))
    final_state = np.empty((sizes.N, sizes.HV, sizes.K, sizes.V))
    for batch, tokens, states in inputs.runs():
        q, k, v, g, beta = inputs.heads_first(batch, tokens)
        S0 = None if inputs.initial_state is None else inputs.initial_state[states]
        part, final_state[states] = kda(q, k, v, g, beta, S0, inputs.resolved_scale)
        o[batch, tokens] = np.swapaxes(part, 1, 2)
    return Outputs(o, final_state)


def _coefficients(beta, k: np.ndarray) -> np.ndarray:
    beta = np.asarray(beta, np.float64)
    if beta.shape != k.shape[:-1]:
        raise ValueError(f"beta must have shape {k.shape[:-1]}, got {beta.shape}")
    return beta[..., None]


def _rows(**arrays) -> dict[str, np.ndarray]:
    """Return every [..., T, K] array as float64 row vectors [T, ..., 1, K]; all must have one shape."""
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    shape = arrays["q"].shape
    for name, x in arrays.items():
        if x.ndim < 2 or x.shape != shape:
            raise ValueError(f"{name} must have shape [..., T, K] = {shape}, got {x.shape}")
    return {name: _tokens_first(x) for name, x in arrays.items()}


def _values_state_scale(v, S0, scale, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return v as rows [T, ..., 1, V], a fresh state [..., K, V] and the scale, for q as rows [T, ..., 1, K]."""
    v = np.asarray(v, np.float64)
    T, *lead, _, K = q.shape
    if v.ndim < 2 or v.shape[:-1] != (*lead, T):
        raise ValueError(f"v must have shape [..., T, V] = {(*lead, T, 'V')}, got {v.shape}")
    shape = (*lead, K, v.shape[-1])
    S = np.zeros(shape) if S0 is None else np.array(S0, np.float64)
    if S.shape != shape:
        raise ValueError(f"S0 must have shape [..., K, V] = {shape}, got {S.shape}")
    return _tokens_first(v), S, K**-0.5 if scale is None else scale


def _tokens_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -2, 0))[..., None, :]


def _tokens_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x[..., 0, :], 0, -2)


def _columns(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)
