"""Run Kimi Delta Attention token by token in torch: prefill for any length, and the decode step.

    P_t = Diag(exp g_t) S_{t-1}
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    o_t = scale * S_t^T q_t

One state per sequence and value head is kept in float32 (float64 for float64 inputs) and updated in place; all
sequences that still run take a step together. Memory is inputs, outputs, the states, and the inputs of 64 tokens.
"""

import torch

from impls.activations import compute_dtype
from impls.adjoint_torch import adjoint
from impls.call import call_activated
from impls.checks import bounds_of
from impls.registration import register
from impls.sequences import by_token, flat, runs_of, scatter
from impls.states import States

BLOCK_TOKENS = 64


def recurrent_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.fused_recurrent_kda`.

    Raises TypeError for a configuration and ValueError for a chunk size: there is nothing to configure here.
    """
    if config is not None:
        raise TypeError(f"config must be None for recurrent_torch, got {config!r}")
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_torch, which has no chunks, got {chunk_size}")
    return call_activated(op, q, k, v, g, beta, launch=(), chunk_size=1, **keywords)


def step(S: torch.Tensor, q, k, v, alpha, beta) -> torch.Tensor:
    """Advance states S [M, K, V] by one token in place and return S^T q, as a row [M, 1, V].

    q, k, v are rows [M, 1, K or V], alpha [M, K, 1], beta [M, 1, 1].
    """
    S *= alpha
    delta = beta * (v - k @ S)
    S.addcmul_(k.mT, delta)
    return q @ S


def _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    B, T, HV, _ = v.shape
    runs, dtype, heads = runs_of(B, T, bounds_of(cu_seqlens, T)), compute_dtype(v), slice(0, HV)
    states, o = States(initial_state, q, v, cu_seqlens, runs, state_interval), v.new_empty(v.shape)
    tokens, S = [flat(x) for x in (q, k, v, g, beta)], states.take(runs, heads)
    for first in range(0, runs.longest, BLOCK_TOKENS):
        L = min(BLOCK_TOKENS, runs.longest - first)
        blocks = [by_token(x, runs, first, L, heads, HV, dtype) for x in tokens]
        out = torch.empty_like(blocks[2])
        for t in range(L):
            n = runs.running(first + t)
            states.keep(S[:n], runs, first + t, heads)
            out[t, :n] = _all_heads(S[:n], [x[t, :n] for x in blocks])
        scatter(flat(o), out.mul_(scale).transpose(0, 1), runs, first, heads)
    states.put(S, runs, heads)
    return o, states.final if output_final_state else S.new_empty(0), states.kept


def _all_heads(S: torch.Tensor, token: list[torch.Tensor]) -> torch.Tensor:
    """Advance S [n, HV, K, V] in place over one token, q, k, v, g, beta [n, HV, channels]; return S^T q [n, HV, V]."""
    q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(1) for x in token)
    return step(S.flatten(0, 1), q, k, v, torch.exp(g).mT, beta).view(S.shape[0], S.shape[1], -1)


op = register("recurrent_torch", _forward, adjoint)
