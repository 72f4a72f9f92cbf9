"""Run Kimi Delta Attention chunk by chunk in torch, in the tree form: decays are multiplied, never divided.

With what `impls.tree_torch` finds within a chunk, all chunks of a block at a time, a chunk is

    delta = X diag(beta) (v - (k before) S)
    o     = (q before) S + A delta
    S    <- total S + (k after)^T delta

one chunk after the other, all sequences and heads of the block together. Memory is inputs, outputs, and one block of
tokens and heads.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import torch

from impls.activations import compute_dtype, l2norm, log_decay, write_strength
from impls.adjoint_torch import adjoint
from impls.call import call_activated, call_raw
from impls.checks import bounds_of, wants_gradient
from impls.choice import chunk_torch_config
from impls.configs import ChunkTorchConfig
from impls.pages import room
from impls.registration import register, register_raw
from impls.sequences import Activation, Runs, by_head, flat, groups, runs_of, scatter
from impls.states import States
from impls.tree_torch import within_chunks

COMPILED_SHAPES = 256
"""How many combinations of channels, dtype and configuration one process may compile."""


def chunk_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.chunk_kda`.

    config: a ChunkTorchConfig. Raises as `choice.chunk_torch_config` and `call.call_activated` do.
    """
    config = chunk_torch_config(config, chunk_size)
    launch = (config.chunk_size, config.block_tokens, config.heads, int(config.compile))
    others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
    call, to = (call_activated, op) if wants_gradient((q, k, v, g, beta, *others)) else (call_raw, op_raw)
    return call(to, q, k, v, g, beta, launch=launch, chunk_size=config.chunk_size, **keywords)


def walk(within, v, S, o, scale: float) -> None:
    """Walk over the chunks of a block: write scale S^T q into o [M, L, V], leave in S [M, K, V] the states behind it.

    within: what `within_chunks` returned; v [M, L, V].
    """
    M, _, V = v.shape
    C = within[0].shape[-1]
    chunks = [x.unflatten(0, (M, -1)) for x in within] + [x.view(M, -1, C, V) for x in (v, o)]
    for A, X, reads, k_after, total, v, o in zip(*(x.unbind(1) for x in chunks), strict=True):
        seen = torch.bmm(reads, S)
        delta = torch.bmm(X, v - seen[:, :C])
        # the product is not written into o, a part of a block: it would be one call per matrix
        torch.mul(torch.baddbmm(seen[:, C:], A, delta), scale, out=o)
        S.mul_(total.unsqueeze(-1)).baddbmm_(k_after.mT, delta)


@functools.cache
def _compiled():
    """Return the compiled `within_chunks`, or itself, with one warning, where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        warnings.warn(f"chunk_torch runs uncompiled, several times slower: {error}", stacklevel=2)
        return within_chunks
    _keep_freed_memory()
    return torch.compile(within_chunks, fullgraph=True, dynamic=False)


def _keep_freed_memory() -> None:
    """Make the C library keep what a block frees for the next one.

    glibc gives the top of its heap back beyond twice the largest block that it mapped and freed so far (32 MiB at
    most): with blocks of 1 MiB every one of 32 calls faulted 265 pages in again, 1.7 ms instead of 0.6.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)


def _compiled_within(inputs: tuple[torch.Tensor, ...], C: int, pairs: int) -> list[torch.Tensor]:
    """Run the compiled `within_chunks` in one shape, for so many sequences and heads, or others would be compiled too.

    Beyond 8 shapes dynamo would refuse, and shapes are few but more than that.
    """
    M, chunks = len(inputs[0]), inputs[0].shape[1] // C
    with torch.inference_mode(False), torch.no_grad():
        if pairs > M:
            inputs = [torch.cat([x, x.new_zeros((pairs - M, *x.shape[1:]))]) for x in inputs]
        with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
            return [x[: M * chunks] for x in _compiled()(*inputs, C)]


class _Walk:
    """Walk over some runs and heads, block by block."""

    def __init__(self, tokens, activations, o: torch.Tensor, states: States, config: ChunkTorchConfig):
        self.tokens, self.activations, self.o, self.states, self.config = tokens, activations, o, states, config
        self.L = math.gcd(config.block_tokens, states.interval)

    def over(self, runs: Runs, heads: slice, scale: float) -> None:
        """Write o of some runs and heads, and their final and intermediate states."""
        S = self.states.take(runs, heads)
        for first in range(0, runs.longest, self.L):
            n, L = runs.running(first), self.L if self.config.compile else self.tokens_of_block(runs.longest - first)
            self.states.keep(S[:n], runs, first, heads)
            q, k, v, g, beta = (
                by_head(x, runs, first, L, heads, self.o.shape[1], S.dtype, activate).flatten(0, 1)
                for x, activate in zip(self.tokens, self.activations, strict=True)
            )
            o = torch.empty_like(v)
            walk(self.within(q, k, g, beta), v, S[:n].flatten(0, 1), o, scale)
            scatter(self.o, o.view(n, -1, *o.shape[1:]).transpose(1, 2), runs, first, heads)
        self.states.put(S, runs, heads)

    def tokens_of_block(self, left: int) -> int:
        """Return how many tokens to work on when `left` are left: whole chunks, as few as needed."""
        C = self.config.chunk_size
        return min(self.L, -(-left // C) * C)

    def within(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run `within_chunks` as configured."""
        if self.config.compile:
            return _compiled_within(inputs, self.config.chunk_size, self.config.heads)
        return within_chunks(*inputs, self.config.chunk_size)


def _blockwise(tokens, activations, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    q, _, v, *_ = tokens
    B, T, HV, _ = v.shape
    config = ChunkTorchConfig(*launch[:3], compile=bool(launch[3]))
    runs = runs_of(B, T, bounds_of(cu_seqlens, T))
    states = States(initial_state, q, v, cu_seqlens, runs, state_interval)
    o = room(v.shape, v.dtype, v.device)
    walk = _Walk([flat(x) for x in tokens], activations, flat(o), states, config)
    for some, heads in groups(runs, HV, config.heads):
        walk.over(runs.part(some), heads, scale)
    return o, states.final if output_final_state else states.final.new_empty(0), states.kept


def _forward(q, k, v, g, beta, *rest):
    return _blockwise((q, k, v, g, beta), (None,) * 5, *rest)


def _activations(v, A_log, dt_bias, lower_bound, normed: bool, gate: str, sigmoid: str) -> list[Activation | None]:
    """Return what to do to q, k, v, g and beta before they come into a block; as the arguments of `chunk_kda` say."""
    HV, dtype = v.shape[2], compute_dtype(v)

    def norm(x, heads):
        return l2norm(x, dtype)

    def decay(x, heads):
        rate = None if A_log is None else A_log.reshape(HV)[heads]
        return log_decay(x, rate, None if dt_bias is None else dt_bias.reshape(HV, -1)[heads], lower_bound, dtype)

    def strength(x, heads):
        return write_strength(x, sigmoid == "twice", dtype)

    norm = norm if normed else None
    return [norm, norm, None, decay if gate != "none" else None, strength if sigmoid != "none" else None]


def _forward_raw(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, normed, gate,
    sigmoid, state_v_first, output_final_state, state_interval, launch,
):  # fmt: skip
    activations = _activations(v, A_log, dt_bias, lower_bound, normed, gate, sigmoid)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    packing = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    tokens, asked = (q, k, v, g, beta), (scale, output_final_state, state_interval, launch)
    o, S, h = _blockwise(tokens, activations, initial_state, packing, *asked)
    if state_v_first:
        S, h = (x.transpose(-1, -2).contiguous() if x.ndim > 1 else x for x in (S, h))
    return o, S, h


op = register("chunk_torch", _forward, adjoint)
op_raw = register_raw("chunk_torch_raw", _forward_raw, kept_dtype=lambda v: v.dtype)
