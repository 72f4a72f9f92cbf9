"""Run Kimi Delta Attention chunk by chunk in torch, in the tree form: decays are multiplied, never divided.

With what `impls.tree_torch` finds within a chunk, all chunks of a block at a time, a chunk is

    delta = X diag(beta) (v - (k before) S)
    o     = (q before) S + A delta
    S    <- total S + (k after)^T delta

one chunk after the other, several heads and short sequences together. Memory is inputs, outputs, and one block of
tokens and heads.
"""

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from operator import is_

import torch

from impls.activations import compute_dtype, l2norm_, log_decay, write_strength
from impls.call import call_activated, call_raw
from impls.checks import bounds_of, wants_gradient
from impls.choice import chunk_torch_config, chunk_torch_launch
from impls.chunk_backward_torch import adjoint
from impls.compiler_cpu import TILES, Compiled, can_compile, compiled
from impls.configs import ChunkTorchConfig
from impls.fetch_torch import Fetch
from impls.pages import keep_freed_memory, room, transposed
from impls.registration import register, register_raw
from impls.schedule import Activation, Span, blocks, gather, scatter
from impls.sequences import flat, padded, runs_of
from impls.states import States
from impls.threads import at_most
from impls.tree_torch import within_chunks


def chunk_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.chunk_kda`.

    config: a ChunkTorchConfig. Raises as `choice.chunk_torch_launch` and `call.call_activated` do.
    """
    launch = chunk_torch_launch(config, chunk_size, q.device.type)
    others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
    call, to = (call_activated, op) if wants_gradient((q, k, v, g, beta, *others)) else (call_raw, op_raw)
    return call(to, q, k, v, g, beta, launch=launch, chunk_size=launch[0] or ChunkTorchConfig.chunk_size, **keywords)


def over_chunk(A, X, rows, k_after_turned, total, o, v, scale, S) -> None:
    """Take the states S [lanes, K, V] over one chunk, and write scale S^T q into o [lanes, C, V].

    A to total: what `within_chunks` returned; v [lanes, C, V] of any dtype, scale [].
    """
    C = v.shape[1]
    seen = torch.bmm(rows, S)
    delta = torch.bmm(X, v - seen[:, :C])
    torch.mul(torch.baddbmm(seen[:, C:], A, delta), scale, out=o)
    S.mul_(total.unsqueeze(-1)).baddbmm_(k_after_turned, delta)


def over_first_chunk(A, X, rows, k_after_turned, total, o, v, scale, S) -> None:
    """Do the same where zeros enter, without reading S, total, and of the rows more than the first.

    The decays up to the first token meet nothing but zeros: only what is not a number comes through.
    """
    nothing = (0 * rows[:, :1]).sum(-1, keepdim=True)
    delta = torch.bmm(X + nothing, v.to(X.dtype))
    torch.mul(torch.bmm(A, delta), scale, out=o)
    torch.bmm(k_after_turned, delta, out=S)


NORMED = 0, 1
"""Which of q, k, v, g and beta are normed."""
KEPT = (2,)
"""Which of them are only read once, and keep their dtype in a block."""


@functools.lru_cache(maxsize=256)
def _compiled(
    slots: int, lanes: int, C: int, group: int, K: int, V: int, dtype: torch.dtype, values: torch.dtype, threads: int
) -> tuple[Compiled, ...]:
    """Return `within_chunks`, `over_chunk` and `over_first_chunk` of blocks of this shape, compiled for the threads.

    values: the dtype of v and o.
    """
    R, tiles = slots * lanes, TILES if dtype == torch.float32 else None
    tokens = [torch.zeros(R, C, channels, dtype=dtype) for channels in (K, K, K, 1)]
    shapes = [(lanes, C, C)] * 2 + [(lanes, 2 * C, K), (lanes, K, C), (lanes, K)]
    inputs = [torch.zeros(shape, dtype=dtype) for shape in (*shapes, (), (lanes, K, V))]
    inputs[5:5] = [torch.zeros(lanes, C, V, dtype=values) for _ in range(2)]
    # of products there is most to build: the C++ compiler is at it while Inductor prepares what takes Inductor longest
    over, over_first = (compiled(function, inputs, tiles) for function in (over_chunk, over_first_chunk))
    return compiled(partial(within_chunks, group=group), tokens), over, over_first


class _Walk:
    """Walk over all runs and heads, block by block."""

    def __init__(self, tokens, activations, normed: bool, o, states: States, scale: float, config):
        self.tokens, self.activations, self.normed = tokens, activations, normed
        self.o, self.states, self.config = o, states, config
        self.dtype, self.scale = states.final.dtype, torch.tensor(scale, dtype=states.final.dtype)
        self.slots, self.lanes, self.S = config.block_tokens // config.chunk_size, config.heads, None
        self.within = partial(within_chunks, group=config.group)
        self.over, self.over_first = over_chunk, over_first_chunk
        self.fixed, self.fetched = config.compile and can_compile() and len(o) > 0, []
        self.found, self.chunks = None, []
        if self.fixed:
            K, V = (padded(x) for x in states.final.shape[-2:])
            shape = self.slots, self.lanes, config.chunk_size
            self.fetched = [i for i in range(len(tokens)) if activations[i] is None]
            rows = [tokens[i] for i in self.fetched]
            self.fetch = Fetch(rows, o.shape[1], shape, self.dtype, KEPT, NORMED if normed else (), overwrites=True)
            functions = _compiled(*shape, config.group, K, V, self.dtype, o.dtype, torch.get_num_threads())
            self.within, self.over, self.over_first = (x.with_memory() for x in functions)
            self.o_of_block = o.new_empty((self.slots * self.lanes, config.chunk_size, V))

    def run(self, blocks: Iterator[list[Span]]) -> None:
        """Write o of all blocks, and the states behind them."""
        for spans, place in self.fetch.places(blocks) if self.fixed else zip(blocks, repeat(None), strict=False):
            self.block(spans, place)

    def block(self, spans: Sequence[Span], place) -> None:
        """Write o of the chunks of a block, and the states behind them; place: the block's for `self.fetch`."""
        if self.fixed:
            shape = self.slots, self.lanes, self.config.chunk_size
        else:
            shape = spans[-1].slot + spans[-1].slots, max(span.lanes for span in spans), self.config.chunk_size
        q, k, v, g, beta = self.brought(spans, shape, place)
        o = self.o_of_block if self.fixed else torch.empty_like(v)
        chunks = self.split((*self.within(q, k, g, beta), o, v), shape)
        for span in spans:
            self.walk(span, chunks[span.slot : span.slot + span.slots])
        scatter(self.o, o.unflatten(0, shape[:2]), spans)

    def brought(self, spans: Sequence[Span], shape: tuple[int, int, int], place) -> list[torch.Tensor]:
        """Return the tokens of a block [slots * lanes, C, channels'], activated and normed."""
        found = dict(zip(self.fetched, self.fetch(place), strict=True)) if self.fetched else {}
        for i, x in enumerate(self.tokens):
            if i not in found:
                dtype = x.dtype if i in KEPT else self.dtype
                x = gather(x, spans, shape, self.o.shape[1], dtype, self.activations[i])
                if self.normed and i in NORMED:
                    l2norm_(x[..., : self.states.final.shape[2]])
                found[i] = x.flatten(0, 1)
        return [found[i] for i in range(len(self.tokens))]

    def split(self, found: tuple[torch.Tensor, ...], shape: tuple[int, int, int]) -> list[tuple[torch.Tensor, ...]]:
        """Return the parts of every slot of a block, of tensors [slots * lanes, ..].

        What is compiled overwrites its results, and the parts are those of the last block: to take them took 90 us.
        """
        if self.found is not None and all(map(is_, found, self.found)):
            return self.chunks
        chunks = list(zip(*(x.view(*shape[:2], *x.shape[1:]).unbind() for x in found), strict=True))
        if self.fixed:
            self.found, self.chunks = found, chunks
        return chunks

    def walk(self, span: Span, chunks: Sequence[tuple[torch.Tensor, ...]]) -> None:
        """Walk over the chunks of a span."""
        empty = span.first == 0 and self.states.empty
        if span.first == 0 and not empty:
            self.states.fill_some(span.runs, span.heads)
        if span.opens:
            self.S = self.states.borrow(span.runs, span.heads, self.lanes if self.fixed else span.lanes)
        lanes = self.S.shape[0]
        if chunks[0][0].shape[0] > lanes:
            chunks = [[x[:lanes] for x in chunk] for chunk in chunks]
        for i, chunk in enumerate(chunks):
            self.states.keep(self.S, span.runs, span.first + i * self.config.chunk_size, span.heads)
            over = self.over_first if empty and i == 0 else self.over
            over(*chunk, self.scale, self.S)
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
    if v.device.type == "cpu":
        keep_freed_memory()
    with at_most(config.threads):
        walk = _Walk([flat(x) for x in tokens], activations, normed, flat(o), states, scale, config)
        walk.run(blocks(runs, HV, config.heads, config.chunk_size, walk.slots))
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
    return (o, transposed(S), transposed(h)) if state_v_first else (o, S, h)


op = register("chunk_torch", _forward, adjoint)
op_raw = register_raw("chunk_torch_raw", _forward_raw, kept_dtype=lambda v: v.dtype)
