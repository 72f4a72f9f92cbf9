"""Show the model to `python -m verify kimi_linear`: arrays in, what every block and the head made of them out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kimi_linear.cache import Cache
from kimi_linear.model import KimiLinear


@dataclass(frozen=True, eq=False)
class Trace:
    """What the model made of some tokens of one text.

    hidden [layers + 1, T, D]: the residual stream before the first block and behind every block; logits [T, vocab].
    """

    hidden: np.ndarray
    logits: np.ndarray


def load(folder: Path) -> "Traced":
    """Return the model of a checkpoint."""
    return Traced(KimiLinear.from_pretrained(folder))


class Traced:
    """A model whose blocks tell what they read and what they return; it computes what it always does."""

    def __init__(self, model: KimiLinear):
        self.model, self.told = model, []
        for block in model.layers:
            block.add = self._telling(block.add)

    def start(self, texts: int, capacity: int) -> Cache:
        """Return an empty cache for so many texts of at most `capacity` tokens each."""
        return self.model.cache(texts, capacity)

    def prefill(self, texts: Sequence[np.ndarray], cache: Cache) -> list[Trace]:
        """Read texts of unequal length [T] in one pass, behind what the cache holds of each."""
        self.told.clear()
        tokens = sum(map(len, texts))
        logits = self.model.prefill(
            [torch.as_tensor(text) for text in texts], cache, logits="all", chunk=max(tokens, 1)
        )
        parts = self._stream().split([len(text) for text in texts], dim=1)
        return [Trace(h.double().numpy(), x.double().numpy()) for h, x in zip(parts, logits, strict=True)]

    def decode(self, ids: np.ndarray, cache: Cache) -> list[Trace]:
        """Read one more token of every text, ids [texts]."""
        self.told.clear()
        logits = self.model.decode(torch.as_tensor(ids), cache).double().numpy()
        hidden = self._stream().double().numpy()
        return [Trace(hidden[:, row : row + 1], logits[row : row + 1]) for row in range(len(ids))]

    def fork(self, cache: Cache) -> Cache:
        """Return a cache that holds the same, and that goes its own way."""
        return cache.fork()

    def _telling(self, add: Callable) -> Callable:
        def told(x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
            y = add(x, mixed)
            self.told.append((x, y))
            return y

        return told

    def _stream(self) -> torch.Tensor:
        """Return the residual stream [layers + 1, n, D] of the last pass."""
        return torch.stack([self.told[0][0], *(y for _, y in self.told)])
