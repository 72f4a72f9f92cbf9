"""Run Kimi Delta Attention token by token in torch: prefill for any length, and the decode step.

    P_t = Diag(exp g_t) S_{t-1}
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    o_t = scale * S_t^T q_t

One state per sequence and value head is kept in float32 (float64 for float64 inputs) and updated in place; all sequences
that still run take a step together. Time is proportional to the longest sequence; memory is inputs, outputs, one state.
"""

import torch

from impls.activations import compute_dtype
from impls.adjoint_torch import adjoint
from impls.call import call_op
from impls.checks import bounds_of
from impls.registration import register, state_shape
from impls.sequences import Runs, flat, runs_of


def recurrent_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.fused_recurrent_kda`.

    Raises TypeError for a configuration and ValueError for a chunk size: there is nothing to configure here.
    """
    if config is not None:
        raise TypeError(f"config must be None for recurrent_torch, got {config!r}")
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_torch, which has no chunks, got {chunk_size}")
    return call_op(_op, q, k, v, g, beta, launch=(), chunk_size=1, **keywords)


def starting_states(initial_state, q, v, cu_seqlens, runs: Runs) -> torch.Tensor:
    """Return the states [N, HV, K, V] before the first token in the order of `runs`, as a copy."""
    dtype = compute_dtype(v)
    if initial_state is None:
        return v.new_zeros(state_shape(q, v, cu_seqlens), dtype=dtype)
    return initial_state[list(runs.order)].to(dtype, memory_format=torch.contiguous_format)


def callers_order(S: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Return states [N, ...] that stand in the order of `runs` in the caller's order."""
    result = torch.empty_like(S)
    result[list(runs.order)] = S
    return result


def row_times_matrix(x: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """Return x^T S for every sequence and head: x [n, HV, K], S [n, HV, K, V] -> [n, HV, V]."""
    return torch.matmul(x.unsqueeze(-2), S).squeeze(-2)


def step(S: torch.Tensor, q, k, v, g, beta, scale: float) -> torch.Tensor:
    """Advance S [n, HV, K, V] by one token in place, and return o [n, HV, V]; the other inputs are [n, HV, ...]."""
    S *= torch.exp(g).unsqueeze(-1)
    delta = beta.unsqueeze(-1) * (v - row_times_matrix(k, S))
    S += k.unsqueeze(-1) * delta.unsqueeze(-2)
    return scale * row_times_matrix(q, S)


def _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    B, T, HV, _ = v.shape
    runs = runs_of(B, T, bounds_of(cu_seqlens, T))
    S = starting_states(initial_state, q, v, cu_seqlens, runs)
    o, kept = v.new_empty(v.shape), _Kept(S, runs, B, state_interval, v.dtype)
    tokens, o_flat = [flat(x) for x in (q, k, v, g, beta)], o.view(B * T, *o.shape[2:])
    starts = torch.tensor(runs.starts, device=v.device)
    for t in range(runs.longest):
        n = runs.running(t)
        kept.keep(t, S[:n])
        rows = starts[:n] + t
        qkvgb = [x.index_select(0, rows).to(S.dtype) for x in tokens]
        qkvgb[:2] = [x.repeat_interleave(HV // x.shape[1], 1) for x in qkvgb[:2]]
        o_flat[rows] = step(S[:n], *qkvgb, scale).to(o.dtype)
    return o, callers_order(S, runs) if output_final_state else S.new_empty(0), kept.states


class _Kept:
    """Collect the states [B, NT, HV, K, V] that enter every `interval` tokens; interval 0 keeps none."""

    def __init__(self, S: torch.Tensor, runs: Runs, B: int, interval: int, dtype: torch.dtype):
        self.interval, self.states = interval, S.new_empty(0, dtype=dtype)
        if interval:
            total = sum(-(-length // interval) for length in runs.lengths)
            self.states = S.new_empty((B, total // max(B, 1), *S.shape[1:]), dtype=dtype)
            self.rows = torch.tensor(runs.interval_rows(interval), device=S.device)

    def keep(self, t: int, S: torch.Tensor) -> None:
        """Keep the states S [n, HV, K, V] that enter token t, where t begins an interval."""
        if self.interval and t % self.interval == 0:
            flat(self.states)[self.rows[: len(S)] + t // self.interval] = S.to(self.states.dtype)


_op = register("recurrent_torch", _forward, adjoint)
