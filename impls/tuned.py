"""Look up tuned configurations: one JSON file per device and implementation, `<folder>/<device>/<implementation>.json`.

Folders, the first that has a file of the device wins: $KDA_CONFIG_DIR, the user's cache ($XDG_CACHE_HOME or ~/.cache,
kda-forge/configs), what this package ships. Within a file the entry of the same shape, else one of the same bucket (the
powers of two that T, the number of sequences and heads fall under; the same K, V, dtype and packing), else its default
row. Without such a file that of the nearest device: the same kind and capability, `generic-cpu` among CPUs. Files are
data from strangers: bounded in size, checked against a schema, every configuration by `configs.invalid`, and those of
Triton kernels against the device that they are to run on by `footprint.unfit`. Ranks of one job compare what they
would read with `impls.ranks.check_same`. With KDA_TUNED=0 nothing is looked up: every call runs with its default, and
the bits of a row hang on no shape.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from impls.checks import DTYPE_NAMES
from impls.configs import ChunkTritonConfig, DplrTritonConfig, RecurrentTritonConfig, invalid
from impls.devices import named, slug
from impls.footprint import unfit
from impls.table import NAMED, find
from impls.targets import of as target_of

KINDS = {row.name: row.config for row in NAMED if row.config}
"""What looks its configuration up, and a file may configure: the implementations that have one."""
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

    def tuned_with(self, threads: int) -> bool:
        """Tell whether torch had so many threads where this was tuned."""
        provenance = (self.entry or _read_once(self.path))["provenance"]
        return str(provenance.get("environment", {}).get("threads")) == str(threads)


def folders() -> tuple[Path, ...]:
    """Return the folders in the order in which they are looked through; none where KDA_TUNED is 0."""
    if (value := os.environ.get("KDA_TUNED", "1")) == "0":
        return ()
    if value != "1":
        raise ValueError(f"the environment variable KDA_TUNED must be 0 or 1, got {value!r}")
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


def for_call(implementation: str, device: str, shape: Shape, chunks_of: int | None = None) -> Found | None:
    """Return what `looked_up` does, for a call that is made: where no file speaks of the device it says so, once."""
    found = looked_up(implementation, device, shape, chunks_of)
    if found is None and (implementation, device) not in _TOLD and folders():
        _tell_missing(implementation, device, shape)
    return found


@lru_cache(maxsize=4096)
def looked_up(implementation: str, device: str, shape: Shape, chunks_of: int | None = None) -> Found | None:
    """Return the tuned configuration for a shape on cpu or cuda:N, None where there is none.

    chunks_of: tokens between states that are kept: only configurations whose chunk size divides it. A file that cannot
    be used, and a row that does not fit the device, are passed over with a warning, once: an op never fails for them.
    Kernels that are interpreted on a CPU have no files.
    """
    if not looks_up(implementation, device):
        return None
    for path, nearest in _files(implementation, device):
        rows = _rows(path, nearest)
        for key in (("exact", shape), ("bucket", shape.bucket), ("default", None)):
            for found in rows.get(key, ()):
                if _usable(found, shape, chunks_of, device):
                    return found
    return None


def looks_up(implementation: str, device: str) -> bool:
    """Tell whether files can configure an implementation on a device: not where Triton's kernels are interpreted."""
    return device.split(":")[0] in ("cpu", "cuda") and named(device)["kind"] in find(implementation).devices


def _usable(found: Found, shape: Shape, chunks_of: int | None, device: str) -> bool:
    if chunks_of is not None and chunks_of % getattr(found.config, "chunk_size", 1):
        return False
    reason = _refusal(found.config, device, shape.K, shape.V, shape.dtype, chunks_of is not None)
    if reason:
        _warn_once((found.path, found.config), f"{found.config} of {found.path} is not used: {reason}")
    return not reason


@lru_cache(maxsize=1024)
def _refusal(config: object, device: str, K: int, V: int, dtype: str, keeps: bool) -> str | None:
    if not isinstance(config, ChunkTritonConfig | RecurrentTritonConfig | DplrTritonConfig):
        return None
    return unfit(config, K, V, dtype, target_of(torch.device(device)), keeps)


def _tell_missing(implementation: str, device: str, shape: Shape) -> None:
    if not looks_up(implementation, device) or _files(implementation, device):
        _TOLD.add((implementation, device))
        return
    name = named(device)["name"]
    _warn_once(
        (implementation, device),
        f"{implementation} runs with its default configuration: nothing is tuned for {name}, there is no "
        f"{path_of(user_folder(), implementation, name)}; {command(implementation, device, shape)} makes it",
    )


_TOLD: set[tuple] = set()
"""What was warned of, or needs no warning."""


def _warn_once(about: tuple, message: str) -> None:
    if about not in _TOLD:
        _TOLD.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def command(implementation: str, device: str, shape: Shape) -> str:
    """Return the command that tunes for a shape; where none can, the one whose result serves all other shapes as well.

    The tuner takes K = V, sequences of one length side by side, and no float64.
    """
    T, dtype = shape.T, shape.dtype
    whole = not shape.packed and shape.K == shape.V and dtype != "float64"
    if not whole:
        T, dtype = T // max(1, shape.N) if shape.packed else T, "float32" if dtype == "float64" else dtype
    where, row = "" if device == "cpu" else f"--device {device} ", "" if whole else " --default-row"
    return (
        f"python -m autotune tune {where}--op {implementation} --tokens {max(1, T)} --heads {shape.HV} "
        f"--sequences {max(1, shape.N)} --head-dim {shape.K} --dtype {dtype}{row}"
    )


def forget() -> None:
    """Read files anew from now on: the environment or a file has changed."""
    _TOLD.clear()
    for function in (looked_up, _refusal, _files, _rows, _read_once):
        function.cache_clear()


def digest(device: str) -> str:
    """Return a hash, 64 hexadecimal digits, of every file that a lookup on cpu or cuda:N could use, in their order.

    Of contents as this process has read them, not of paths: equal ones choose equally on devices that are alike.
    """
    told = [
        [name, _read_once(path)] for name in KINDS if looks_up(name, device) for path, _ in _files(name, device)
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@cache
def _files(implementation: str, device: str) -> tuple[tuple[Path, bool], ...]:
    """Return the files to look at in order, those that can be used, and whether each is another device's."""
    found = []
    for path, nearest in _candidates(implementation, device):
        if data := _read_once(path):
            if data["implementation"] == implementation:
                found.append((path, nearest))
            else:
                _warn_once((path,), f"{path} is not used: it is of {data['implementation']}, not {implementation}")
    return tuple(found)


def _candidates(implementation: str, device: str) -> Iterator[tuple[Path, bool]]:
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
    yield from ((path, True) for _, path in sorted(alike, key=lambda x: x[0]))


@cache
def _read_once(path: Path) -> dict | None:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used: {error}", RuntimeWarning, stacklevel=2)
        return None


@cache
def _rows(path: Path, nearest: bool) -> dict[tuple, list[Found]]:
    """Return the rows of a file by what they are found by: with a new T in every call it is not read through again."""
    data, rows = _read_once(path), {}
    for entry in data["entries"]:
        config, shape = config_of(data["implementation"], entry["config"]), Shape(**entry["shape"])
        for key in (("exact", shape), ("bucket", shape.bucket)):
            rows.setdefault(key, []).append(Found(config, path, key[0], entry, nearest))
    if data["default"]:
        config = config_of(data["implementation"], data["default"])
        rows["default", None] = [Found(config, path, "default", None, nearest)]
    return rows
