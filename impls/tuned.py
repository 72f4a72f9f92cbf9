"""Look up tuned configurations: one JSON file per device and implementation, `<folder>/<device>/<implementation>.json`.

Folders, the first that has a file of the device wins: $KDA_CONFIG_DIR, the user's cache ($XDG_CACHE_HOME or ~/.cache,
kda-forge/configs), what this package ships. Within a file the entry of the same shape, else one of the same bucket (the
powers of two that T, the number of sequences and heads fall under; the same K, V, dtype and packing), else its default
row. Without such a file that of the nearest device: the same kind and capability, `generic-cpu` among CPUs. Files are
data from strangers: bounded in size, checked against a schema, and every configuration by `configs.invalid`.
"""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from impls.checks import DTYPE_NAMES
from impls.configs import ChunkTorchConfig, RecurrentTorchConfig, invalid
from impls.devices import named, slug

KINDS = {
    "chunk_torch": ChunkTorchConfig,
    "recurrent_torch": RecurrentTorchConfig,
}
"""What looks its configuration up, and a file may configure."""
LIMIT = 4 << 20
"""Bytes of a file that is read."""
PACKAGED = Path(__file__).with_name("tuned")
GENERIC = "generic-cpu"
SCHEMA = Path(__file__).with_name("tuned.schema.json")


class Shape(NamedTuple):
    """The sizes that a configuration is chosen by. T counts all tokens of a row, N sequences, HV value heads."""

    T: int
    N: int
    HV: int
    K: int
    V: int
    dtype: str
    packed: bool

    @property
    def bucket(self) -> tuple:
        """Return what shapes share that may share a configuration."""
        return (*((x - 1).bit_length() for x in (self.T, self.N, self.HV)), *self[3:])


def shape_of(q, v, cu_seqlens) -> Shape:
    """Return the shape of a call on q [B, T, H, K], v [B, T, HV, V] and cu_seqlens [N + 1] or None."""
    (B, T, HV, V), packed = v.shape, cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if packed else B
    return Shape(T, N, HV, q.shape[3], V, DTYPE_NAMES[v.dtype], packed)


@dataclass(frozen=True)
class Found:
    """A configuration and where it comes from."""

    config: object
    path: Path
    row: str
    """'exact', 'bucket' or 'default'."""
    entry: dict | None
    """The entry, None for the default row."""
    nearest: bool
    """Whether the file is another device's."""


def folders() -> tuple[Path, ...]:
    """Return the folders in the order in which they are looked through."""
    own = os.environ.get("KDA_CONFIG_DIR")
    return (*((Path(own),) if own else ()), user_folder(), PACKAGED)


def user_folder() -> Path:
    """Return the folder of what the user has tuned."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "kda-forge" / "configs"


def path_of(folder: Path, implementation: str, device: str) -> Path:
    """Return the file of an implementation on the device of that name."""
    return folder / slug(device) / f"{implementation}.json"


def read(path: Path) -> dict:
    """Read and check a file: OSError where it cannot be read, ValueError naming what is wrong with it."""
    if (size := path.stat().st_size) > LIMIT:
        raise ValueError(f"expected at most {LIMIT} bytes, got {size}")
    try:
        data = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    check(data)
    return data


def check(data: object) -> None:
    """Raise ValueError naming the place and the fault of what is no file of tuned configurations."""
    if error := next(_validator().iter_errors(data), None):
        raise ValueError(f"{error.json_path}: {error.message[:300]}")
    if data["implementation"] not in KINDS:
        raise ValueError(f"$.implementation: expected one of {', '.join(KINDS)}, got {data['implementation']!r}")
    if wrong := [x for entry in data["entries"] for x in entry["shape"].values() if type(x) is float]:
        raise ValueError(f"$.entries: sizes must be whole numbers, got {wrong[0]}")
    rows = [entry["config"] for entry in data["entries"]] + ([data["default"]] if data["default"] else [])
    for row in rows:
        config_of(data["implementation"], row)


@cache
def _validator():
    from jsonschema import Draft202012Validator  # a tenth of a second, for who reads a file at all

    return Draft202012Validator(json.loads(SCHEMA.read_text()))


def config_of(implementation: str, row: dict):
    """Return the configuration of a row; ValueError for unknown fields and for what cannot run."""
    try:
        config = KINDS[implementation](**row)
    except TypeError as error:
        raise ValueError(f"config: {error}") from error
    if reason := invalid(config):
        raise ValueError(f"config: {reason}")
    return config


def looked_up(implementation: str, device: str, shape: Shape, chunks_of: int | None = None) -> Found | None:
    """Return the tuned configuration for a shape on cpu or cuda:N, None where there is none.

    chunks_of: only configurations whose chunk size divides it. A file that cannot be used is passed over with a
    warning, once: an op never fails for it. Where no file speaks of the device a warning says so, once.
    """
    if device.split(":")[0] not in ("cpu", "cuda"):
        return None
    found = _looked_up(implementation, device, shape, chunks_of)
    if found is None:
        _told_missing(implementation, device)
    return found


@lru_cache(maxsize=4096)
def _looked_up(implementation: str, device: str, shape: Shape, chunks_of: int | None) -> Found | None:
    for path, nearest in candidates(implementation, device):
        if (data := _read_once(path)) and data["implementation"] == implementation:
            found = _in_file(data, path, shape, chunks_of, nearest)
            if found:
                return found
    return None


@cache
def _told_missing(implementation: str, device: str) -> None:
    if any(_read_once(path) for path, _ in candidates(implementation, device)):
        return
    name = named(device)["name"]
    command = f"; python -m autotune tune --op {implementation} makes it" if device == "cpu" else ""
    warnings.warn(
        f"{implementation} runs with its default configuration: nothing is tuned for {name}, there is no "
        f"{path_of(user_folder(), implementation, name)}{command}",
        RuntimeWarning,
        stacklevel=3,
    )


def forget() -> None:
    """Read files anew from now on: the environment or a file has changed."""
    for function in (_looked_up, _read_once, _told_missing):
        function.cache_clear()


def candidates(implementation: str, device: str) -> Iterator[tuple[Path, bool]]:
    """Yield the files to look at in order, and whether each is another device's."""
    about = named(device)
    own = [path_of(folder, implementation, about["name"]) for folder in folders()]
    yield from ((path, False) for path in own if os.path.isfile(path))
    if about["kind"] == "cpu":
        generic = [path_of(folder, implementation, GENERIC) for folder in folders()]
        yield from ((path, True) for path in generic if os.path.isfile(path))
        return
    others = [path for folder in folders() for path in sorted(folder.glob(f"*/{implementation}.json"))]
    alike = []
    for path in others:
        data = _read_once(path) if path not in own else None
        if data and all(data["device"].get(x) == about[x] for x in ("kind", "capability")):
            alike.append((abs((data["device"].get("units") or 0) - about["units"]), path))
    yield from ((path, True) for _, path in sorted(alike))


@cache
def _read_once(path: Path) -> dict | None:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used: {error}", RuntimeWarning, stacklevel=2)
        return None


def _in_file(data: dict, path: Path, shape: Shape, chunks_of: int | None, nearest: bool) -> Found | None:
    def usable(row: dict) -> bool:
        return chunks_of is None or chunks_of % row.get("chunk_size", 1) == 0

    entries = [(Shape(**entry["shape"]), entry) for entry in data["entries"] if usable(entry["config"])]
    for row, alike in (("exact", lambda x: x == shape), ("bucket", lambda x: x.bucket == shape.bucket)):
        if entry := next((entry for x, entry in entries if alike(x)), None):
            return Found(config_of(data["implementation"], entry["config"]), path, row, entry, nearest)
    if data["default"] and usable(data["default"]):
        return Found(config_of(data["implementation"], data["default"]), path, "default", None, nearest)
    return None
