"""Bring the tokens of a block in by one compiled function, whatever their strides, dtypes, heads and lengths are.

`schedule.gather` copies tensor by tensor and sequence by sequence: 22 us a call where one thread copies 1 MiB in 60,
and what is small is copied by one thread. Here every row of a block is read from where its lane begins, plus so many
steps. A tensor comes in as overlapping rows [any, channels] with strides (1, 1), so that the number of a row is its
place in memory, and no stride or length is compiled in.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from impls.activations import l2norm
from impls.compiler_cpu import Compiled, compiled
from impls.schedule import Span
from impls.sequences import padded

LOOKED_UP = 16
"""Blocks whose lanes are looked up at a time: between blocks the caches hold tokens, and what takes 17 us a block in a
row takes 110."""


class Fetch:
    """Bring in blocks [slots * lanes, C, channels'] of some tensors, as `schedule.gather` does without activations.

    tensors: q, k, v or g [B * T, H or HV, channels], or beta [B * T, HV]. dtype: of what is brought in, but of tensors
    at `kept`, which keep theirs. normed: the places of those that `l2norm` divides. overwrites: a call overwrites what
    the last one returned.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], HV: int, shape: tuple[int, int, int], dtype, kept=(), normed=(),
        overwrites: bool = False,
    ):  # fmt: skip
        slots, lanes, C = self.shape = shape
        widths = [padded(x.shape[2]) if x.ndim == 3 else 1 for x in tensors]
        tensors = [_together(x if x.ndim == 3 else x.unsqueeze(-1)) for x in tensors]
        strides = [(*x.stride()[:2], HV // x.shape[1]) for x in tensors]
        self.strides = sorted(set(strides))
        self.begins = [self.strides.index(x) for x in strides]
        self.memory = [*(torch.tensor(x.stride(0)) for x in tensors), *map(_rows, tensors)]
        dtypes = [x.dtype if i in kept else dtype for i, x in enumerate(tensors)]
        kinds = [(x.shape[2], widths[i], x.dtype, dtypes[i]) for i, x in enumerate(tensors)]
        fetched = _compiled(tuple(kinds), normed, slots * lanes, C, torch.get_num_threads())
        self.fetched = fetched.with_memory() if overwrites else fetched

    def places(self, blocks: Iterable[list[Span]]) -> Iterator[tuple[list[Span], tuple[torch.Tensor, ...]]]:
        """Yield every block with what a call takes for it."""
        blocks = iter(blocks)
        while some := list(islice(blocks, LOOKED_UP)):
            tokens, counts, heads = _lanes(some, self.shape)
            begins = (tokens * t + heads // n * h for t, h, n in self.strides)
            yield from zip(some, zip(*map(torch.from_numpy, (counts, *begins)), strict=True), strict=True)

    def __call__(self, place: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Return the tokens of a block [slots * lanes, C, channels'], zero where there are none."""
        counts, *begins = place
        return self.fetched(counts, *(begins[i] for i in self.begins), *self.memory)


def _lanes(blocks: Sequence[Sequence[Span]], shape: tuple[int, int, int]) -> np.ndarray:
    """Return the first token, the number of tokens and the value head of the lanes of blocks: [3, n, slots * lanes].

    Lanes that nobody takes have no token; the first token and the head then are 0.
    """
    slots, lanes, C = shape
    found = np.zeros((3, len(blocks), slots, lanes), dtype=np.int64)
    for i, block in enumerate(blocks):
        for span in block:
            heads = np.arange(span.heads.start, span.heads.stop)
            taken = found[:, i, span.slot : span.slot + span.slots, : span.lanes]
            first, count, head = taken.reshape(3, span.slots, -1, len(heads))
            passed = span.first + C * np.arange(span.slots)[:, None, None]
            first[:] = np.array(span.runs.starts)[:, None] + passed
            count[:] = np.array(span.runs.lengths)[:, None] - passed
            head[:] = heads
    return found.reshape(3, len(blocks), slots * lanes)


def _together(x: torch.Tensor) -> torch.Tensor:
    """Return x, copied where its channels lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return all memory of x [B * T, heads, channels] as overlapping rows [any, channels]."""
    channels, extent = x.shape[-1], 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent - channels + 1, channels), (1, 1))


@functools.lru_cache(maxsize=256)
def _compiled(
    kinds: tuple[tuple[int, int, torch.dtype, torch.dtype], ...], normed: tuple[int, ...], lanes: int, C: int,
    threads: int,
) -> Compiled:
    """Return a function of the lanes' numbers of tokens, and the lanes' places [lanes], steps and rows of tensors.

    kinds: channels, channels', dtype, and the dtype to return. normed: the places of tensors whose rows are normed.
    It returns [lanes, C, channels']; compiled for so many threads.
    """
    n = len(kinds)

    def fetched(counts, *of_tensors):
        passed = torch.arange(C)
        present, found = passed < counts.unsqueeze(-1), []
        passed = torch.where(present, passed, 0)
        for i, (channels, width, _, dtype) in enumerate(kinds):
            begin, step, x = of_tensors[i::n]
            x = x[begin.unsqueeze(-1) + passed * step]
            x = torch.where(present.unsqueeze(-1), l2norm(x, dtype) if i in normed else x.to(dtype), 0.0)
            found.append(F.pad(x, (0, width - channels)))
        return found

    inputs = [torch.zeros(lanes, dtype=torch.int64) for _ in range(n + 1)]
    inputs += [torch.zeros((), dtype=torch.int64) for _ in range(n)]
    inputs += [torch.zeros(2 * m, dtype=kind).as_strided((m + 1, m), (1, 1)) for m, _, kind, *_ in kinds]
    return compiled(fetched, inputs, rows=True)
