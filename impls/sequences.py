"""Lay out the sequences of a batch, padded or packed, as runs of rows of one flat [B * T, ...] token axis.

Implementations work on blocks: a few tokens of a few runs and heads, copied out of the flat tensors (whatever their
strides and dtype) and padded with null tokens (beta = 0, g = 0) and null channels, so that memory stays proportional
to the inputs, and every product has sizes whose bits depend on nothing but its own operands: on x86 with MKL, a batched
product [R, M, K] @ [R, K, V] gives the same bits for every batch count and order where K and V are multiples of 16
(0 of 40,000 random cases differ, float32 and float64, one and two threads), but not for other sizes (5% differ).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

CHANNEL_MULTIPLE = 16


@dataclass(frozen=True)
class Runs:
    """List N runs of tokens, the longest first, so that those still running at any step are a prefix.

    starts, lengths: first row and number of rows of each run. order: where each run stood in the caller's numbering.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Return the length of the longest run, 0 where there are none."""
        return self.lengths[0] if self.lengths else 0

    @cached_property
    def adjacent(self) -> bool:
        """Tell whether the runs are equally long and follow one another, as in a padded batch."""
        step = self.longest
        return all(start == self.starts[0] + i * step for i, start in enumerate(self.starts)) and (
            not self.lengths or self.lengths[-1] == step
        )

    def running(self, t: int) -> int:
        """Count the runs that have more than t tokens."""
        return sum(length > t for length in self.lengths)

    def part(self, runs: slice) -> "Runs":
        """Return some of the runs, in this order."""
        return Runs(self.starts[runs], self.lengths[runs], self.order[runs])


def runs_of(B: int, T: int, bounds: list[int] | None) -> Runs:
    """Return the runs of a batch [B, T], or of one row packed at `bounds` (N + 1 positions from 0 to T)."""
    if bounds is None:
        bounds = [b * T for b in range(B + 1)]
    lengths = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    return Runs(tuple(bounds[n] for n in order), tuple(lengths[n] for n in order), tuple(order))


def groups(runs: Runs, HV: int, pairs: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices (runs, heads) that cover every pair once, at most `pairs` (at least 1) of them at a time."""
    together, heads = max(1, pairs // HV), min(HV, pairs)
    for first in range(0, len(runs.order), together):
        for head in range(0, HV, heads):
            yield slice(first, min(first + together, len(runs.order))), slice(head, min(head + heads, HV))


def padded(channels: int) -> int:
    """Return the number of channels rounded up to a multiple of 16."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def flat(x: torch.Tensor) -> torch.Tensor:
    """Join the batch and token axes: [B, T, ...] -> [B * T, ...]; a view where the strides allow it."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _padded_tokens(x: torch.Tensor, runs: Runs, first: int, L: int) -> torch.Tensor:
    """Return a view [N, at most L, heads, channels] of tokens first to first + L - 1 of adjacent runs."""
    n, T = len(runs.order), runs.longest
    if n * T != len(x):
        x = x[runs.starts[0] : runs.starts[0] + n * T]
    x = x.view(n, T, x.shape[1], x.shape[2])
    return x if L == T else x[:, first : first + L]


def _pieces(
    x: torch.Tensor, block: torch.Tensor, runs: Runs, first: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield matching views [n, tokens, heads, channels] of x and of block, token `first` of each run onwards."""
    n, L = runs.running(first), block.shape[1]
    if n and runs.adjacent:
        tokens = _padded_tokens(x, runs, first, L)
        yield tokens, block[:n, : tokens.shape[1]]
        return
    for i in range(n):
        begin, end = runs.starts[i] + first, runs.starts[i] + min(first + L, runs.lengths[i])
        yield x[begin:end].unsqueeze(0), block[i : i + 1, : end - begin]


def _gather(block, x, runs: Runs, first: int, heads: slice, HV: int) -> None:
    ratio, columns = HV // x.shape[1], heads
    if ratio > 1:
        columns = torch.arange(heads.start, heads.stop, device=x.device) // ratio
    for tokens, place in _pieces(x, block[..., : x.shape[-1]], runs, first):
        place.copy_(tokens[:, :, columns])


def _channels(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return x [B * T, heads, channels] and the channels of its blocks; one number per head is never padded."""
    return (x.unsqueeze(-1), 1) if x.ndim == 2 else (x, padded(x.shape[-1]))


def by_token(x: torch.Tensor, runs: Runs, first: int, L: int, heads: slice, HV: int, dtype) -> torch.Tensor:
    """Return a block [L, n, heads, channels'] of tokens first to first + L - 1 of the n runs that reach token first.

    x [B * T, H or HV, channels] or [B * T, HV]; where it has fewer heads than HV, value head h reads head
    h // (HV // H). Missing tokens and channels are zero.
    """
    x, channels = _channels(x)
    if runs.adjacent and x.shape[1:] == (HV, channels) and heads == slice(0, HV) and first + L <= runs.longest:
        tokens = _padded_tokens(x, runs, first, L).transpose(0, 1)  # nothing to pad: one copy, 5 us instead of 12
        return tokens.to(dtype, copy=True, memory_format=torch.contiguous_format)
    block = x.new_zeros((L, runs.running(first), heads.stop - heads.start, channels), dtype=dtype)
    _gather(block.transpose(0, 1), x, runs, first, heads, HV)
    return block


def scatter(x: torch.Tensor, block: torch.Tensor, runs: Runs, first: int, heads: slice) -> None:
    """Copy block [n, L, heads, channels'] into x [B * T, HV, channels], from token first of every run onwards."""
    for tokens, place in _pieces(x, block[..., : x.shape[-1]], runs, first):
        tokens[:, :, heads] = place
