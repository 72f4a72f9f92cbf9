"""Write tuned configurations: entries are merged into a file, which is replaced as a whole and read again at once.

Reading, merging and writing are one step: a lock file beside the target keeps two tunes that end together from losing
the entries of one. The operating system lets go of the lock of a process that dies.
"""

import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from autotune.outcomes import UsageError
from autotune.store import write
from impls import tuned

PATIENCE = 30.0
"""Seconds to wait for another process that is writing the same file: it takes milliseconds."""


def opened(path: Path) -> dict | None:
    """Read a file to go on with; None where there is none, UsageError where it is not one of ours."""
    if not path.exists():
        return None
    try:
        return tuned.read(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no file of tuned configurations: {error}; move it away") from error


def merged(there: dict | None, new: dict) -> dict:
    """Return both files as one: of two entries of a shape the one that by its own measurement beats the default more.

    Where sources, versions, environment or the default were others, ratios cannot be compared: the newer entry stays.
    Raises UsageError for files of two devices or implementations.
    """
    if there is None:
        return new
    for name in ("implementation", "device"):
        if there[name] != new[name]:
            raise UsageError(f"files differ in {name}: {there[name]!r} and {new[name]!r}")
    entries = {tuned.Shape(**entry["shape"]): entry for entry in there["entries"]}
    for entry in new["entries"]:
        shape = tuned.Shape(**entry["shape"])
        entries[shape] = _better(entries.get(shape, entry), entry)
    rows = {"entries": [entries[shape] for shape in sorted(entries)], "default": new["default"] or there["default"]}
    return max(there, new, key=_date) | rows


def _better(there: dict, new: dict) -> dict:
    if _baseline(there) != _baseline(new):
        return max(there, new, key=_date)
    return min(new, there, key=lambda entry: entry["timing"]["over_default"]["median"])


def _baseline(entry: dict) -> list:
    """Return what two ratios must share to be compared: kernels, versions, environment and the default itself."""
    about = entry["provenance"]
    return [about["sources"], about["versions"], about.get("environment"), entry["timing"].get("default")]


def _date(x: dict) -> str:
    return x["provenance"]["date"]


def save(path: Path, data: dict) -> dict:
    """Write a file, merged with what it holds by then, and return that; UsageError where it cannot be written."""
    tuned.check(data)
    check_writable(path)
    with _locked(path):
        data = merged(opened(path), data)
        tuned.check(data)
        write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    tuned.forget()
    return data


def _locked(path: Path):
    """Return a context in which no other process writes the file; UsageError where another one does not end."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        return FileLock(lock).acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UsageError(
            f"{path} cannot be written: {lock} has been held for {PATIENCE:g} seconds by another process, which should "
            "have ended; remove it if there is none"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {lock}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raise UsageError where a file could not be written in the end; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: the folder is not yours")
