"""The definition in float32 as a model under judgement: it must pass, and mutants are made of it.

Prompts run expanded, steps absorbed, each text for itself. A `Change` says where a mutant departs from it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from kda_spec.model import Settings, State, empty_cache, forward, settings_of
from verify.models.definition import joined
from verify.models.targets import Trace

Tensors = dict[str, np.ndarray]
Memory = tuple[State, ...]


@dataclass
class Cache:
    """What is remembered of every text: a state per layer, how many tokens of how many there is room for, and what was
    remembered at boundaries, by length."""

    memories: list[Memory]
    lengths: list[int]
    capacity: int
    boundary: int
    kept: list[dict[int, Memory]]

    def copy(self) -> "Cache":
        """Return a cache that holds the same."""
        kept = [dict(own) for own in self.kept]
        return replace(self, memories=list(self.memories), lengths=list(self.lengths), kept=kept)


@dataclass(frozen=True)
class Change:
    """Where a mutant departs: what it reads, what it computes, and what it carries from call to call."""

    settings: Callable[[Settings], Settings] = lambda settings: settings
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors
    prefill: dict[str, Callable] = field(default_factory=dict)
    """Functions of `kda_spec.layers` that are others while a prompt is read, by name."""
    decode: dict[str, Callable] = field(default_factory=dict)
    """The same while a step is taken."""
    carry: Callable[[Memory, Memory, int], Memory] = lambda before, after, tokens: after
    """What is remembered, of the memories before and after a call, and its tokens."""
    mix: Callable[[list[Memory]], list[Memory]] = lambda memories: memories
    """What the texts of a batch remember, of what each of them does."""
    fork: Callable[[Cache], Cache] = Cache.copy
    keep: Callable[[Memory, Memory], Memory] = lambda before, after: after
    """What is kept at a boundary, of the memories before and after the tokens that lead there."""
    restore: Callable[[Memory, Memory], Memory] = lambda kept, now: kept
    """What a cache is cut back to, of what was kept and what it holds."""
    pad: bool = False
    """Shorter texts of a batch are filled up with token 0, and remember it."""
    checks: bool = True
    refuse: Callable[[Cache], None] = lambda cache: None
    """What happens to the cache of a call that is refused."""


class Reference:
    """A model as `verify.models.targets.Model` describes it."""

    def __init__(self, folder: Path, change: Change):
        config = json.loads((folder / "config.json").read_text())
        self.change, self.settings = change, change.settings(settings_of(config))
        shards = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
        self.tensors = change.tensors({name: x for shard in shards for name, x in shard.items()})

    def start(self, texts: int, capacity: int, boundary: int) -> Cache:
        """Return an empty cache for so many texts of at most `capacity` tokens each, kept every `boundary` tokens."""
        memory = empty_cache(self.settings, 1, np.float32)
        return Cache([memory] * texts, [0] * texts, capacity, boundary, [{0: memory} for _ in range(texts)])

    def prefill(self, texts: Sequence[np.ndarray], cache: Cache) -> list[Trace]:
        """Read texts of unequal length [T] behind what the cache holds of each."""
        return self._read(texts, cache, self.change.prefill, absorbed=False)

    def decode(self, ids: np.ndarray, cache: Cache) -> list[Trace]:
        """Read one more token of every text, ids [texts]."""
        return self._read(list(np.asarray(ids)[:, None]), cache, self.change.decode, absorbed=True)

    def fork(self, cache: Cache) -> Cache:
        """Return a cache that holds the same."""
        return self.change.fork(cache)

    def truncate(self, cache: Cache, tokens: int) -> None:
        """Forget all but the first tokens of every text."""
        pairs = zip(cache.kept, cache.memories, strict=True)
        cache.memories = [self.change.restore(kept[tokens], now) for kept, now in pairs]
        cache.lengths = [tokens] * len(cache.lengths)

    def _read(self, texts: Sequence[np.ndarray], cache: Cache, others: dict, absorbed: bool) -> list[Trace]:
        if self.change.checks:
            self._check(texts, cache)
        longest, traces, memories = max(map(len, texts)), [], []
        for row, text in enumerate(texts):
            memory, parts = cache.memories[row], []
            for piece in self._pieces(text, cache.lengths[row], cache.boundary):
                before, filled = memory, longest - len(text) if self.change.pad else 0
                part, memory = self._run(piece, filled, before, others, absorbed)
                parts.append(part)
                cache.lengths[row] += len(piece)
                if cache.boundary and cache.lengths[row] % cache.boundary == 0:
                    cache.kept[row][cache.lengths[row]] = self.change.keep(before, memory)
            traces.append(joined(parts))
            memories.append(memory)
        cache.memories = self.change.mix(memories)
        return traces

    def _pieces(self, text: np.ndarray, length: int, boundary: int) -> list[np.ndarray]:
        """Cut a text where, behind `length` tokens, it reaches a boundary."""
        return np.split(text, range(boundary - length % boundary, len(text), boundary)) if boundary else [text]

    def _run(self, text: np.ndarray, filled: int, memory: Memory, others: dict, absorbed: bool):
        """Return what is made of a text, and what is remembered, of it and `filled` tokens behind it."""
        ids = np.pad(text, (0, filled))[None] % self.settings.vocabulary  # a mutant that takes any id wraps around
        with _patched(others):
            out = forward(ids, self.tensors, self.settings, memory, absorbed=absorbed)
        hidden = np.stack([x[0, : len(text)] for x in out.hidden])
        trace = Trace(hidden.astype(np.float64), out.logits[0, : len(text)].astype(np.float64))
        return trace, self.change.carry(memory, out.cache, len(text))

    def _check(self, texts: Sequence[np.ndarray], cache: Cache) -> None:
        for text, length in zip(texts, cache.lengths, strict=True):
            fits = 1 <= len(text) <= cache.capacity - length
            if not fits or np.min(text) < 0 or np.max(text) >= self.settings.vocabulary:
                self.change.refuse(cache)
                expected = f"1 to {cache.capacity - length} ids of 0 .. {self.settings.vocabulary - 1}"
                raise ValueError(f"expected {expected}, got {text.tolist()}")


@contextlib.contextmanager
def _patched(functions: dict[str, Callable]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch(f"kda_spec.layers.{name}", function))
        yield
