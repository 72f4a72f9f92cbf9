"""The file of results: what it goes on with, what it refuses, and what it remembers of processes that died."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from autotune import store
from autotune.outcomes import UsageError
from autotune.store import Store

RESULTS = Path(__file__).parents[2] / "results"
HEADER = {
    "identity": {
        "device": {"kind": "cuda", "name": "NVIDIA H200", "driver": "580.1", "units": 132, "memory_bytes": 1 << 37},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "fla-core": None},
        "sources": "0123456789abcdef",
        "profile": "quick",
        "implementations": None,
        "environment": {},
    },
    "git": {"commit": "f" * 40, "changed": False},
    "method": {"flushed_bytes": 1, "least_rounds": 5, "most_rounds": 9, "seconds": 3.0, "modes": ["launched", "graph"]},
    "note": None,
}
CASE = {
    "name": "t1024-h4-bounded",
    "sizes": {"B": 1, "T": 1024, "H": 4, "HV": 4, "K": 128, "V": 128, "N": 1},
    "lengths": None,
    "lower_bound": -5.0,
    "dtype": "bfloat16",
    "seconds": 4.5,
    "floor": {"bytes": 1, "flops": 2, "bytes_ms": 0.1, "flops_ms": 0.2, "ms": 0.2},
    "implementations": [],
    "ratios": [],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "bench.json"


def opened(path, header=HEADER, fresh=False) -> Store:
    return Store.open(path, deepcopy(header), fresh)


def changed(keys: str, value: object) -> dict:
    """Return a header with another value at identity.KEY.KEY."""
    header = deepcopy(HEADER)
    *parents, last = keys.split(".")
    place = header["identity"]
    for key in parents:
        place = place[key]
    place[last] = value
    return header


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(store.DEFINITIONS)


def test_a_file_is_there_and_valid_from_the_first_moment(path):
    opened(path)
    store.check(json.loads(path.read_text()))
    assert [x.name for x in path.parent.iterdir()] == ["bench.json"]


def test_finished_cases_are_kept(path):
    opened(path).add_case(CASE)
    again = opened(path)
    assert again.case("t1024-h4-bounded") == CASE and again.case("t1024-h4-unbounded") is None


def test_the_note_and_the_beginning_are_those_of_the_first_run(path):
    begun = opened(path, HEADER | {"note": "shared machine"}).data["begun"]
    again = opened(path)
    assert (again.data["note"], again.data["begun"]) == ("shared machine", begun)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("device.name", "NVIDIA H100"),
        ("device.driver", "590.1"),
        ("versions.triton", "3.7.1"),
        ("versions.fla-core", "0.6.0"),
        ("sources", "fedcba9876543210"),
        ("profile", "smoke"),
        ("implementations", ["fla"]),
        ("environment", {"FLA_INTRACARD_CP": "1"}),
    ],
)
def test_a_file_of_another_origin_is_refused_and_left_as_it_is(path, keys, value):
    opened(path).add_case(CASE)
    before = path.read_text()
    with pytest.raises(UsageError, match=f"{keys}.* was .*, is .*--fresh replaces it, --out FILE begins another"):
        opened(path, changed(keys, value))
    assert path.read_text() == before


def test_fresh_begins_anew(path):
    opened(path).add_case(CASE)
    assert opened(path, changed("sources", "fedcba9876543210"), fresh=True).data["cases"] == []
    assert opened(path, changed("sources", "fedcba9876543210")).data["cases"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no results of this command"),
        ("{", "holds no results"),
        ("[]", "holds no results"),
        ('{"schema": 2}', "expected schema version 1, got 2"),
        ('{"schema": 1, "kind": "bench"}', "is a required property"),
        ("\udcff", "holds no results"),
    ],
)
def test_something_else_is_refused_unless_it_may_be_replaced(path, text, message):
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message):
        opened(path)
    assert opened(path, fresh=True).data["cases"] == []


def test_a_huge_file_is_not_read(path, monkeypatch):
    opened(path)
    monkeypatch.setattr(store, "LIMIT", 10)
    with pytest.raises(UsageError, match="larger than 10 bytes"):
        opened(path)


def test_a_folder_and_a_missing_file_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="Is a directory"):
        store.read(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        store.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        opened(tmp_path / "file" / "bench.json", fresh=True)


def test_what_does_not_follow_the_schema_is_not_written(path):
    kept = opened(path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"\$\.cases\[0\]"):
        kept.add_case(CASE | {"seconds": "long"})
    assert path.read_text() == before


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(path, monkeypatch):
    kept = opened(path)
    before = path.read_text()

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.add_case(CASE)
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 1
    monkeypatch.undo()
    kept.rests()  # what a command does when it is interrupted
    assert opened(path).case(CASE["name"]) == CASE


def test_an_interruption_right_behind_the_replacement_is_an_interruption(path, monkeypatch):
    replace = store.os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    assert store.read(path)["cases"] == []


def test_a_process_that_dies_once_may_have_been_killed_and_twice_is_to_blame(path):
    for deaths in range(store.ATTEMPTS):
        kept = opened(path)
        assert kept.casualty("t1024-h4-bounded", "fla") is None, deaths
        kept.begins("t1024-h4-bounded", "chunk_triton")
        kept.begins("t1024-h4-bounded", "fla")
    kept = opened(path)
    assert "ended without a word" in kept.casualty("t1024-h4-bounded", "fla")
    assert kept.casualty("t1024-h4-bounded", "chunk_triton") is None
    assert kept.casualty("t1024-h4-unbounded", "fla") is None
    assert kept.data["running"] is None


def test_what_ended_on_purpose_is_nobodys_death(path):
    for _ in range(store.ATTEMPTS + 1):
        kept = opened(path)
        kept.begins("t1024-h4-bounded", "fla")
        kept.rests()
    assert opened(path).data["deaths"] == []


def test_a_lost_device_is_remembered_at_once(path):
    opened(path).lost("t1024-h4-bounded", "fla", "the device was lost: illegal memory access")
    assert "illegal" in opened(path).casualty("t1024-h4-bounded", "fla")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("bench-*.json")), ids=lambda path: path.name)
def test_results_that_are_kept_can_be_read(path):
    assert store.read(path)["cases"]
