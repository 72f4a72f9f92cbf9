"""The definition in float32 as a model under judgement: it must pass, and mutants are made of it.

Prompts run expanded, steps absorbed, each text for itself. A `Change` says where a mutant departs from it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from kda_spec.model import Settings, State, empty_cache, forward, settings_of
from verify.models.targets import Trace

Tensors = dict[str, np.ndarray]
Memory = tuple[State, ...]


@dataclass
class Cache:
    """What is remembered of every text: a state per layer, and how many tokens of how many there is room for."""

    memories: list[Memory]
    lengths: list[int]
    capacity: int


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
    fork: Callable[[Cache], Cache] = lambda cache: Cache(list(cache.memories), list(cache.lengths), cache.capacity)
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

    def start(self, texts: int, capacity: int) -> Cache:
        """Return an empty cache for so many texts of at most `capacity` tokens each."""
        memory = empty_cache(self.settings, 1, np.float32)
        return Cache([memory] * texts, [0] * texts, capacity)

    def prefill(self, texts: Sequence[np.ndarray], cache: Cache) -> list[Trace]:
        """Read texts of unequal length [T] behind what the cache holds of each."""
        return self._read(texts, cache, self.change.prefill, absorbed=False)

    def decode(self, ids: np.ndarray, cache: Cache) -> list[Trace]:
        """Read one more token of every text, ids [texts]."""
        return self._read(list(np.asarray(ids)[:, None]), cache, self.change.decode, absorbed=True)

    def fork(self, cache: Cache) -> Cache:
        """Return a cache that holds the same."""
        return self.change.fork(cache)

    def _read(self, texts: Sequence[np.ndarray], cache: Cache, others: dict, absorbed: bool) -> list[Trace]:
        if self.change.checks:
            self._check(texts, cache)
        longest, traces, memories = max(map(len, texts)), [], []
        for text, memory in zip(texts, cache.memories, strict=True):
            ids = np.pad(text, (0, longest - len(text))) if self.change.pad else text
            ids = ids[None] % self.settings.vocabulary  # a mutant that takes any id wraps around
            with _patched(others):
                out = forward(ids, self.tensors, self.settings, memory, absorbed=absorbed)
            hidden = np.stack([x[0, : len(text)] for x in out.hidden])
            traces.append(Trace(hidden.astype(np.float64), out.logits[0, : len(text)].astype(np.float64)))
            memories.append(self.change.carry(memory, out.cache, len(text)))
        cache.memories = self.change.mix(memories)
        cache.lengths = [length + len(text) for length, text in zip(cache.lengths, texts, strict=True)]
        return traces

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
