"""What is written can be read; two files become one without losing the better entry."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from autotune import tuned_files
from autotune.__main__ import main
from autotune.outcomes import PASS, USAGE, UsageError
from impls import tuned

ROOT = Path(__file__).parents[2]
SPREAD = {"median": 0.9, "low": 0.8, "high": 1.0, "least": 0.7, "most": 1.1, "count": 9}


def data(T: int = 64, median: float = 0.9, sources: str = "a", date: str = "2026-11-21", **others) -> dict:
    provenance = {"versions": {"torch": "2.13.0"}, "sources": sources, "date": date}
    entry = {
        "shape": {"T": T, "N": 1, "HV": 2, "K": 16, "V": 16, "dtype": "float32", "packed": False},
        "config": {"chunk_size": 16, "block_tokens": 64, "heads": 4, "compile": False},
        "provenance": provenance,
        "verified": {"profile": "tune", "outcome": "passed", "counts": {}},
        "timing": {"ms": SPREAD, "over_default": SPREAD | {"median": median}, "ties": [], "noise": False},
    }
    whole = {
        "schema": 1,
        "kind": "tuned",
        "implementation": "chunk_torch",
        "device": {"kind": "cpu", "name": "A CPU"},
        "provenance": provenance,
        "entries": [entry],
        "default": None,
    }
    return copy.deepcopy(whole | others)


def medians(found: dict) -> dict[int, float]:
    return {x["shape"]["T"]: x["timing"]["over_default"]["median"] for x in found["entries"]}


def test_entries_of_other_shapes_stay_and_are_in_order():
    assert medians(tuned_files.merged(data(T=128), data(T=64, median=0.5))) == {64: 0.5, 128: 0.9}


@pytest.mark.parametrize(("there", "new", "kept"), [(0.8, 0.9, 0.8), (0.9, 0.8, 0.8), (0.9, 0.9, 0.9)])
def test_of_one_shape_the_entry_that_beats_the_default_more_stays(there, new, kept):
    assert medians(tuned_files.merged(data(median=there), data(median=new, date="2026-11-22"))) == {64: kept}


def test_what_was_measured_with_other_kernels_gives_way_to_the_newer():
    old, new = data(median=0.5, date="2026-11-20"), data(median=0.9, sources="b", date="2026-11-21")
    assert medians(tuned_files.merged(old, new)) == medians(tuned_files.merged(new, old)) == {64: 0.9}


@pytest.mark.parametrize("other", ["default", "versions", "environment"])
def test_ratios_to_another_baseline_are_not_compared(other):
    old, new = data(median=0.5, date="2026-11-20"), data(median=0.9, date="2026-11-21")
    if other == "default":
        old["entries"][0]["timing"]["default"] = {"chunk_size": 128}
    else:
        old["entries"][0]["provenance"] = old["entries"][0]["provenance"] | {other: {"torch": "1.0"}}
    assert medians(tuned_files.merged(old, new)) == {64: 0.9}


def test_files_of_two_devices_are_not_merged():
    with pytest.raises(UsageError, match="device"):
        tuned_files.merged(data(), data(device={"kind": "cpu", "name": "Another"}))


def test_a_default_row_stays(tmp_path):
    row = {"chunk_size": 32}
    assert tuned_files.merged(data(default=row), data())["default"] == row


def test_what_is_saved_is_merged_and_can_be_read(tmp_path):
    path = tmp_path / "a" / "chunk_torch.json"
    tuned_files.save(path, data(T=64))
    tuned_files.save(path, data(T=128))
    assert medians(tuned.read(path)) == {64: 0.9, 128: 0.9}
    assert {x.name for x in path.parent.iterdir()} <= {"chunk_torch.json", "chunk_torch.json.lock"}


SAVER = """
import json, sys
from pathlib import Path
from autotune import tuned_files
files = json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for data in files:
    tuned_files.save(Path(sys.argv[1]), data)
"""


def test_two_processes_that_save_at_once_lose_no_entry(tmp_path):
    path, ends = tmp_path / "chunk_torch.json", []
    for first in (1, 2):
        files = json.dumps([data(T=T) for T in range(first, 41, 2)])
        command = [sys.executable, "-c", SAVER, str(path), files]
        ends.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert [process.stdout.readline() for process in ends] == ["ready\n"] * 2
    for process in ends:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in ends] == [0, 0]
    assert sorted(medians(tuned.read(path))) == list(range(1, 41))


def test_a_file_that_another_process_keeps_locked_is_left_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "chunk_torch.json"
    tuned_files.save(path, data(T=64))
    monkeypatch.setattr(tuned_files, "PATIENCE", 0.0)
    with FileLock(f"{path}.lock"), pytest.raises(UsageError, match=r"torch\.json\.lock has been held for 0 seconds"):
        tuned_files.save(path, data(T=128))
    assert medians(tuned.read(path)) == {64: 0.9}
    tuned_files.save(path, data(T=128))
    assert medians(tuned.read(path)) == {64: 0.9, 128: 0.9}


def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path):
    path = tmp_path / "chunk_torch.json"
    path.write_text(json.dumps({"mine": 1}))
    with pytest.raises(UsageError, match="move it away"):
        tuned_files.save(path, data())
    assert json.loads(path.read_text()) == {"mine": 1}


def test_what_is_not_verified_is_not_written(tmp_path):
    bad = data()
    bad["entries"][0]["verified"]["outcome"] = "failed"
    with pytest.raises(ValueError, match="outcome"):
        tuned_files.save(tmp_path / "chunk_torch.json", bad)
    assert not list(tmp_path.iterdir())


def test_the_command_joins_files_with_what_is_there(tmp_path, capsys):
    for name, content in (("a", data(T=64)), ("b", data(T=64, median=0.5)), ("out", data(T=128))):
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == PASS
    assert medians(tuned.read(tmp_path / "out")) == {64: 0.5, 128: 0.9}
    assert "2 entries" in capsys.readouterr().out


def test_the_command_refuses_what_does_not_belong_together_and_leaves_everything(tmp_path, capsys):
    (tmp_path / "a").write_text(json.dumps(data()))
    (tmp_path / "b").write_text(json.dumps(data(device={"kind": "cpu", "name": "Another"})))
    for files in (["a", "b"], ["a", "missing"]):
        assert main(["merge", *(str(tmp_path / x) for x in files), "--out", str(tmp_path / "out")]) == USAGE
    assert len(capsys.readouterr().err.splitlines()) == 2 and not (tmp_path / "out").exists()
