"""Records: one JSON line for whatever happens, as it happens, so that a run that is killed has lost nothing.

Kinds: run (versions, device, arguments), not-run (an implementation that no device here runs), probe (what a foreign
target takes), case (a recipe and every property's worst measure), failure (a property with its smallest failing recipe:
what --replay reads), target (counts of one target), crash, usage, self-test, summary. `records.schema.json` beside this
file is the JSON Schema of a line.
"""

import json
import math
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TextIO

from verify.trial import Measure

SCHEMA = 1
DEFINITIONS = json.loads(Path(__file__).with_name("records.schema.json").read_text())
"""The JSON Schema of a line."""
INFINITE = "@-inf"
"""Suffix of a property's name for cases with gates of minus infinity, which are reported apart."""


def versions() -> dict[str, str]:
    """Return the versions of what decides numbers."""
    named = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "hypothesis", "triton", "transformers", "kda-forge"):
        try:
            named[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return named


def now() -> str:
    """Return the date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def number(x: float) -> float | str:
    """Return a JSON value: infinities and NaN are strings."""
    return float(x) if math.isfinite(x) else str(float(x))


def outcome(measure: Measure) -> dict:
    """Return the JSON of a property's worst measure on one case."""
    return {
        "ratio": number(measure.ratio),
        "what": measure.what,
        "observed": number(measure.observed),
        "allowed": number(measure.allowed),
        "where": measure.where,
    }


def write(stream: TextIO, kind: str, **fields) -> None:
    """Write one line and flush it."""
    stream.write(line({"schema": SCHEMA, "kind": kind, **fields}))
    stream.flush()


def line(record: dict) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record, allow_nan=False) + "\n"


def read(path: Path) -> list[dict]:
    """Read a file of records; a last line without its end is what a killed run left, and is not read.

    Raises ValueError naming the file and line of an unknown schema version or malformed line.
    """
    *lines, _ = path.read_text().split("\n")
    return [_parse(text, f"{path}:{i}") for i, text in enumerate(lines, 1)]


def _parse(text: str, place: str) -> dict:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not a JSON line: {error}") from error
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA:
        raise ValueError(f"{place}: expected schema version {SCHEMA}, got {version!r}")
    return record
