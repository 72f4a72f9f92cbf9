"""Lay out the chunks of a batch in blocks that are worked on at once, and copy tokens into blocks and out of them.

A slot of a block is one chunk of some runs and heads, its lanes: [slots, lanes, C, channels]. What needs no state is
done for all slots of a block together, whatever they belong to; so the chunks of many short sequences fill a block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from impls.sequences import Runs, groups, padded

Activation = Callable[[torch.Tensor, slice], torch.Tensor]
"""Turn raw rows [n, tokens, heads, channels] of some value heads into what the recurrence takes, in the same shape."""


@dataclass(frozen=True)
class Span:
    """Consecutive chunks of some runs and heads, in slots `slot` and following. No run ends before the last of them."""

    runs: Runs
    heads: slice
    first: int
    """The first token, in every run."""
    slot: int
    slots: int
    chunk: int
    """C, the tokens of a slot."""
    opens: bool
    """Whether other runs and heads come before."""
    closes: bool
    """Whether other runs and heads follow: a run of these has ended."""

    @property
    def lanes(self) -> int:
        """Return how many lanes are taken: runs times heads."""
        return len(self.runs.order) * (self.heads.stop - self.heads.start)

    def together(self) -> Iterator[tuple[slice, int]]:
        """Yield runs whose tokens can be copied at once, and how many tokens each has here, at most 0 at the end."""
        runs = self.runs
        count = len(runs.order) if runs.adjacent else 1
        for i in range(0, len(runs.order), count):
            yield slice(i, i + count), min(self.slots * self.chunk, runs.lengths[i] - self.first)

    def places(self, out: torch.Tensor) -> torch.Tensor:
        """Return its part of a block, [slots, runs, heads, C, channels]."""
        n = len(self.runs.order)
        return out[self.slot : self.slot + self.slots, : self.lanes].view(self.slots, n, -1, *out.shape[2:])


def blocks(runs: Runs, HV: int, pairs: int, C: int, slots: int) -> Iterator[list[Span]]:
    """Yield blocks of at most so many slots that cover every chunk of every run and head once, in order.

    A slot holds at most `pairs` of a run and a head; runs without tokens are left out.
    """
    block, taken = [], 0
    for part, heads, first, last in _stretches(runs, HV, pairs, C):
        at = first
        while at < last:
            count = min((last - at) // C, slots - taken)
            block.append(Span(part, heads, at, taken, count, C, at == first, at + count * C == last))
            at, taken = at + count * C, taken + count
            if taken == slots:
                yield block
                block, taken = [], 0
    if block:
        yield block


def _stretches(runs: Runs, HV: int, pairs: int, C: int) -> Iterator[tuple[Runs, slice, int, int]]:
    """Yield runs and heads with the tokens, whole chunks of them, over which all of these runs have chunks."""
    for some, heads in groups(runs, HV, pairs):
        part, first = runs.part(some), 0
        while n := part.running(first):
            last = -(-part.lengths[n - 1] // C) * C
            yield part.part(slice(0, n)), heads, first, last
            first = last


def gather(
    x: torch.Tensor, block: Sequence[Span], shape: tuple[int, int, int], HV: int, dtype, activate: Activation | None
) -> torch.Tensor:
    """Return the tokens of a block [slots, lanes, C, channels'], activated, zero where there are none.

    x [B * T, H or HV, channels] or [B * T, HV]; where it has fewer heads than HV, value head h reads head
    h // (HV // H). shape: slots, lanes and C.
    """
    x, channels = (x.unsqueeze(-1), 1) if x.ndim == 2 else (x, padded(x.shape[-1]))
    out = x.new_empty((*shape, channels), dtype=dtype)
    if channels > x.shape[-1]:
        out.zero_()
    else:
        _clear_missing(out, block)
    for span in block:
        columns = _columns(span.heads, HV // x.shape[1], x.device)
        for rows, place in _pieces(x, out[..., : x.shape[-1]], span):
            rows = rows[:, :, columns]
            rows = rows if activate is None else activate(rows, span.heads)
            place.copy_(_chunked(rows, shape[2]))
    return out


def scatter(x: torch.Tensor, out: torch.Tensor, block: Sequence[Span], add: bool = False) -> None:
    """Copy the tokens of a block [slots, lanes, C, channels'] into x [B * T, HV, channels], or add them to it."""
    for span in block:
        for rows, place in _pieces(x, out[..., : x.shape[-1]], span):
            rows = _chunked(rows[:, :, span.heads], out.shape[2])
            rows.add_(place) if add else rows.copy_(place)


def _clear_missing(out: torch.Tensor, block: Sequence[Span]) -> None:
    """Zero the tokens, lanes and slots of a block that no run has."""
    C, end = out.shape[2], block[-1].slot + block[-1].slots
    if end < len(out):
        out[end:].zero_()
    for span in block:
        if span.lanes < out.shape[1]:
            out[span.slot : span.slot + span.slots, span.lanes :].zero_()
        for runs, tokens in span.together():
            if tokens < span.slots * C:
                places, (whole, rest) = span.places(out), divmod(max(tokens, 0), C)
                places[whole, runs, :, rest:].zero_()
                places[whole + 1 :, runs].zero_()


def _columns(heads: slice, ratio: int, device) -> slice | torch.Tensor:
    return heads if ratio == 1 else torch.arange(heads.start, heads.stop, device=device) // ratio


def _chunked(rows: torch.Tensor, C: int) -> torch.Tensor:
    """Return rows [n, tokens, heads, channels] as [slots, n, heads, C or tokens, channels]."""
    n, tokens, heads, channels = rows.shape
    C = min(C, tokens)
    return rows.view(n, tokens // C, C, heads, channels).permute(1, 0, 3, 2, 4)


def _pieces(x: torch.Tensor, out: torch.Tensor, span: Span) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows [n, tokens, all heads, channels] of x, whole chunks or part of one, and their places in a block."""
    C, first = out.shape[2], span.first
    for runs, tokens in span.together():
        if tokens <= 0:
            return
        T, begin, whole = span.runs.lengths[runs.start], span.runs.starts[runs.start], tokens // C
        count, places = runs.stop - runs.start, span.places(out)[:, runs]
        rows = x[begin : begin + count * T].view(count, T, *x.shape[1:])[:, first : first + tokens]
        if whole:
            yield rows[:, : whole * C], places[:whole]
        if tokens > whole * C:
            yield rows[:, whole * C :], places[whole : whole + 1, :, :, : tokens - whole * C]
