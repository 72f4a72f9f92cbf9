"""Read files of results: JSON, or lines of it as `python -m verify --json` writes them.

`schemas/result.schema.json` is the one schema: by kind and version it names the schema of each writer. What it does not
know is an error that names the file and the version.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

RESULT = Path(__file__).parent / "schemas" / "result.schema.json"
SUFFIXES = (".json", ".jsonl")
RECORDS, SELF_TEST, COMPILE = "records", "self-test", "compile"
MEGABYTES = 256
"""A file of results is never as large: records of a deep run take some tens."""
LONGEST = 300
"""Characters of a schema's complaint, which quotes what it complains of."""


class ResultError(Exception):
    """Say what is wrong with a file of results, by its name."""


@dataclass(frozen=True)
class Origin:
    """Where a result comes from: what stands under every figure."""

    device: str
    versions: dict[str, str]
    date: str | None
    """UTC, in ISO 8601; None where the file does not say."""
    file: str

    def __str__(self) -> str:
        when = self.date[:16].replace("T", " ") + " UTC" if self.date else "date not recorded"
        versions = ", ".join(f"{name} {x}" for name, x in self.versions.items()) or "versions not recorded"
        return " · ".join((self.device, versions, when, self.file))


@dataclass(frozen=True)
class Result:
    """One file of results, or the self-test among its records."""

    kind: str
    """As the file says; 'records' for the lines of a run of python -m verify."""
    data: dict | list[dict]
    """The JSON of the file; of records a list of lines."""
    origin: Origin


def read(paths: Iterable[Path]) -> list[Result]:
    """Read files, and all .json and .jsonl files below folders, in the order of their names.

    Raises ResultError naming the file that cannot be read, is no result, or has an unknown kind or version.
    """
    return [result for path, name in files(paths).items() for result in _read(path, name)]


def files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the files that are meant by files and folders, each with its name, of those in a folder the way to them.

    Raises ResultError for what is not there and for an empty folder.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(x for x in path.rglob("*") if x.suffix in SUFFIXES and x.is_file())
            if not inside:
                raise ResultError(f"{path}: a folder without results ({', '.join(SUFFIXES)})")
            found |= {x: x.relative_to(path).as_posix() for x in inside if x not in found}
        elif path.is_file():
            found.setdefault(path, path.name)
        else:
            raise ResultError(f"{path}: there is no such file or folder")
    return found


def _read(path: Path, name: str) -> list[Result]:
    documents = _documents(path)
    for place, document in documents:
        check(document, place)
    lines = [document for _, document in documents]
    if not lines:
        return []
    if _kind(lines[0]) not in records():
        return [Result(_kind(lines[0]), lines[0], _origin(lines[0], name))]
    runs = [line for line in lines if line["kind"] != SELF_TEST]
    tests = [Result(SELF_TEST, line, _judged([line], name)) for line in lines if line["kind"] == SELF_TEST]
    return ([Result(RECORDS, runs, _judged(runs, name))] if runs else []) + tests


def _documents(path: Path) -> list[tuple[str, object]]:
    """Return the JSON values of a file, each with its place; the last line of a killed run is not read."""
    try:
        if path.stat().st_size > MEGABYTES << 20:
            raise ResultError(f"{path}: larger than {MEGABYTES} MiB, no file of results")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: {error}") from error
    if path.suffix != ".jsonl":
        try:
            return [(str(path), json.loads(text, parse_constant=_no_constant))]
        except (ValueError, RecursionError) as error:
            if not text.startswith("{") or "\n{" not in text:
                raise ResultError(f"{path}: no JSON: {error}") from error
    *whole, _ = text.split("\n")
    return [(f"{path}:{i}", _line(line, f"{path}:{i}")) for i, line in enumerate(whole, 1)]


def _line(text: str, place: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{place}: not a line of JSON: {error}") from error


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _kind(document: dict) -> str:
    """Return the kind; the compile report, which names none, is told by what it holds."""
    return document.get("kind") or (COMPILE if {"triton", "ptxas", "rows"} <= document.keys() else "")


def check(document: object, place: str) -> None:
    """Check a result against the schema of its kind and version; ResultError names the place and the version."""
    if not isinstance(document, dict):
        raise ResultError(f"{place}: expected an object with kind and schema, got {type(document).__name__}")
    kind, version = _kind(document), document.get("schema")
    known = _validators()
    if not isinstance(kind, str) or not any(kind == name for name, _ in known):
        raise ResultError(f"{place}: unknown kind of result {kind!r} (schema version {version!r})")
    if isinstance(version, bool) or not isinstance(version, int) or (kind, version) not in known:
        readable = ", ".join(str(x) for name, x in known if name == kind)
        raise ResultError(f"{place}: schema version {version!r} of {kind!r}; readable: {readable}")
    if found := jsonschema.exceptions.best_match(known[kind, version].iter_errors(document)):
        where = "/".join(map(str, found.absolute_path)) or "the whole"
        raise ResultError(f"{place}: no result of kind {kind!r}, version {version}: {where}: {found.message[:LONGEST]}")


@cache
def _validators() -> dict[tuple[str, int], jsonschema.Draft202012Validator]:
    """Return a validator for each kind and version that the one schema names."""
    registry = Registry(retrieve=_retrieved)
    found = {}
    for rule in json.loads(RESULT.read_text())["allOf"]:
        asked, target = rule["if"]["properties"], (RESULT.parent / rule["then"]["$ref"]).resolve()
        schema = {"$ref": target.as_uri()}
        key = asked["kind"]["const"], asked["schema"]["const"]
        found[key] = jsonschema.Draft202012Validator(schema, registry=registry)
    return found


def _retrieved(uri: str) -> Resource:
    """Read a schema beside its writer; nothing but files of this tree is ever asked for."""
    path = Path(unquote(uri.removeprefix("file://")))
    if not path.resolve().is_relative_to(RESULT.parents[2]):
        raise ValueError(f"{uri} is no schema of this tree")
    return Resource.from_contents(json.loads(path.read_text()), default_specification=DRAFT202012)


@cache
def records() -> frozenset[str]:
    """Return the kinds of a line of python -m verify's records."""
    rules = json.loads(RESULT.read_text())["allOf"]
    ours = (rule for rule in rules if rule["then"]["$ref"].endswith("/records.schema.json"))
    return frozenset(rule["if"]["properties"]["kind"]["const"] for rule in ours)


def _origin(data: dict, file: str) -> Origin:
    """Return the origin of a file that is no records."""
    about = data.get("identity") or data.get("provenance") or data
    versions = about.get("versions") or {x: data[x] for x in ("triton", "ptxas") if data.get(x)}
    date = about.get("date") or data.get("updated") or data.get("date")
    return Origin(_device(data, about), {x: v for x, v in versions.items() if v}, date, file)


def _device(data: dict, about: dict) -> str:
    device = about.get("device") or data.get("device")
    if isinstance(device, dict):
        settings = about.get("environment") or {}
        threads = device.get("threads") or data.get("threads") or settings.get("threads")
        return device["name"] + (f", {threads} thread{'s' * (str(threads) != '1')}" if threads else "")
    if "target" in data:
        return f"{data['target']['name']} by estimate, nothing measured"
    if "rows" in data:
        return "compiled for " + ", ".join(dict.fromkeys(row["target"] for row in data["rows"])) + ", nothing run"
    return f"{device} of {data['machine']}"


def _judged(lines: Sequence[dict], file: str) -> Origin:
    """Return the origin of records: devices as the judge names them, and the machine's platform."""
    about = next((line for line in lines if line["kind"] in ("run", SELF_TEST)), {})
    versions = dict(about.get("versions", {}))
    platform = versions.pop("platform", None)
    devices = dict.fromkeys(line["device"] for line in lines if line["kind"] == "case") or {"cpu": None}
    dates = [line["date"] for line in lines if "date" in line]
    return Origin(
        ", ".join(devices) + (f" on {platform}" if platform else ""), versions, max(dates, default=None), file
    )
