"""Run Kimi Delta Attention chunk by chunk in torch, in the tree form: decays are multiplied, never divided.

With what `impls.tree_torch` finds within a chunk, all chunks of a block at a time, a chunk is

    delta = X diag(beta) (v - (k before) S)
    o     = (q before) S + A delta
    S    <- total S + (k after)^T delta

one chunk after the other, several heads and short sequences together. Memory is inputs, outputs, and one block of
tokens and heads.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from impls.activations import compute_dtype, l2norm_, log_decay, write_strength
from impls.call import call_activated, call_raw, value_first
from impls.checks import bounds_of, wants_gradient
from impls.choice import chunk_torch_config, chunk_torch_launch
from impls.chunk_backward_torch import adjoint
from impls.compiler_cpu import can_compile, compiled
from impls.configs import ChunkTorchConfig
from impls.pages import room
from impls.registration import register, register_raw
from impls.schedule import Activation, Span, blocks, gather, scatter
from impls.sequences import flat, padded, runs_of
from impls.states import States
from impls.tree_torch import within_chunks


def chunk_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.chunk_kda`.

    config: a ChunkTorchConfig. Raises as `choice.chunk_torch_launch` and `call.call_activated` do.
    """
    launch = chunk_torch_launch(config, chunk_size, q.device.type)
    others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
    call, to = (call_activated, op) if wants_gradient((q, k, v, g, beta, *others)) else (call_raw, op_raw)
    return call(to, q, k, v, g, beta, launch=launch, chunk_size=launch[0] or ChunkTorchConfig.chunk_size, **keywords)


def over_chunk(A, X, rows, k_after, total, v, scale, o, S) -> None:
    """Take the states S [lanes, K, V] over one chunk, and write scale S^T q into o [lanes, C, V].

    A to total: what `within_chunks` returned; v [lanes, C, V], scale [].
    """
    C = v.shape[1]
    seen = torch.bmm(rows, S)
    delta = torch.bmm(X, v - seen[:, :C])
    torch.mul(torch.baddbmm(seen[:, C:], A, delta), scale, out=o)
    S.mul_(total.unsqueeze(-1)).baddbmm_(k_after.mT, delta)


@functools.lru_cache(maxsize=256)
def _compiled(slots: int, lanes: int, C: int, K: int, V: int, dtype: torch.dtype, threads: int) -> tuple[Callable, ...]:
    """Return `within_chunks` and `over_chunk` for blocks of this shape, compiled for so many threads."""
    R = slots * lanes
    inputs = [torch.zeros(R, C, channels, dtype=dtype) for channels in (K, K, K, 1)]
    within = compiled(within_chunks, inputs, products=False)
    shapes = [(lanes, C, C)] * 2 + [(lanes, 2 * C, K), (lanes, C, K), (lanes, K), (lanes, C, V), ()]
    inputs = [torch.zeros(shape, dtype=dtype) for shape in (*shapes, (lanes, C, V), (lanes, K, V))]
    return within, compiled(over_chunk, inputs, products=dtype == torch.float32)


class _Walk:
    """Walk over all runs and heads, block by block."""

    def __init__(self, tokens, activations, normed: bool, o, states: States, scale: float, config):
        self.tokens, self.activations, self.normed = tokens, activations, normed
        self.o, self.states, self.config = o, states, config
        self.dtype, self.scale = states.final.dtype, torch.tensor(scale, dtype=states.final.dtype)
        self.slots, self.lanes, self.S = config.block_tokens // config.chunk_size, config.heads, None
        self.within, self.over, self.fixed = within_chunks, over_chunk, config.compile and can_compile()
        if self.fixed and len(o):
            K, V = (padded(x) for x in states.final.shape[-2:])
            shape = self.slots, self.lanes, config.chunk_size, K, V
            self.within, self.over = _compiled(*shape, self.dtype, torch.get_num_threads())

    def block(self, spans: Sequence[Span]) -> None:
        """Write o of the chunks of a block, and the states behind them."""
        slots, lanes = spans[-1].slot + spans[-1].slots, max(span.lanes for span in spans)
        if self.fixed:
            slots, lanes = self.slots, self.lanes
        HV, shape = self.o.shape[1], (slots, lanes, self.config.chunk_size)
        q, k, v, g, beta = (
            gather(x, spans, shape, HV, self.dtype, activate)
            for x, activate in zip(self.tokens, self.activations, strict=True)
        )
        if self.normed:
            K = self.states.final.shape[2]
            l2norm_(q[..., :K])
            l2norm_(k[..., :K])
        o = torch.empty_like(v)
        within = self.within(*(x.view(-1, *x.shape[2:]) for x in (q, k, g, beta)))
        within = (x.view(*shape[:2], *x.shape[1:]) for x in within)
        chunks = list(zip(*(x.unbind() for x in (*within, v, o)), strict=True))
        for span in spans:
            self.walk(span, chunks[span.slot : span.slot + span.slots])
        scatter(self.o, o, spans)

    def walk(self, span: Span, chunks: Sequence[tuple[torch.Tensor, ...]]) -> None:
        """Walk over the chunks of a span."""
        if span.first == 0:
            self.states.fill_some(span.runs, span.heads)
        if span.opens:
            self.S = self.states.borrow(span.runs, span.heads, self.lanes if self.fixed else span.lanes)
        for i, chunk in enumerate(chunks):
            self.states.keep(self.S, span.runs, span.first + i * self.config.chunk_size, span.heads)
            *within, v, o = (x[: len(self.S)] for x in chunk) if len(self.S) < len(chunk[0]) else chunk
            self.over(*within, v, self.scale, o, self.S)
        if span.closes:
            self.states.give_back(self.S, span.runs, span.heads)


def _blockwise(
    tokens, activations, normed, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch
):
    q, _, v, *_ = tokens
    B, T, HV, _ = v.shape
    config = chunk_torch_config(tuple(launch), q, v, cu_seqlens, state_interval)
    runs = runs_of(B, T, bounds_of(cu_seqlens, T))
    states = States(initial_state, q, v, cu_seqlens, runs, state_interval, filled=False)
    states.fill_some(runs.part(slice(runs.running(0), None)), slice(0, HV))  # those without a token
    o = room(v.shape, v.dtype, v.device)
    walk = _Walk([flat(x) for x in tokens], activations, normed, flat(o), states, scale, config)
    for spans in blocks(runs, HV, config.heads, config.chunk_size, walk.slots):
        walk.block(spans)
    return o, states.final if output_final_state else states.final.new_empty(0), states.kept


def _forward(q, k, v, g, beta, *rest):
    return _blockwise((q, k, v, g, beta), (None,) * 5, False, *rest)


def _activations(v, A_log, dt_bias, lower_bound, gate: str, sigmoid: str) -> list[Activation | None]:
    """Return what to do to q, k, v, g and beta before they come into a block; as the arguments of `chunk_kda` say."""
    HV, dtype = v.shape[2], compute_dtype(v)

    def decay(x, heads):
        rate = None if A_log is None else A_log.reshape(HV)[heads]
        return log_decay(x, rate, None if dt_bias is None else dt_bias.reshape(HV, -1)[heads], lower_bound, dtype)

    def strength(x, heads):
        return write_strength(x, sigmoid == "twice", dtype)

    return [None, None, None, decay if gate != "none" else None, strength if sigmoid != "none" else None]


def _forward_raw(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, normed, gate,
    sigmoid, state_v_first, output_final_state, state_interval, launch,
):  # fmt: skip
    activations = _activations(v, A_log, dt_bias, lower_bound, gate, sigmoid)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    packing = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    tokens, asked = (q, k, v, g, beta), (scale, output_final_state, state_interval, launch)
    o, S, h = _blockwise(tokens, activations, normed, initial_state, packing, *asked)
    return (o, value_first(S), value_first(h)) if state_v_first else (o, S, h)


op = register("chunk_torch", _forward, adjoint)
op_raw = register_raw("chunk_torch_raw", _forward_raw, kept_dtype=lambda v: v.dtype)
