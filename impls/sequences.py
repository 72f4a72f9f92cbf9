"""Lay out the sequences of a batch, padded or packed, as runs of rows of one flat [B * T, ...] token axis."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


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

    def running(self, t: int) -> int:
        """Count the runs that have more than t tokens."""
        return sum(length > t for length in self.lengths)

    def part(self, first: int, last: int) -> "Runs":
        """Return the runs first to last - 1 of this order."""
        return Runs(self.starts[first:last], self.lengths[first:last], self.order[first:last])

    def interval_rows(self, interval: int) -> tuple[int, ...]:
        """Return, for each run, where its states go when one is kept every `interval` tokens, in the caller's order."""
        rows, total = [0] * len(self.order), 0
        for place, length in sorted(zip(self.order, self.lengths, strict=True)):
            rows[place] = total
            total += -(-length // interval)
        return tuple(rows[place] for place in self.order)


def runs_of(B: int, T: int, bounds: list[int] | None) -> Runs:
    """Return the runs of a batch [B, T], or of one row packed at `bounds` (N + 1 positions from 0 to T)."""
    if bounds is None:
        bounds = [b * T for b in range(B + 1)]
    lengths = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    return Runs(tuple(bounds[n] for n in order), tuple(lengths[n] for n in order), tuple(order))


def groups(runs: Runs, HV: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield (runs, heads) slices that cover every pair once, at most about `rows` pairs at a time."""
    together, heads = max(1, rows // HV), min(HV, rows)
    for first in range(0, len(runs.order), together):
        for head in range(0, HV, heads):
            yield slice(first, min(first + together, len(runs.order))), slice(head, min(head + heads, HV))


def flat(x: torch.Tensor) -> torch.Tensor:
    """Join the batch and token axes: [B, T, ...] -> [B * T, ...]; a view where the strides allow it."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
