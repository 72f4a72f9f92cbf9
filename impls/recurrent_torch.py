"""Run Kimi Delta Attention token by token in torch: prefill for any length, and the decode step.

    P_t = Diag(exp g_t) S_{t-1}
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    o_t = scale * S_t^T q_t

One state per sequence and value head, float32 (float64 for float64 inputs), is worked on in the final state's own
memory. Sequences and heads take their steps in groups whose states stay in the caches between the passes of a step and
over a block of tokens, so that main memory sees a state read once and written once per block; a decode step is one
block. Memory is inputs, outputs, and the inputs of 64 tokens.
"""

import math

import torch

from impls.activations import compute_dtype
from impls.adjoint_torch import adjoint
from impls.call import call_activated
from impls.checks import bounds_of
from impls.registration import register
from impls.sequences import by_token, flat, runs_of, scatter
from impls.states import States

BLOCK_TOKENS = 64
GROUP_ELEMENTS = 2**20
"""How many elements the states of a group may have: 4 MiB in float32."""


def recurrent_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.fused_recurrent_kda`.

    Raises TypeError for a configuration and ValueError for a chunk size: there is nothing to configure here.
    """
    if config is not None:
        raise TypeError(f"config must be None for recurrent_torch, got {config!r}")
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_torch, which has no chunks, got {chunk_size}")
    return call_activated(op, q, k, v, g, beta, launch=(), chunk_size=1, **keywords)


def step(S0: torch.Tensor, S: torch.Tensor, q, k, v, alpha, beta, out: torch.Tensor) -> None:
    """Take states S0 [M, K, V] over one token into S, which may be S0, and write S^T q into out [M, 1, V].

    q, k, v are rows [M, 1, K or V], alpha [M, K, 1], beta [M, 1, 1].
    """
    torch.mul(S0, alpha, out=S)
    delta = torch.bmm(k, S)
    torch.sub(v, delta, out=delta).mul_(beta)
    S.addcmul_(k.mT, delta)
    torch.bmm(q, S, out=out)


def _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    B, T, HV, _ = v.shape
    runs, dtype, heads = runs_of(B, T, bounds_of(cu_seqlens, T)), compute_dtype(v), slice(0, HV)
    states, o = States(initial_state, q, v, cu_seqlens, runs, state_interval, filled=False), v.new_empty(v.shape)
    tokens, (S0, S) = [flat(x) for x in (q, k, v, g, beta)], states.open(runs)
    block = math.gcd(BLOCK_TOKENS, state_interval)
    for first in range(0, runs.longest, block):
        L, n = min(block, runs.longest - first), runs.running(first)
        states.keep(S[: n * HV].unflatten(0, (n, HV)), runs, first, heads)
        rows = [by_token(x, runs, first, L, heads, HV, dtype).flatten(1, 2).unsqueeze(2) for x in tokens]
        out = torch.empty_like(rows[2])
        _over(S if first else S0, S, [runs.running(first + t) * HV for t in range(L)], rows, out)
        scatter(flat(o), out.mul_(scale).view(L, n, HV, -1).transpose(0, 1), runs, first, heads)
    states.close(S, runs)
    return o, states.final if output_final_state else S.new_empty(0), states.kept


def _over(S0: torch.Tensor, S: torch.Tensor, counts: list[int], rows: list[torch.Tensor], out: torch.Tensor) -> None:
    """Take states S0 [M, K, V] over a block of tokens into S, the first counts[t] of them over token t.

    rows: q, k, v, g, beta [L, M, 1, channels]; out [L, M, 1, V] receives S^T q.
    """
    q, k, v, g, beta = rows
    rows = [q, k, v, torch.exp(g).mT, beta, out]
    size = max(1, GROUP_ELEMENTS // (S.shape[1] * S.shape[2]))
    for first in range(0, counts[0], size):
        some = slice(first, first + size)
        before, after = S0[some], S[some]
        for count, *token in zip(counts, *(x[:, some].unbind() for x in rows), strict=True):
            m = min(size, count - first)
            if m <= 0:
                break
            if m < len(after):
                before, after = before[:m], after[:m]
            step(before, after, *(x[:m] for x in token) if m < len(token[0]) else token)
            before = after


op = register("recurrent_torch", _forward, adjoint)
