"""Compute the gradients of KDA by its adjoint recurrence, written by hand, in float64.

Forward, one token (equation 1):   S~_t = Diag(alpha_t) S_{t-1},   e_t = v_t - S~_t^T k_t,
                                   S_t = S~_t + beta_t k_t e_t^T,  o_t = scale * S_t^T q_t,   alpha_t = exp g_t

Backward, with D_t the gradient that reaches S_t from o_t and from everything later:

    D_t      = R_t + scale * q_t do_t^T              R_T = dS_T
    de_t     = beta_t D_t^T k_t
    dq_t     = scale * S_t do_t
    dv_t     = de_t
    dbeta_t  = k_t^T D_t e_t
    dk_t     = beta_t D_t e_t - S~_t de_t
    dS~_t    = D_t - k_t de_t^T
    dg_t     = rowsum(dS~_t * S~_t)                  as d alpha = alpha dg; for g = -inf S~ is 0, so dg is 0
    R_{t-1}  = Diag(alpha_t) dS~_t                   dS_0 = R_0
"""

from __future__ import annotations

import numpy as np

from kda_spec.types import Gradients, Inputs

# States kept at once: [SEGMENT, B, HV, K, V]. Longer sequences keep one state per segment and walk each segment again.
SEGMENT = 64


def gradients(inputs: Inputs, do: np.ndarray, dS_T: np.ndarray | None = None) -> Gradients:
    """Return the gradients of L = <do, o> + <dS_T, S_T> for q, k, v, g, beta and the initial state.

    do [B, T, HV, V], dS_T [N, HV, K, V] or None for zeros. The gradients of q and k sum over the value heads that read
    them. g = -inf gets exactly 0. Raises ValueError for shapes that do not fit.
    """
    sizes = inputs.sizes
    do = _checked("do", do, (sizes.B, sizes.T, sizes.HV, sizes.V))
    state_shape = (sizes.N, sizes.HV, sizes.K, sizes.V)
    dS_T = np.zeros(state_shape) if dS_T is None else _checked("dS_T", dS_T, state_shape)
    S0 = np.zeros(state_shape) if inputs.initial_state is None else inputs.initial_state
    result = Gradients(*(np.empty_like(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, S0)))
    for batch, tokens, states in inputs.runs():
        rows = inputs.heads_first(batch, tokens)
        parts = _adjoint(*rows, S0[states], inputs.resolved_scale, do[batch, tokens].swapaxes(1, 2), dS_T[states])
        result.initial_state[states] = parts[-1]
        for name, part in zip(("q", "k", "v", "g", "beta"), parts, strict=False):
            target = getattr(result, name)
            target[batch, tokens] = _sum_groups(part.swapaxes(1, 2), target.shape[2])
    return result


def _checked(name: str, value, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    return value


def _sum_groups(x: np.ndarray, heads: int) -> np.ndarray:
    """Sum [B, T, HV, ...] over the HV // heads value heads that share one head."""
    B, T, HV, *rest = x.shape
    return x.reshape(B, T, heads, HV // heads, *rest).sum(axis=3)


def _adjoint(q, k, v, g, beta, S0, scale, do, dS_T) -> tuple[np.ndarray, ...]:
    """Return dq, dk, dv, dg, dbeta, dS0 of one run; rows [..., T, K or V], beta [..., T], states [..., K, V]."""
    alpha = np.exp(g)
    starts = range(0, q.shape[-2], SEGMENT)
    segments = [tuple(x[..., i : i + SEGMENT, :] for x in (q, k, v, alpha, beta[..., None], do)) for i in starts]
    states = [S0]
    for segment in segments[:-1]:
        states.append(_forward(*segment[1:5], states[-1])[2])
    R, parts = dS_T.copy(), []
    for segment, S in zip(reversed(segments), reversed(states), strict=False):
        *rows, R = _segment_adjoint(*segment, S, scale, R)
        parts.append(rows)
    if not parts:
        return *(np.zeros_like(x) for x in (q, k, v, g, beta)), R
    *rows, dbeta = (np.concatenate(x[::-1], axis=-2) for x in zip(*parts, strict=True))
    return *rows, dbeta[..., 0], R


def _forward(k, v, alpha, beta, S) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the decayed states S~ [T, ..., K, V], the errors e [..., T, V] and the last state, from the state S."""
    T, k_rows, v_rows = k.shape[-2], _tokens_first(k), _tokens_first(v)
    alpha, beta_k = (_tokens_first(x).swapaxes(-1, -2) for x in (alpha, beta * k))
    decayed, errors = np.empty((T, *S.shape)), np.empty_like(v_rows)
    for t in range(T):
        np.multiply(alpha[t], S, out=decayed[t])
        np.subtract(v_rows[t], k_rows[t] @ decayed[t], out=errors[t])
        S = decayed[t] + beta_k[t] * errors[t]
    return decayed, _tokens_last(errors), S


def _reverse(q, k, alpha, beta, do, scale, R) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return D [T, ..., K, V], de [..., T, V] and R before the first token, from R after the last."""
    T, do_rows, beta_k_rows = k.shape[-2], _tokens_first(do), _tokens_first(beta * k)
    q, k, alpha = (_tokens_first(x).swapaxes(-1, -2) for x in (scale * q, k, alpha))
    D, de = np.empty((T, *R.shape)), np.empty_like(do_rows)
    for t in reversed(range(T)):
        np.add(R, q[t] * do_rows[t], out=D[t])
        np.matmul(beta_k_rows[t], D[t], out=de[t])
        R = alpha[t] * (D[t] - k[t] * de[t])
    return D, _tokens_last(de), R


def _segment_adjoint(q, k, v, alpha, beta, do, S, scale, R) -> tuple[np.ndarray, ...]:
    """Return dq, dk, dv, dg, dbeta [..., T, 1] and R before a segment, given the state before and R after it."""
    decayed, e, _ = _forward(k, v, alpha, beta, S)
    D, de, R = _reverse(q, k, alpha, beta, do, scale, R)
    D_e = _apply(D, e)
    dq = scale * (_apply(decayed, do) + beta * k * np.sum(e * do, axis=-1, keepdims=True))
    dk = beta * D_e - _apply(decayed, de)
    dbeta = np.sum(k * D_e, axis=-1, keepdims=True)
    D -= _tokens_first(k).swapaxes(-1, -2) * _tokens_first(de)
    dg = np.moveaxis(np.einsum("...kv,...kv->...k", D, decayed), 0, -2)
    return dq, dk, de, dg, dbeta, R


def _apply(matrices: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return [..., T, K] with row t = matrices[t] @ rows[..., t, :], matrices [T, ..., K, V], rows [..., T, V]."""
    return np.moveaxis((matrices @ np.moveaxis(rows, -2, 0)[..., None])[..., 0], 0, -2)


def _tokens_first(x: np.ndarray) -> np.ndarray:
    """Return [..., T, K] as contiguous row vectors [T, ..., 1, K]."""
    return np.ascontiguousarray(np.moveaxis(x, -2, 0))[..., None, :]


def _tokens_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x[..., 0, :], 0, -2)
