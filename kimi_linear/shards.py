"""Read safetensors shards: what they hold, from their headers alone, and tensors by memory mapping."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEADER_LIMIT = 100 * 2**20
"""Bytes of a header that is read, as in the safetensors library."""
MAPPED_BYTES = 2**26
"""Bytes that are read through one mapping: its pages count as the process's memory until it is closed."""


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, or is another model's."""


@dataclass(frozen=True)
class Entry:
    """One tensor as a shard's header describes it."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Its first byte behind the header."""
    end: int


@dataclass(frozen=True)
class Shard:
    """A shard's header, and whether the file holds all that it promises."""

    path: Path
    entries: dict[str, Entry]
    size: int
    promised: int

    @property
    def truncated(self) -> str | None:
        """Return what is missing, None where nothing is."""
        if self.size >= self.promised:
            return None
        return f"{self.path.name} is truncated: its header promises {self.promised:,} bytes, it has {self.size:,}"


def header(path: Path) -> Shard:
    """Read a shard's header; CheckpointError where the file is not there or is no safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(first := file.read(8), "little")
            if len(first) < 8 or length > HEADER_LIMIT or len(text := file.read(length)) < length:
                raise CheckpointError(f"{path}: expected a safetensors file, its header is cut off or too long")
            size = file.seek(0, 2)
        data = json.loads(text)
        entries = {name: _entry(name, path, about) for name, about in data.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is absent") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error}") from error
    promised = 8 + length + max((entry.end for entry in entries.values()), default=0)
    return Shard(path, entries, size, promised)


def _entry(name: str, path: Path, about: dict) -> Entry:
    begin, end = about["data_offsets"]
    shape, dtype = tuple(about["shape"]), about["dtype"]
    if not isinstance(dtype, str) or not all(type(x) is int and x >= 0 for x in (*shape, begin, end)) or begin > end:
        raise ValueError(f"a tensor described as {about}")
    return Entry(name, path, dtype, shape, begin, end)


@dataclass(frozen=True)
class Wanted:
    """A tensor to be read: the name to hand it over by, which may differ from the file's, and which part of it."""

    name: str
    entry: Entry
    cut: tuple[slice, ...] = ()
    """One slice per axis, with a start and a stop; () for all of it."""

    @property
    def rows(self) -> tuple[int, int]:
        """Return the first row and the one behind the last; a number is one row."""
        if self.cut:
            return self.cut[0].start, self.cut[0].stop
        return 0, self.entry.shape[0] if self.entry.shape else 1

    @property
    def bytes(self) -> int:
        """Return how many bytes the part has."""
        whole = self.entry.end - self.entry.begin
        cut = prod(x.stop - x.start for x in self.cut)
        return whole * cut // prod(self.entry.shape) if self.cut else whole


def read(wanted: Iterable[Wanted], take: Callable[[str, torch.Tensor, int], None]) -> Iterator[int]:
    """Call take(name, rows, first) with mapped rows of every tensor, in the order of the files; yield bytes read.

    first: how many rows of what is wanted come before these. What `take` is given lives until it returns: it copies.
    CheckpointError where the library refuses a file.
    """
    by_shard: dict[Path, list[Wanted]] = {}
    for each in wanted:
        by_shard.setdefault(each.entry.shard, []).append(each)
    for path, tensors in sorted(by_shard.items()):
        for part in _parts(sorted(tensors, key=lambda x: x.entry.begin)):
            try:
                with safe_open(path, framework="pt") as file:
                    for name, own, first, index in part:
                        rows = file.get_slice(own)[index] if index else file.get_tensor(own)
                        take(name, rows, first)
                        size = rows.nbytes
                        del rows
                        yield size
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {error}") from error


def _parts(wanted: list[Wanted]) -> Iterator[list[tuple[str, str, int, tuple[slice, ...]]]]:
    """Yield lists of (name, name in the file, rows before, index or () for all) of about MAPPED_BYTES each."""
    part, size = [], 0
    for each in wanted:
        entry, (low, high) = each.entry, each.rows
        row = -(-(entry.end - entry.begin) // (entry.shape[0] if entry.shape else 1))
        step = high - low if len(entry.shape) < 2 else max(1, MAPPED_BYTES // max(1, row))
        for first in range(low, high, step):
            last = min(first + step, high)
            index = (slice(first, last), *each.cut[1:]) if each.cut or last - first < high - low else ()
            part.append((each.name, entry.name, first - low, index))
            size += row * (last - first)
            if size >= MAPPED_BYTES:
                yield part
                part, size = [], 0
    if part:
        yield part
