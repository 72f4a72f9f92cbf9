"""What a model remembers of its sequences: explicit, preallocated, forked, cut back and kept in files.

A KDA layer keeps one state and the last inputs of its convolutions, whatever the length; an MLA layer one latent per
token. States and inputs change as a whole, in one assignment at the end of a step: who interrupts a step finds the
cache as it was before. The latents of tokens beyond a sequence's length are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_linear.config import KDA, MLA, KimiConfig


class CacheError(ValueError):
    """A cache that does not fit what is asked of it; it is unchanged."""


@dataclass(frozen=True)
class Live:
    """What changes with every token: per KDA layer the states [B, H, K, K] and inputs [B, W - 1, 3 H K]."""

    states: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]
    """Tokens seen, per sequence."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all tensors, states first."""
        return (*self.states, *self.inputs)

    def mapped(self, function) -> "Live":
        """Return the same with a function applied to every tensor."""
        return Live(tuple(map(function, self.states)), tuple(map(function, self.inputs)), self.lengths)


class Cache:
    """Hold B sequences of at most `capacity` tokens; made by `KimiLinear.cache`."""

    def __init__(
        self,
        config: KimiConfig,
        batch: int = 1,
        capacity: int = 2048,
        *,
        boundary: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """Allocate an empty cache.

        boundary: keep the states at every multiple of so many tokens, to `truncate` to; None for none. dtype: the
        model's; states are float32 (float64 in a model of float64). Raises CacheError for sizes that hold nothing.
        """
        if batch < 1 or capacity < 1 or (boundary is not None and boundary < 1):
            raise CacheError(f"batch, capacity and boundary must be at least 1, got {batch}, {capacity} and {boundary}")
        self.config, self.batch, self.capacity, self.boundary = config, batch, capacity, boundary
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # cuda is cuda:0
        H, K, kda = config.kda_heads, config.kda_head_dim, config.count(KDA)
        wide = torch.promote_types(dtype, torch.float32)
        zeros = self._zeros
        self.live = Live(
            tuple(zeros(H, K, K, dtype=wide) for _ in range(kda)),
            tuple(zeros(config.conv_size - 1, 3 * config.kda_dim) for _ in range(kda)),
            (0,) * batch,
        )
        self.latents = [zeros(capacity, config.latent_dim) for _ in range(config.count(MLA))]
        self.kept: list[dict[int, Live]] = [{} for _ in range(batch)]
        """Per sequence: the length at a boundary, and what was live there, of one sequence."""

    @torch.inference_mode(False)  # latents are written in place later, perhaps outside of it
    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(self.batch, *shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return how many tokens each sequence has."""
        return self.live.lengths

    @property
    def boundaries(self) -> tuple[tuple[int, ...], ...]:
        """Return, per sequence, the lengths to which it can be truncated, beside 0 and its own."""
        return tuple(tuple(sorted(kept)) for kept in self.kept)

    def bytes(self) -> int:
        """Return the bytes of states, inputs and latents; states kept at boundaries are counted by `kept_bytes`."""
        return sum(x.nbytes for x in (*self.live.tensors(), *self.latents))

    def kept_bytes(self) -> int:
        """Return the bytes of what is kept at boundaries."""
        return sum(x.nbytes for kept in self.kept for live in kept.values() for x in live.tensors())

    def check_room(self, tokens: Sequence[int]) -> None:
        """Raise CacheError where so many more tokens per sequence do not fit."""
        for row, (length, more) in enumerate(zip(self.lengths, tokens, strict=True)):
            if length + more > self.capacity:
                raise CacheError(
                    f"the cache holds {self.capacity} tokens per sequence: sequence {row} has {length} and gets {more}"
                )

    def advance(self, live: Live) -> None:
        """Go on to what is live after a step, and keep it where a sequence has reached a boundary."""
        for row, (before, after) in enumerate(zip(self.lengths, live.lengths, strict=True)):
            if self.boundary and after != before and after % self.boundary == 0:
                own = live.mapped(lambda x, row=row: x[row : row + 1].clone())
                self.kept[row][after] = Live(own.states, own.inputs, (after,))
        self.live = live

    @torch.inference_mode(False)
    def fork(self, rows: Sequence[int] | None = None) -> "Cache":
        """Return a cache of its own with the sequences `rows`, which may repeat; all of them where None.

        IndexError for a row that is not there.
        """
        rows = list(range(self.batch)) if rows is None else list(rows)
        if not rows or not all(0 <= row < self.batch for row in rows):
            raise IndexError(f"rows must be one or more of 0 to {self.batch - 1}, got {rows}")
        forked = object.__new__(Cache)
        forked.config, forked.capacity, forked.boundary = self.config, self.capacity, self.boundary
        forked.dtype, forked.device, forked.batch = self.dtype, self.device, len(rows)
        live = self.live.mapped(lambda x: x[rows])
        forked.live = Live(live.states, live.inputs, tuple(self.lengths[row] for row in rows))
        forked.latents = [x[rows] for x in self.latents]
        forked.kept = [dict(self.kept[row]) for row in rows]
        return forked

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of every sequence: 0, or a boundary that each has kept.

        A state cannot be taken back token by token: any length will do only where all layers are MLA. CacheError, with
        the lengths there are, for any other.
        """
        found = [self._at(row, length) for row in range(self.batch)]
        join = [torch.cat(x) for x in zip(*(live.tensors() for live in found), strict=True)]
        half = len(self.live.states)
        for kept in self.kept:
            for beyond in [x for x in kept if x > length]:
                del kept[beyond]
        self.live = Live(tuple(join[:half]), tuple(join[half:]), (length,) * self.batch)

    def _at(self, row: int, length: int) -> Live:
        """Return what was live in one sequence at a length."""
        if length == self.lengths[row]:
            return self.live.mapped(lambda x: x[row : row + 1])
        if length == 0:
            return self.live.mapped(lambda x: torch.zeros_like(x[:1]))
        if not self.live.states and 0 < length < self.lengths[row]:
            return self.live
        if length not in self.kept[row] or length > self.lengths[row]:
            there = sorted({0, self.lengths[row], *self.kept[row]})
            raise CacheError(
                f"sequence {row} can be truncated to {', '.join(map(str, there))} tokens, not to {length}: "
                f"states are kept every {self.boundary or 'no'} tokens"
            )
        return self.kept[row][length]

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file: see `kimi_linear.cache_files`."""
        from kimi_linear.cache_files import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: KimiConfig, device: str | torch.device = "cpu") -> "Cache":
        """Read what `save` wrote for a model of this configuration; CacheError says what does not fit."""
        from kimi_linear.cache_files import load

        return load(Path(path), config, device)
