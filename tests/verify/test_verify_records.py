"""Records: every line fits the schema, the schema knows every field, and a file says what is wrong with it."""

import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from verify import recipes, records
from verify.recipes import Recipe
from verify.trial import Measure

SCHEMA = json.loads(Path(records.__file__).with_name("records.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def wrong(record: dict) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(json.loads(json.dumps(record)))]


@pytest.fixture(scope="module")
def lines(judged) -> list[dict]:
    """What workers write about a table row, a failing and a flaky kernel, with the schema version."""
    targets = ("recurrent_torch", "broken_kernels:undecayed", "broken_kernels:deaf_to_scale")
    found = [r for target in targets for r in judged(target, ("reference_forward", "causality"))]
    return [json.loads(records.line({"schema": records.SCHEMA, **r})) for r in found]


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_every_line_of_a_run_fits_the_schema(lines):
    assert [problem for line in lines for problem in wrong(line)] == []
    assert {line["kind"] for line in lines} == {"probe", "case", "failure", "target"}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "gossip"},
        {"schema": 2},
        {"colour": "red"},
        {"recipe": {"version": 1}},
        {"inputs": "not a hash"},
        {"results": {"split": {"ratio": "large"}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_no_run_writes(lines, changes):
    case = next(line for line in lines if line["kind"] == "case")
    assert wrong(case | changes)


def test_the_schema_requires_every_field_of_every_kind(lines):
    later = {"number", "units", "counts", "seconds"}  # the first records had none
    for line in {line["kind"]: line for line in lines}.values():
        for name in line.keys() - (later if line["kind"] == "case" else {"seconds"}):
            assert wrong({k: v for k, v in line.items() if k != name}), (line["kind"], name)


def test_the_schema_lists_the_fields_and_families_of_recipes():
    described = SCHEMA["$defs"]["recipe"]["properties"]
    assert set(described) == {f.name for f in fields(Recipe)} | {"version"}
    families = {"keys": recipes.KEYS, "queries": recipes.QUERIES, "values": recipes.VALUES, "gates": recipes.GATES}
    families |= {"betas": recipes.BETAS, "activation": recipes.ACTIVATIONS, "sigmoid": recipes.SIGMOIDS}
    assert {name: tuple(described[name]["enum"]) for name in families} == families
    assert tuple(SCHEMA["$defs"]["dtype"]["enum"]) == recipes.DTYPES


@pytest.mark.parametrize("x, shown", [(float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "nan"), (2, 2.0)])
def test_what_json_has_no_number_for_is_a_string(x, shown):
    assert records.number(x) == shown
    assert records.outcome(Measure("o", x, 1.0))["observed"] == shown


def written(path: Path, count: int) -> Path:
    stream = io.StringIO()
    for i in range(count):
        records.write(stream, "summary", code=0, targets={f"t{i}": 0})
    path.write_text(stream.getvalue())
    return path


def test_what_was_written_is_read(tmp_path):
    found = records.read(written(tmp_path / "a.jsonl", 3))
    assert [list(r["targets"]) for r in found] == [["t0"], ["t1"], ["t2"]]
    assert [problem for record in found for problem in wrong(record)] == []


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_killed_run_leaves_all_whole_lines_readable(tmp_path, kept):
    path = written(tmp_path / "a.jsonl", 3)
    whole = path.read_text()
    last = len(whole) - len(whole.splitlines()[-1]) - 1
    path.write_text(whole[:-1] if kept == -1 else whole[: last + kept])
    assert len(records.read(path)) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"schema": 2, "kind": "case"}', "a.jsonl:3: expected schema version 1, got 2"),
        ('{"kind": "case"}', "a.jsonl:3: expected schema version 1, got None"),
        ("[]", "a.jsonl:3: expected schema version 1, got None"),
        ("{torn", "a.jsonl:3: not a JSON line"),
    ],
)
def test_a_line_that_is_no_record_of_this_version_is_named_with_file_and_line(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", 2)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_versions_name_what_decides_numbers():
    assert {"python", "platform", "torch", "numpy", "hypothesis"} <= set(records.versions())
