"""Run Kimi Delta Attention chunk by chunk in torch, in the tree form: decays are multiplied, never divided.

Inside a chunk neighbouring groups of s = 1, 2, 4, ... tokens are merged. Each token keeps two products of decays per
channel: `before`, from the start of its group up to and including the token, and `after`, behind the token to the end
of the group. The decay between a token i of the late half of a merged group and a token j of its early half is
after_j * before_i. With

    A_ij = q_i . (decay_ij * k_j), j <= i                     the output that token j's write causes at token i
    X    = (I + strict_lower(beta_i k_i . (decay_ij * k_j)))^-1, by blocks: the corner of a merged group is -X1 L X0

and the `before` and `after` of the whole chunk, a chunk is

    delta = X diag(beta) (v - (k before) S)
    o     = (q before) S + A delta
    S    <- before_last S + (k after)^T delta

Every factor is in [0, 1], so any gate is safe, g = -inf included, and the border between a pair lies between its two
tokens, so outputs are causal bit for bit. Memory is inputs, outputs, and one block of tokens and heads.
"""

import functools
import math

import torch

from impls.adjoint_torch import adjoint
from impls.call import call_activated
from impls.checks import bounds_of
from impls.choice import chunk_torch_config
from impls.configs import ChunkTorchConfig
from impls.registration import register
from impls.sequences import Runs, by_head, flat, groups, runs_of, scatter
from impls.states import States

SMALLEST_PRODUCT = 8
"""Groups below this many late tokens share one product, of which the blocks on the diagonal are used."""

COMPILED_SHAPES = 256
"""How many combinations of channels, dtype and configuration one process may compile."""


def chunk_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.chunk_kda`.

    config: a ChunkTorchConfig. Raises as `choice.chunk_torch_config` and `call.call_activated` do.
    """
    config = chunk_torch_config(config, chunk_size)
    launch = (config.chunk_size, config.block_tokens, config.heads, int(config.compile))
    return call_activated(op, q, k, v, g, beta, launch=launch, chunk_size=config.chunk_size, **keywords)


def _halves(x: torch.Tensor, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the early and the late halves [M / 2s, s, K] of groups of 2s rows of x [M, K]."""
    x = x.view(-1, 2, s, x.shape[-1])
    return x[:, 0], x[:, 1]


def _pair_products(late_q, late_k, early_k) -> tuple[torch.Tensor, torch.Tensor]:
    """Return late_q early_k^T and late_k early_k^T for every pair: [G, s, K] each -> [G, s, s] each.

    Small pairs are stacked: dense products of SMALLEST_PRODUCT rows cost less than many tiny ones.
    """
    s, K = early_k.shape[1:]
    w = max(s, SMALLEST_PRODUCT)
    late = torch.cat([late_q.reshape(-1, w, K), late_k.reshape(-1, w, K)], 1)
    dense = late @ early_k.reshape(-1, w, K).mT
    blocks = dense.view(-1, 2, w // s, s, w // s, s).diagonal(dim1=2, dim2=4)
    return blocks.permute(1, 0, 4, 2, 3).reshape(2, -1, s, s).unbind()


def _join(x: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    """Return [[x0, 0], [corner, x1]] for the pairs of x [2G, s, s]: [G, 2s, 2s]."""
    x0, x1 = x.view(-1, 2, *x.shape[1:]).unbind(1)
    return torch.cat([torch.cat([x0, torch.zeros_like(corner)], 2), torch.cat([corner, x1], 2)], 1)


def tree(q, k, decay, beta, C: int):
    """Return A, X [M / C, C, C] and before, after [M, K] of chunks of C tokens; q, k, decay [M, K], beta [M, 1]."""
    write = k * beta
    before, after = decay.clone(), torch.ones_like(decay)
    A = (q * k).sum(-1).view(-1, 1, 1)
    X, s = torch.ones_like(A), 1
    while s < C:
        early_before, late_before = _halves(before, s)
        early_after, late_after = _halves(after, s)
        late_q, late_k = (_halves(x, s)[1] * late_before for x in (q, write))
        corner, L = _pair_products(late_q, late_k, _halves(k, s)[0] * early_after)
        X0, X1 = X.view(-1, 2, s, s).unbind(1)
        A, X = _join(A, corner), _join(X, -(X1 @ L @ X0))
        early_total, late_total = early_before[:, -1:], late_before[:, -1:]
        after = torch.stack([early_after * late_total, late_after], 1).view_as(after)
        before = torch.stack([early_before, late_before * early_total], 1).view_as(before)
        s *= 2
    return A, X, before, after


def block(q, k, v, g, beta, S, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S^T q [M, L, V] and the states behind a block of L tokens of M sequences and heads, L a multiple of C.

    q, k, g [M, L, K], v [M, L, V], beta [M, L, 1], S [M, K, V].
    """
    M, L, K = q.shape
    q, k, decay, beta = (x.reshape(M * L, -1) for x in (q, k, torch.exp(g), beta))
    A, X, before, after = tree(q, k, decay, beta, C)
    per_chunk = (
        A,
        X * beta.view(-1, 1, C),
        torch.cat([(k * before).view(-1, C, K), (q * before).view(-1, C, K)], 1),
        (k * after).view(-1, C, K).mT,
        before.view(-1, C, K)[:, -1, :, None],
        v.reshape(-1, C, v.shape[-1]),
    )
    o = []
    for A, X, reads, k_after, last, v in zip(*(x.unflatten(0, (M, -1)).unbind(1) for x in per_chunk), strict=True):
        seen = reads @ S
        delta = X @ (v - seen[:, :C])
        o.append(torch.baddbmm(seen[:, C:], A, delta))
        S = torch.baddbmm(S * last, k_after, delta)
    return torch.cat(o, 1), S


@functools.cache
def _compiled():
    return torch.compile(block, fullgraph=True, dynamic=False)


def _compiled_block(*arguments):
    """Run the compiled block; beyond 8 shapes dynamo would refuse, and shapes are few but more than that."""
    compiled = _compiled()
    with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
        return compiled(*arguments)


class _Walk:
    """Walk over some runs and heads, block by block."""

    def __init__(self, tokens, o: torch.Tensor, states: States, config: ChunkTorchConfig):
        self.tokens, self.o, self.states, self.config = tokens, o, states, config
        self.L = math.gcd(config.block_tokens, states.interval)

    def over(self, runs: Runs, heads: slice, scale: float) -> None:
        """Write o of some runs and heads, and their final and intermediate states."""
        S = self.states.take(runs, heads)
        for first in range(0, runs.longest, self.L):
            n, L = runs.running(first), self.L if self.config.compile else self.tokens_of_block(runs.longest - first)
            self.states.keep(S[:n], runs, first, heads)
            inputs = [by_head(x, runs, first, L, heads, self.o.shape[1], S.dtype).flatten(0, 1) for x in self.tokens]
            o, after = self.run(*inputs, S[:n].flatten(0, 1))
            S[:n] = after.view(S[:n].shape)
            scatter(self.o, o.mul_(scale).view(n, -1, *o.shape[1:]).transpose(1, 2), runs, first, heads)
        self.states.put(S, runs, heads)

    def tokens_of_block(self, left: int) -> int:
        """Return how many tokens to work on when `left` are left: whole chunks, as few as needed."""
        C = self.config.chunk_size
        return min(self.L, -(-left // C) * C)

    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block as configured; a compiled one in one shape, or every other would be compiled too."""
        if not self.config.compile:
            return block(*inputs, self.config.chunk_size)
        M, missing = len(inputs[0]), self.config.heads - len(inputs[0])
        with torch.inference_mode(False), torch.no_grad():
            inputs = [torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) for x in inputs]
            o, S = _compiled_block(*inputs, self.config.chunk_size)
            return o[:M].clone(), S[:M]


def _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    B, T, HV, _ = v.shape
    config = ChunkTorchConfig(*launch[:3], compile=bool(launch[3]))
    runs = runs_of(B, T, bounds_of(cu_seqlens, T))
    states, o = States(initial_state, q, v, cu_seqlens, runs, state_interval), v.new_empty(v.shape)
    walk = _Walk([flat(x) for x in (q, k, v, g, beta)], flat(o), states, config)
    for some, heads in groups(runs, HV, config.heads):
        walk.over(runs.part(some), heads, scale)
    return o, states.final if output_final_state else states.final.new_empty(0), states.kept


op = register("chunk_torch", _forward, adjoint)
