"""Show the model to `python -m verify kimi_linear`: arrays in, what every block and the head made of them out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kimi_linear.cache import Cache
from kimi_linear.model import KimiLinear
from kimi_linear.packing import passes


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

    def start(self, texts: int, capacity: int, boundary: int) -> Cache:
        """Return an empty cache for so many texts of at most `capacity` tokens each, kept every `boundary` tokens."""
        return self.model.cache(texts, capacity, boundary=boundary or None)

    def prefill(self, texts: Sequence[np.ndarray], cache: Cache) -> list[Trace]:
        """Read texts of unequal length [T], all at once but for boundaries, behind what the cache holds of each."""
        self.told.clear()
        lengths = [len(text) for text in texts]
        chunk = max(sum(lengths), 1)
        planned = list(passes(lengths, cache.lengths, chunk, cache.boundary))
        logits = self.model.prefill([torch.as_tensor(text) for text in texts], cache, logits="all", chunk=chunk)
        parts: list[list[torch.Tensor]] = [[] for _ in texts]
        for pieces, stream in zip(planned, self._streams(), strict=True):
            for piece, own in zip(pieces, stream.split([p.last - p.first for p in pieces], 1), strict=True):
                parts[piece.row].append(own)
        return [_trace(torch.cat(own, 1), x) for own, x in zip(parts, logits, strict=True)]

    def decode(self, ids: np.ndarray, cache: Cache) -> list[Trace]:
        """Read one more token of every text, ids [texts]."""
        self.told.clear()
        logits = self.model.decode(torch.as_tensor(ids), cache)
        [stream] = self._streams()
        return [_trace(stream[:, row : row + 1], logits[row : row + 1]) for row in range(len(ids))]

    def fork(self, cache: Cache) -> Cache:
        """Return a cache that holds the same, and that goes its own way."""
        return cache.fork()

    def truncate(self, cache: Cache, tokens: int) -> None:
        """Forget all but the first tokens of every text."""
        cache.truncate(tokens)

    def _telling(self, add: Callable) -> Callable:
        def told(x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
            y = add(x, mixed)
            self.told.append((x, y))
            return y

        return told

    def _streams(self) -> list[torch.Tensor]:
        """Return the residual stream [layers + 1, n, D] of every pass since `told` was cleared."""
        L = len(self.model.layers)
        runs = [self.told[i : i + L] for i in range(0, len(self.told), L)]
        return [torch.stack([run[0][0], *(y for _, y in run)]) for run in runs]


def _trace(hidden: torch.Tensor, logits: torch.Tensor) -> Trace:
    return Trace(hidden.double().numpy(), logits.double().numpy())
