"""Differentiate Kimi Delta Attention chunk by chunk in torch: the adjoint of `impls.chunk_torch`, written by hand.

The states that enter blocks of 128 tokens are recomputed and kept; then block after block, the last first, those that
enter its chunks are recomputed, their gradients walk back over them, and all that remains is done for all chunks of
the block together (`impls.tree_backward_torch`). Memory is inputs, gradients, a state for every block, and one block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from impls.activations import compute_dtype
from impls.checks import bounds_of
from impls.choice import chunk_torch_config
from impls.pages import room
from impls.schedule import Span, blocks, gather, scatter
from impls.sequences import flat, padded, runs_of
from impls.states import States
from impls.tree_backward_torch import recomputed, within_gradients

BLOCK_TOKENS = 128
"""Tokens between the states that are kept: where K = V = 128 a quarter of the inputs' memory in float32."""


def adjoint(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS, launch):
    """Return the gradients of <do, o> + <dS, S_T> for q, k, v, g, beta and the initial state (empty where None).

    Shapes and dtypes are those of the inputs; do [B, T, HV, V] and dS [N, HV, K, V] count as zero where None. launch
    is that of the forward: its chunk size is part of how the gradients round.
    """
    (B, T, HV, _), H = v.shape, q.shape[2]
    config = chunk_torch_config(tuple(launch), q, v, cu_seqlens, 0)
    runs, inputs = runs_of(B, T, bounds_of(cu_seqlens, T)), (q, k, v, g, beta)
    pairs, wide = _pairs(HV // H, config.heads), compute_dtype(v)
    leaving = States(dS, q, v, cu_seqlens, runs, 0)
    found = [room(x.shape, x.dtype, x.device) for x in inputs]
    if pairs < HV // H:  # a head of q is in several blocks: add them up, in order, in float32 at least
        found[:2] = [x.new_zeros(x.shape, dtype=wide) for x in (q, k)]
    walk = _Walk([*inputs, do], [flat(x) for x in found], initial_state, leaving, scale, config, min(pairs, HV // H))
    for chain in _chains(blocks(runs, HV, pairs, config.chunk_size, walk.slots)):
        walk.back(chain)
    found[:2] = [x.to(like.dtype) for x, like in zip(found[:2], (q, k), strict=True)]
    return *found, v.new_empty(0) if initial_state is None else leaving.final.to(initial_state.dtype)


def _pairs(ratio: int, most: int) -> int:
    """Return how many pairs of a run and a value head are worked on at a time: whole heads of q, or a part of one."""
    if ratio <= most:
        return most // ratio * ratio
    return max(n for n in range(1, most + 1) if ratio % n == 0)


def _chains(spans: Iterator[list[Span]]) -> Iterator[list[list[Span]]]:
    """Yield lists of blocks that no state enters from outside."""
    chain: list[list[Span]] = []
    for block in spans:
        if chain and block[0].first == 0:
            yield chain
            chain = []
        chain.append(block)
    if chain:
        yield chain


class _Block:
    """Hold the tokens of a block [slots * lanes, C, channels], and what its chunks are without a state."""

    def __init__(self, tokens, shape: tuple[int, int, int]):
        self.shape, self.q, self.k, self.g = shape, *(x.flatten(0, 1) for x in tokens[:2]), tokens[3].flatten(0, 1)
        self.v, self.beta = tokens[2], tokens[4]
        self.A, self.L, X, self.rows, self.k_after, self.total = (
            x.view(*shape[:2], *x.shape[1:]) for x in recomputed(self.q, self.k, self.g, self.beta.flatten(0, 1))
        )
        self.X, self.X_beta = X, X * self.beta.mT
        self.residual, self.delta = (torch.empty_like(self.v) for _ in range(2))


class _Walk:
    """Walk over chains of blocks: forward to recompute the states, backward to differentiate."""

    def __init__(self, tokens, gradients, initial, leaving: States, scale: float, config, together: int):
        self.tokens, self.gradients = [None if x is None else flat(x) for x in tokens], gradients
        self.initial, self.leaving, self.scale, self.together = initial, leaving, scale, together
        self.dtype, self.chunk = leaving.final.dtype, config.chunk_size
        self.sizes = tuple(padded(x) for x in leaving.final.shape[-2:])
        self.slots = BLOCK_TOKENS // config.chunk_size

    def back(self, chain: Sequence[list[Span]]) -> None:
        """Write the gradients of a chain of blocks."""
        kept, S = [], None
        for spans in chain:
            kept.append(S)
            block, states = self.replay(spans, S)
            S = states[-1].clone() if spans is not chain[-1] else None
        dS = None
        while kept:
            dS = self.retreat(spans, block, states, dS)
            kept.pop()
            if kept:
                spans = chain[len(kept) - 1]
                block, states = self.replay(spans, kept[-1])

    def gathered(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Return tokens of x in a block [slots, lanes, C, channels]."""
        last = spans[-1]
        shape = last.slot + last.slots, max(span.lanes for span in spans), self.chunk
        return gather(x, spans, shape, self.tokens[2].shape[1], self.dtype, None)

    def replay(self, spans: Sequence[Span], S: torch.Tensor | None) -> tuple[_Block, torch.Tensor]:
        """Return a block and the states [slots + 1, lanes, K', V'] that enter its chunks and leave the last one.

        S [lanes', K', V'] entered it, or None where it begins with the first token of its runs.
        """
        tokens = [self.gathered(x, spans) for x in self.tokens[:5]]
        slots, lanes, C, _ = tokens[0].shape
        block, states = _Block(tokens, (slots, lanes, C)), tokens[0].new_empty((slots + 1, lanes, *self.sizes))
        for span in spans:
            if span.first == 0:
                self.open(states[span.slot], span)
            elif span.slot == 0:
                states[0] = _with_lanes(S, lanes)
            for i in range(span.slot, span.slot + span.slots):
                self.advance(block, i, states[i], states[i + 1])
        return block, states

    def open(self, S: torch.Tensor, span: Span) -> None:
        """Write the initial states of a span's runs and heads into S [lanes, K', V']."""
        S.zero_()
        if self.initial is not None:
            K, V = self.initial.shape[-2:]
            whole = S[: span.lanes].unflatten(0, (len(span.runs.order), -1))
            whole[..., :K, :V] = self.initial[list(span.runs.order), span.heads].to(S.dtype)

    def advance(self, block: _Block, i: int, S: torch.Tensor, S_next: torch.Tensor) -> None:
        """Take the states [lanes, K', V'] over chunk i of a block."""
        k_before = block.rows[i, :, : self.chunk]
        residual = torch.baddbmm(block.v[i], k_before, S, alpha=-1, out=block.residual[i])
        delta = torch.bmm(block.X_beta[i], residual, out=block.delta[i])
        torch.mul(S, block.total[i].unsqueeze(-1), out=S_next).baddbmm_(block.k_after[i].mT, delta)

    def retreat(self, spans, block: _Block, states: torch.Tensor, dS: torch.Tensor | None) -> torch.Tensor:
        """Write the gradients of a block; dS left its last chunk, and the gradient that enters the first returns."""
        do = torch.zeros_like(block.v) if self.tokens[5] is None else self.gathered(self.tokens[5], spans) * self.scale
        W, y = torch.cat([do, do], 2), torch.empty_like(do)  # the first half of W follows
        base = torch.matmul(block.A.mT, do)
        dstates = torch.empty_like(states)
        for span in reversed(spans):
            stop = span.slot + span.slots
            if span.closes:
                self.close(dstates[stop], span)
            elif stop == len(states) - 1:
                dstates[stop] = _with_lanes(dS, states.shape[1])
            for i in reversed(range(span.slot, stop)):
                self.step(block, i, base[i], y[i], W[i], dstates[i + 1], dstates[i])
            if span.opens:
                n = len(span.runs.order)
                self.leaving.put(dstates[span.slot, : span.lanes].unflatten(0, (n, -1)), span.runs, span.heads)
        self.write(spans, self.token_gradients(block, states, dstates, y, W))
        return dstates[0].clone()

    def close(self, dS: torch.Tensor, span: Span) -> None:
        """Write the gradients of the states that leave a span's runs into dS [lanes, K', V']."""
        dS.zero_()
        dS[: span.lanes] = self.leaving.take(span.runs, span.heads).flatten(0, 1)

    def step(self, block: _Block, i: int, base, y, W, dS_next, dS) -> None:
        """Take dS [lanes, K', V'] back over chunk i of a block, and find y and -dr, the first half of W."""
        d_delta = torch.baddbmm(base, block.k_after[i], dS_next)
        torch.bmm(block.X[i].mT, d_delta, out=y)
        torch.mul(y, -block.beta[i], out=W[:, : self.chunk])
        torch.mul(dS_next, block.total[i].unsqueeze(-1), out=dS).baddbmm_(block.rows[i].mT, W)

    def token_gradients(self, block: _Block, states, dstates, y, W) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k, v, g, beta [slots, lanes, C, channels]."""
        C, W, delta = self.chunk, W.flatten(0, 1), block.delta.flatten(0, 1)
        S, dS_next = states[:-1].flatten(0, 1), dstates[1:].flatten(0, 1)
        dL, dA = torch.bmm(W, delta.mT).chunk(2, 1)
        d_rows, d_k_after = torch.bmm(W, S.mT), torch.bmm(delta, dS_next.mT)
        to_total = (S * dS_next).sum(-1) * block.total.flatten(0, 1)
        dq, dk, dg = within_gradients(block.q, block.k, block.g, dA, dL, d_rows, d_k_after, to_total)
        error = block.residual.flatten(0, 1) - torch.bmm(block.L.flatten(0, 1), delta)
        dbeta = (y.flatten(0, 1) * error).sum(-1, keepdim=True)
        return tuple(x.view(*block.shape, -1) for x in (dq, dk, -W[:, :C], dg, dbeta))

    def write(self, spans: Sequence[Span], found: Sequence[torch.Tensor]) -> None:
        """Store the gradients of a block's tokens, those of q and k summed over the value heads that share them."""
        for whole, x in zip(self.gradients[2:], found[2:], strict=True):
            scatter(whole if whole.ndim == 3 else whole.unsqueeze(-1), x, spans)
        r, ratio = self.together, self.gradients[2].shape[1] // self.gradients[0].shape[1]
        shared = [replace(x, heads=slice(x.heads.start // ratio, -(-x.heads.stop // ratio))) for x in spans]
        for whole, x in zip(self.gradients[:2], found[:2], strict=True):
            x = x[:, : x.shape[1] // r * r].unflatten(1, (-1, r)).sum(2) if r > 1 else x
            scatter(whole, x, shared, add=r < ratio)


def _with_lanes(S: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return states with so many lanes, zero where they are more."""
    return F.pad(S[:lanes], (0, 0, 0, 0, 0, max(0, lanes - len(S))))
