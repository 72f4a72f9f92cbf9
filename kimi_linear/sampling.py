"""Choose the next id from logits: greedily, or drawn by temperature, top-k and top-p from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen. ValueError for what is no choice."""

    temperature: float = 0.0
    """0 for the likeliest id."""
    top_k: int | None = None
    """Only the so many likeliest ids."""
    top_p: float | None = None
    """Only the likeliest ids that together have this probability; after top_k."""
    seed: int = 0
    """Prompt i draws from a generator of its own, seeded with seed + i: its ids do not depend on its neighbours."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def generators(self, prompts: int) -> list[torch.Generator]:
        """Return one generator per prompt."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(prompts)]


def choose(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Return one id per row of logits [B, vocab]; of equally likely ones the greedy choice takes the lowest."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    return [_drawn(row, sampling, generator) for row, generator in zip(logits.cpu(), generators, strict=True)]


def _drawn(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw an id by inverting the distribution function in float64, likeliest ids first."""
    scaled, ids = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    mass = torch.softmax(scaled[: sampling.top_k], 0).cumsum(0)
    if sampling.top_p is not None:
        mass = mass[: int(torch.searchsorted(mass, sampling.top_p * mass[-1])) + 1]
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * mass[-1]
    return int(ids[min(int(torch.searchsorted(mass, drawn, right=True)), len(mass) - 1)])
