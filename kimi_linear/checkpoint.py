"""Read a checkpoint in the released layout: every tensor accounted for, mapped, and copied once to where it is used."""

import json
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from kimi_linear.config import KimiConfig
from kimi_linear.layout import Stored, stored
from kimi_linear.parameters import allocated
from kimi_linear.shards import DTYPES, CheckpointError, Entry, Shard, Wanted, header, read
from kimi_linear.share import WHOLE, Share

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LISTED = 8
"""Tensors of one kind of fault that an error names; the others are counted."""


class Checkpoint:
    """A folder with config.json and safetensors shards. Opening it reads headers only."""

    def __init__(self, folder: str | Path, config: KimiConfig | None = None):
        """Open a checkpoint; ConfigError or CheckpointError where the folder holds none.

        What is wrong with tensors is found here and said by `problems`; only `model` raises for it.
        """
        self.folder = Path(folder)
        self.config = KimiConfig.read(self.folder) if config is None else config
        self.weight_map = _weight_map(self.folder)
        self.shards: dict[str, Shard] = {}
        self.unreadable: list[str] = []
        for name in sorted(set(self.weight_map.values())) if self.weight_map else [SINGLE]:
            try:
                self.shards[name] = header(self.folder / name)
            except CheckpointError as error:
                self.unreadable.append(str(error))

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Return what the shards that are there hold, by name."""
        found = (item for shard in self.shards.values() for item in shard.entries.items())
        return {self.renamed.get(name, name): entry for name, entry in found}

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Return other names of tensors, and the ones that they are known by here."""
        return {each.alias: name for name, each in self.wanted.items() if each.alias}

    @cached_property
    def wanted(self) -> dict[str, Stored]:
        """Return what the model needs, by name."""
        return {each.name: each for each in stored(self.config)}

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def problems(self) -> list[str]:
        """Return everything that keeps the weights from being loaded, one line for each kind."""
        absent = [tensor for tensor, shard in self.weight_map.items() if shard not in self.shards]
        known = self.entries.keys() | {self.renamed.get(tensor, tensor) for tensor in absent}
        faults = {
            "missing": [name for name in self.wanted if name not in known],
            "unexpected": sorted(self.entries.keys() - self.wanted.keys()),
            "wrongly shaped": [self._shapes(name) for name in self.wanted if not self._fits(name)],
            "of a dtype that no model has": [
                f"{name} ({entry.dtype})" for name, entry in self.entries.items() if entry.dtype not in DTYPES
            ],
            "in another shard than the index says": [
                entry.name
                for entry in self.entries.values()
                if self.weight_map.get(entry.name, entry.shard.name) != entry.shard.name
            ],
        }
        truncated = [shard.truncated for shard in self.shards.values() if shard.truncated]
        return [*self.unreadable, *truncated, *(_listed(kind, names) for kind, names in faults.items() if names)]

    def _fits(self, name: str) -> bool:
        entry = self.entries.get(name)
        if entry is None:
            return True
        size = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        whole = size is None or entry.end - entry.begin == size * torch.Size(entry.shape).numel()
        return self.wanted[name].accepts(entry.shape) and whole

    def _shapes(self, name: str) -> str:
        return f"{name} {list(self.entries[name].shape)}, expected {list(self.wanted[name].shape)}"

    def model(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
        share: Share = WHOLE,
    ):
        """Return the model with its weights, or a share of it; other arguments as `KimiLinear.from_pretrained`.

        Of a share no bytes are read but its own. CheckpointError lists all `problems`, before anything is read.
        """
        from kimi_linear.model import KimiLinear

        if problems := self.problems():
            raise CheckpointError("\n  ".join([f"{self.folder}: these weights cannot be loaded", *problems]))
        with torch.device("meta"):
            model = KimiLinear(self.config, share)
        own = {each.name: each for each in stored(self.config, share)}
        parameters = self._allocated(model, own, dtype, device)
        parts = [Wanted(name, self.entries[name], self._cut(each, share)) for name, each in own.items()]
        done, total = 0, sum(part.bytes for part in parts)
        for size in read(parts, _Filler(self.wanted, own, parameters, share)):
            done += size
            if progress:
                progress(done, total)
        return model.eval()

    def _cut(self, own: Stored, share: Share) -> tuple[slice, ...]:
        """Return which part of a stored tensor a share has: () for all of it, and for all that is padded."""
        whole, shape = self.wanted[own.name], self.entries[own.name].shape
        if shape not in whole.shapes or (part := own.shapes[whole.shapes.index(shape)]) == shape:
            return ()
        first = (share.rank * n if n < count else 0 for n, count in zip(part, shape, strict=True))
        return tuple(slice(at, at + n) for at, n in zip(first, part, strict=True))

    def _allocated(
        self, model: nn.Module, own: dict[str, Stored], dtype: torch.dtype | None, device
    ) -> dict[str, torch.Tensor]:
        """Give every parameter memory of the dtype that its tensors are stored in, or of `dtype`; return them."""
        kinds: dict[str, set[torch.dtype]] = {}
        for name, each in own.items():
            as_stored = DTYPES[self.entries[name].dtype]
            kinds.setdefault(each.into, set()).add(as_stored if dtype is None or each.float32 else dtype)
        if mixed := [into for into, found in kinds.items() if len(found) > 1]:
            raise CheckpointError(f"{self.folder}: {_listed('of several dtypes, name one to load all in', mixed)}")
        return allocated(model, {into: kind for into, [kind] in kinds.items()}, device)


class _Filler:
    """Copy stored rows to their place, and look for NaN on the way."""

    def __init__(
        self, wanted: dict[str, Stored], own: dict[str, Stored], parameters: dict[str, torch.Tensor], share: Share
    ):
        self.wanted, self.own, self.parameters, self.share = wanted, own, parameters, share

    def __call__(self, name: str, rows: torch.Tensor, first: int) -> None:
        each = self.own[name]
        if each.padded and rows.numel() > each.elements:
            rows = _unpadded(name, rows, self.wanted[name].elements)
            rows = rows.chunk(self.share.ranks)[self.share.rank]
        place = self.parameters[each.into][each.at or slice(None)]
        if first or rows.numel() < place.numel():
            place = place[first : first + len(rows)]
        if not rows.sum().isfinite() and rows.isnan().any():  # the sum alone takes a twentieth of the time
            warnings.warn(f"{name} holds NaN", RuntimeWarning, stacklevel=2)
        place.copy_(rows.reshape(place.shape))


def _unpadded(name: str, x: torch.Tensor, elements: int) -> torch.Tensor:
    if x[elements:].any():
        raise CheckpointError(f"{name} must be zero beyond its {elements} elements, got {x[elements:].tolist()}")
    return x[:elements]


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor -> shard as the index says; {} where there is no index but one file. Names stay in the folder."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / SINGLE).is_file():
            return {}
        raise CheckpointError(f"{folder}: expected a checkpoint with {INDEX} or {SINGLE}, found neither")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected JSON with a weight_map, got {error!r}") from error
    if not isinstance(found, dict) or not found or not all(isinstance(x, str) for x in found.values()):
        raise CheckpointError(f"{path}: weight_map must map names of tensors to names of files")
    for shard in set(found.values()):
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {shard!r} is no safetensors file in this folder")
    return found


def _listed(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:LISTED])}{rest}"
