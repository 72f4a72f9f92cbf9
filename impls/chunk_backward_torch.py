"""Differentiate Kimi Delta Attention chunk by chunk in torch: the adjoint of `impls.chunk_torch`, written by hand.

The states that enter blocks of 128 tokens are recomputed and kept; then block after block, the last first, those that
enter its chunks are recomputed, their gradients walk back over them, and all that remains is done for all chunks of
the block together (`impls.tree_backward_torch`). Memory is inputs, gradients, a state for every block, and one block.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from impls.activations import compute_dtype
from impls.checks import bounds_of
from impls.choice import chunk_torch_config
from impls.compiler_cpu import TILES, can_compile, compiled
from impls.fetch_torch import Fetch
from impls.pages import room
from impls.schedule import Span, blocks, gather, scatter
from impls.sequences import flat, padded, runs_of
from impls.states import States
from impls.threads import at_most
from impls.tree_backward_torch import recomputed, within_gradients

BLOCK_TOKENS = 128
"""Tokens between the states that are kept: where K = V = 128 a quarter of the inputs' memory in float32."""
SHORT_CHAIN = 4
"""As many blocks in a row wait for the way back as they are; of more all but the last are recomputed."""


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
    with at_most(config.threads):
        inputs, gradients = [*inputs, do], [flat(x) for x in found]
        walk = _Walk(inputs, gradients, initial_state, leaving, scale, config, min(pairs, HV // H))
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


@dataclass(frozen=True)
class _Functions:
    """Hold what works on chunks, compiled or not; `advance` and `retreat` write into their last arguments."""

    recomputed: Callable
    advance: Callable
    retreat: Callable
    value_gradients: Callable
    within_gradients: Callable


def advance(X_beta, k_before, k_after, total, v, residual, delta, S, S_next) -> None:
    """Take the states S [lanes, K, V] over one chunk: write v - (k before) S, delta [lanes, C, V] and the next states.

    X_beta: X diag(beta) [lanes, C, C]; k_before, k_after [lanes, C, K]; total [lanes, K]; v [lanes, C, V].
    """
    torch.sub(v, torch.bmm(k_before, S), out=residual)
    torch.bmm(X_beta, residual, out=delta)
    torch.mul(S, total.unsqueeze(-1), out=S_next).baddbmm_(k_after.mT, delta)


def retreat(
    X_turned, beta, rows, k_after, total, of_A, delta, S, y, W, d_rows, d_k_after, to_total, dS_next, dS, dense=False
) -> None:
    """Take the gradients dS_next [lanes, K, V] of states back over one chunk, and write dS of those that enter, S.

    X_turned: X^T [lanes, C, C]; beta [lanes, C, 1]; rows [lanes, 2C, K]; of_A: A^T do' [lanes, C, V]; delta
    [lanes, C, V]; W [lanes, 2C, V] holds do' in its first half. Writes y [lanes, C, V], the second half of W, and
    d_rows [lanes, 2C, K], d_k_after [lanes, C, K] and to_total [lanes, K] as `within_gradients` takes them: here, where
    both states are in the cache. dense: multiply by copies of what is turned, as the compiler's template does; with
    W's instead of that of S it takes 353 us instead of 395, with delta's instead of that of dS_next no less.
    """
    d_delta = torch.baddbmm(of_A, k_after, dS_next)
    torch.bmm(X_turned, d_delta, out=y)
    torch.mul(y, -beta, out=W[:, y.shape[1] :])
    torch.mul(dS_next, total.unsqueeze(-1), out=dS).baddbmm_(rows.mT, W)
    if dense:
        d_rows.copy_(torch.bmm(S, W.mT.contiguous()).mT)
        torch.bmm(delta, dS_next.mT.contiguous(), out=d_k_after)
    else:
        torch.bmm(W, S.mT, out=d_rows)
        torch.bmm(delta, dS_next.mT, out=d_k_after)
    torch.mul((S * dS_next).sum(-1), total, out=to_total)


def value_gradients(W, y, residual, delta, L) -> tuple[torch.Tensor, ...]:
    """Return d_AL [R, 2C, C] as `within_gradients` takes it, dv [R, C, V] and dbeta [R, C, 1] of R chunks.

    W [R, 2C, V]; y, residual, delta [R, C, V]; L [R, C, C].
    """
    dbeta = (y * (residual - torch.bmm(L, delta))).sum(-1, keepdim=True)
    return torch.bmm(W, delta.mT), -W[:, delta.shape[1] :], dbeta


OVERWRITING = "advance", "retreat", "value_gradients", "within_gradients"
"""Whose results are read before the next call; tokens, and what was recomputed, are held for several blocks."""
_EAGER = _Functions(recomputed, advance, retreat, value_gradients, within_gradients)


@functools.lru_cache(maxsize=256)
def _compiled(slots: int, lanes: int, C: int, K: int, V: int, dtype: torch.dtype, threads: int) -> _Functions:
    """Return them for blocks of this shape, compiled for so many threads."""

    def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    R, tiles = slots * lanes, TILES if dtype == torch.float32 else None
    per_token = [(R, C, K)] * 3
    rows, square, state, values = (lanes, 2 * C, K), (lanes, C, C), (lanes, K, V), (lanes, C, V)
    decayed = (lanes, C, K), (lanes, K)
    of_advance = zeros(square, *decayed, *[values] * 3, *[state] * 2)
    of_advance.insert(1, zeros(rows)[0][:, C:])
    of_retreat = zeros(square, (lanes, C, 1), rows, *decayed, *[values] * 2, state, values, (lanes, 2 * C, V))
    of_retreat += zeros(rows, *decayed, *[state] * 2)
    of_values = zeros((R, 2 * C, V), *[(R, C, V)] * 3, (R, C, C))
    of_within = zeros(*per_token, (R, 2 * C, C), (R, 2 * C, K), (R, C, K), (R, K))
    return _Functions(
        compiled(recomputed, zeros(*per_token, (R, C, 1))),
        compiled(advance, of_advance, tiles),
        compiled(functools.partial(retreat, dense=True), of_retreat, tiles),
        compiled(value_gradients, of_values),
        compiled(within_gradients, of_within),
    )


class _Block:
    """Hold the tokens of a block [slots * lanes, C, channels], and what its chunks are without a state."""

    def __init__(self, tokens, shape: tuple[int, int, int], recomputed: Callable):
        self.shape, (self.q, self.k, self.g) = shape, (tokens[i].flatten(0, 1) for i in (0, 1, 3))
        self.v, self.beta = tokens[2], tokens[4]
        self.A, self.L, X, self.rows, self.k_after, self.total = (
            x.view(*shape[:2], *x.shape[1:]) for x in recomputed(self.q, self.k, self.g, self.beta.flatten(0, 1))
        )
        self.X_turned, self.X_beta, self.k_before = X.mT.contiguous(), X * self.beta.mT, self.rows[:, :, shape[2] :]
        self.residual, self.delta = (torch.empty_like(self.v) for _ in range(2))


class _Walk:
    """Walk over chains of blocks: forward to recompute the states, backward to differentiate."""

    def __init__(self, tokens, gradients, initial, leaving: States, scale: float, config, together: int):
        self.tokens, self.gradients = [None if x is None else flat(x) for x in tokens], gradients
        self.initial, self.leaving, self.scale, self.together = initial, leaving, scale, together
        self.dtype, self.chunk = leaving.final.dtype, config.chunk_size
        self.sizes = tuple(padded(x) for x in leaving.final.shape[-2:])
        self.slots, self.lanes, self.functions = BLOCK_TOKENS // config.chunk_size, None, _EAGER
        self.fetch = None
        if config.compile and len(gradients[0]) and can_compile():
            self.lanes = config.heads
            shape = self.slots, self.lanes, self.chunk
            found = _compiled(*shape, *self.sizes, self.dtype, torch.get_num_threads())
            self.functions = replace(found, **{name: getattr(found, name).with_memory() for name in OVERWRITING})
            self.fetch = Fetch(self.tokens[:5], self.tokens[2].shape[1], shape, self.dtype)

    def back(self, chain: Sequence[list[Span]]) -> None:
        """Write the gradients of a chain of blocks."""
        kept, dS = [None], None
        recent = collections.deque(maxlen=SHORT_CHAIN if len(chain) <= SHORT_CHAIN else 1)
        for spans in chain:
            recent.append(self.replay(spans, kept[-1]))
            kept.append(recent[-1][1][-1].clone())
        kept.pop()
        for spans in reversed(chain):
            S = kept.pop()
            dS = self.retreat(spans, *(recent.pop() if recent else self.replay(spans, S)), dS)

    def gathered(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Return tokens of x in a block [slots, lanes, C, channels]."""
        slots, lanes = spans[-1].slot + spans[-1].slots, max(span.lanes for span in spans)
        shape = (self.slots, self.lanes, self.chunk) if self.lanes else (slots, lanes, self.chunk)
        return gather(x, spans, shape, self.tokens[2].shape[1], self.dtype, None)

    def replay(self, spans: Sequence[Span], S: torch.Tensor | None) -> tuple[_Block, torch.Tensor]:
        """Return a block and the states [slots + 1, lanes, K', V'] that enter its chunks and leave the last one.

        S [lanes', K', V'] entered it, or None where it begins with the first token of its runs.
        """
        if self.fetch:
            [(_, place)] = self.fetch.places([spans])
            tokens = [x.unflatten(0, (self.slots, self.lanes)) for x in self.fetch(place)]
        else:
            tokens = [self.gathered(x, spans) for x in self.tokens[:5]]
        slots, lanes, C, _ = tokens[0].shape
        states = tokens[0].new_empty((slots + 1, lanes, *self.sizes))
        block = _Block(tokens, (slots, lanes, C), self.functions.recomputed)
        of_chunk = block.X_beta, block.k_before, block.k_after, block.total, block.v, block.residual, block.delta
        parts = list(zip(*(x.unbind() for x in of_chunk), strict=True))
        for span in spans:
            if span.first == 0:
                self.open(states[span.slot], span)
            elif span.slot == 0:
                states[0] = _with_lanes(S, lanes)
            for i in range(span.slot, span.slot + span.slots):
                self.functions.advance(*parts[i], states[i], states[i + 1])
        return block, states

    def open(self, S: torch.Tensor, span: Span) -> None:
        """Write the initial states of a span's runs and heads into S [lanes, K', V']."""
        S.zero_()
        if self.initial is not None:
            K, V = self.initial.shape[-2:]
            whole = S[: span.lanes].unflatten(0, (len(span.runs.order), -1))
            whole[..., :K, :V] = self.initial[list(span.runs.order), span.heads].to(S.dtype)

    def retreat(self, spans, block: _Block, states: torch.Tensor, dS: torch.Tensor | None) -> torch.Tensor:
        """Write the gradients of a block; dS left its last chunk, and the gradient that enters the first returns."""
        do = torch.zeros_like(block.v) if self.tokens[5] is None else self.gathered(self.tokens[5], spans) * self.scale
        W = torch.cat([do, do], 2)  # the second half follows
        y, *d_block = (torch.empty_like(x) for x in (block.v, block.rows, block.k_after, block.total))
        of_chunk = block.X_turned, block.beta, block.rows, block.k_after, block.total, torch.matmul(block.A.mT, do)
        parts = [x.unbind() for x in (*of_chunk, block.delta, states[:-1], y, W, *d_block)]
        parts = list(zip(*parts, strict=True))
        dS = None if dS is None else _with_lanes(dS, states.shape[1])
        for span in reversed(spans):
            stop = span.slot + span.slots
            if span.closes:
                dS = self.closed(span, states[0])
            for i in reversed(range(span.slot, stop)):
                entering = torch.empty_like(dS)
                self.functions.retreat(*parts[i], dS, entering)
                dS = entering
            if span.opens:
                n = len(span.runs.order)
                self.leaving.put(dS[: span.lanes].unflatten(0, (n, -1)), span.runs, span.heads)
        self.write(spans, self.token_gradients(block, y, W, *d_block))
        return dS

    def closed(self, span: Span, like: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the states that leave a span's runs, [lanes, K', V']."""
        dS = torch.zeros_like(like)
        dS[: span.lanes] = self.leaving.take(span.runs, span.heads).flatten(0, 1)
        return dS

    def token_gradients(self, block: _Block, y, W, d_rows, d_k_after, to_total) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k, v, g, beta [slots, lanes, C, channels]."""
        per_chunk = (x.flatten(0, 1) for x in (W, y, block.residual, block.delta, block.L))
        d_AL, dv, dbeta = self.functions.value_gradients(*per_chunk)
        found = (x.flatten(0, 1) for x in (d_rows, d_k_after, to_total))
        dq, dk, dg = self.functions.within_gradients(block.q, block.k, block.g, d_AL, *found)
        return tuple(x.view(*block.shape, -1) for x in (dq, dk, dv, dg, dbeta))

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
    return S if len(S) == lanes else F.pad(S[:lanes], (0, 0, 0, 0, 0, max(0, lanes - len(S))))
