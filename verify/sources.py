"""A hash of what decides a verdict, so that parts of one run are of the same judge and the same implementations."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kda_spec", "impls", "verify")


@cache
def digest(without: Path | None = None) -> str:
    """Return the first 16 hex digits of SHA-256 over the Python and JSON files of the definition, ours and the judge's.

    Tuned configurations are left out, as a worker does not read them, and the file that `without` names.
    """
    found = hashlib.sha256()
    files = (path for name in PACKAGES for kind in ("*.py", "*.json") for path in (ROOT / name).rglob(kind))
    for path in sorted(path for path in files if "tuned" not in path.parts and path != without):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        found.update(path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
