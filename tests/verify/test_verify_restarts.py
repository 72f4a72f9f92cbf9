"""The end of a process is a verdict on one case: what it leaves of its target and its batch the next process judges."""

import os
from pathlib import Path

import pytest

from verify import records, session
from verify.__main__ import main
from verify.plan import Plan
from verify.recipes import from_json

HERE = Path(__file__).parent
EXITS, FAULTS = "broken_kernels:exits", "broken_kernels:faults_on_three_tokens"


@pytest.fixture(autouse=True)
def worker_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE)]))


def judged(target: str, examples: int, folder: Path, *more: str) -> dict[str, list[dict]]:
    """Judge a kernel that ends its process, and return the records by kind."""
    path, only = folder / "run.jsonl", ("--property", "reference_forward,causality", "--profile", "smoke")
    files = ("--json", str(path), "--out", str(folder))
    assert main([target, *only, "--max-examples", str(examples), *files, *more]) == session.CRASH
    found = records.read(path)
    return {kind: [x for x in found if x["kind"] == kind] for kind in ("case", "failure", "crash", "target")}


def test_behind_a_case_that_ended_its_process_the_next_one_goes_on(tmp_path, capsys):
    found = judged(EXITS, 6, tmp_path)
    assert sorted(x["number"] for x in found["case"]) == list(range(6))
    dead = [x for x in found["case"] if 4 <= x["recipe"]["T"] <= 6]
    assert [x["recipe"] for x in found["crash"]] == [x["recipe"] for x in dead] and dead
    assert {x["what"] for case in dead for x in case["results"].values()} == {"worker ended with exit code 3"}
    assert all("causality" in x["results"] for x in found["case"] if 1 < x["recipe"]["T"] < 4)
    shown = capsys.readouterr().out
    assert f"{EXITS}: worker ended with exit code 3, asked reference_forward" in shown
    assert f"{3 - len(dead)} more may" in shown and "--replay" in shown and f"{EXITS}: 6 cases" in shown


def test_a_number_of_processes_bounds_it_and_what_is_left_is_counted(tmp_path, capsys):
    found = judged(EXITS, 6, tmp_path, "--restarts", "0")
    left = 6 - len(found["case"])
    assert [x["left"] for x in found["crash"]] == [left] and left > 0 and not found["target"]
    assert f"the {left} recipes left are NOT JUDGED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_that_ends_the_process_while_it_is_made_small_is_the_failure(tmp_path):
    found = judged(FAULTS, 2, tmp_path)
    assert all(x["recipe"]["T"] != 3 for x in found["case"]) and len(found["case"]) == 2
    (crash,) = found["crash"]
    assert crash["reason"] == "worker ended with signal 11" and from_json(crash["recipe"]).T == 3
    assert [x["recipe"] for x in found["failure"] if x["property"] == crash["property"]] == [crash["recipe"]]
    assert found["target"][0]["counts"]["cases"] == 2


@pytest.mark.slow
def test_a_run_that_goes_on_says_again_what_ended_it(tmp_path):
    found = judged(EXITS, 6, tmp_path)
    path = tmp_path / "run.jsonl"
    kept = [x for x in records.read(path) if x["kind"] in ("run", "case")]
    path.write_text("".join(map(records.line, kept)))
    again = judged(EXITS, 6, tmp_path, "--resume")
    assert [x["inputs"] for x in again["case"]] == [x["inputs"] for x in found["case"]]
    assert [x["recipe"]["T"] for x in again["crash"]] == [found["crash"][0]["recipe"]["T"]]


def test_who_follows_in_the_batch_is_judged():
    names = ("broken_kernels:aborts", "mutant:clean")
    plans = [Plan(name, "cpu", "smoke", ("float32",), 0, 2, ("causality",)) for name in names]
    verdicts = session.run([plans], lambda record: None)
    assert [v.code for v in verdicts.values()] == [session.CRASH, session.PASS]
    assert verdicts["mutant:clean"].seen == 2


def test_a_number_below_0_is_refused(capsys):
    assert main([EXITS, "--restarts", "-1"]) == session.USAGE
    assert "--restarts must be at least 0, got -1" in capsys.readouterr().err
