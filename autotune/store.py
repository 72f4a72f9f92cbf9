"""The file of results: one JSON, checked against a schema, replaced as a whole after every finished piece."""

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from jsonschema import Draft202012Validator

from autotune.outcomes import UsageError

SCHEMA = 1
DEFINITIONS = json.loads(Path(__file__).with_name("bench.schema.json").read_text())
"""The JSON Schema of a file of results."""
LIMIT = 16 << 20
"""Bytes of a file that is read: results are a few hundred kilobytes."""
ATTEMPTS = 2
"""Times that a process may end without a word in one implementation's first call until the implementation is to blame:
the first time it may have been killed from outside."""


class Store:
    """Results of one origin in one file; every change is on the disk when the method returns."""

    def __init__(self, path: Path, data: dict):
        self.path, self.data = path, data

    @staticmethod
    def open(path: Path, header: dict, fresh: bool) -> "Store":
        """Go on with the file where it stops, or begin it; `header` holds identity, git, method and note.

        Raises UsageError for a file that is none of ours or has another identity, and where nothing can be written.
        """
        if path.exists() and not fresh:
            data = read(path)
            if there := differences(data["identity"], header["identity"]):
                raise UsageError(
                    f"{path} was measured elsewhere: {'; '.join(there)}. --fresh replaces it, --out FILE begins another"
                )
            store = Store(path, data)
            store._blame_the_silent()
        else:
            store = Store(path, _empty(header))
        store._write()
        return store

    def case(self, name: str) -> dict | None:
        """Return a finished case, None for one that is not."""
        return next((case for case in self.data["cases"] if case["name"] == name), None)

    def add_case(self, record: dict) -> None:
        """Keep a finished case."""
        self.data["cases"].append(record)
        self.data["running"] = None
        self._write()

    def keep(self, key: str, value: object) -> None:
        """Keep a piece: verification, ceilings, not_compared."""
        self.data[key] = value
        self._write()

    def begins(self, case: str, implementation: str) -> None:
        """Note whose first call comes next, so that a process that dies in it leaves a name behind."""
        self.keep("running", {"case": case, "implementation": implementation})

    def rests(self) -> None:
        """Note that nothing is running: what ended was ended on purpose."""
        self.keep("running", None)

    def lost(self, case: str, implementation: str, message: str) -> None:
        """Note an implementation that takes the process or the device down on a case, so that it is not tried again."""
        self.data["casualties"].append({"case": case, "implementation": implementation, "message": message})
        self.data["running"] = None
        self._write()

    def casualty(self, case: str, implementation: str) -> str | None:
        """Return what an implementation did on a case that keeps it from being tried again."""
        named = (x for x in self.data["casualties"] if (x["case"], x["implementation"]) == (case, implementation))
        return next((x["message"] for x in named), None)

    def _blame_the_silent(self) -> None:
        if running := self.data["running"]:
            self.data["deaths"].append(running)
            if self.data["deaths"].count(running) >= ATTEMPTS:
                self.lost(**running, message=f"the process ended without a word in its first call, {ATTEMPTS} times")
            self.rests()

    def _write(self) -> None:
        self.data["updated"] = now()
        check(self.data)
        write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def _empty(header: dict) -> dict:
    time = now()
    pieces = {"verification": {}, "ceilings": None, "not_compared": [], "casualties": [], "deaths": [], "running": None}
    return {"schema": SCHEMA, "kind": "bench", "begun": time, "updated": time, **header, **pieces, "cases": []}


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check(data: object) -> None:
    """Raise ValueError naming the place and the fault of what does not follow the schema."""
    error = next(Draft202012Validator(DEFINITIONS).iter_errors(data), None)
    if error:
        raise ValueError(f"{error.json_path}: {error.message[:300]}")


def read(path: Path) -> dict:
    """Read and check a file of results; UsageError for what is none."""
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"larger than {LIMIT} bytes")
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"expected schema version {SCHEMA}, got {data['schema']!r}")
        check(data)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # malformed JSON and text are ValueErrors as well
        raise UsageError(f"{path} holds no results of this command: {error}; --fresh replaces it") from error
    return data


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, its folder made where missing; UsageError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)  # an interruption may come right behind the replacement
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def differences(there: object, here: object, name: str = "") -> list[str]:
    """Name every value that differs between two identities, with both."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [x for key in keys for x in differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == here else [f"{name} was {there!r}, is {here!r}"]
