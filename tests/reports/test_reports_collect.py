"""A collection runs its commands in their order and time, goes on where it stopped, and loses nothing that is done."""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import example_results as examples
import filelock
import pytest

from reports import collect, load
from reports.__main__ import main
from reports.collect import CPU, CUDA, Collection, Step

ABOUT = {"device": "cpu", "machine": "A CPU", "sources": "0" * 16, "minutes": 1.0}


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    """Let `python -m program_of_a_step` be found by the processes of a collection."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def step(name: str, program: str, **about) -> Step:
    """Return a step that runs a program, which knows its folder."""
    return Step(name, ("program_of_a_step", "{folder}", program), 1, f"{name}.txt", **about)


def writes(name: str, text: str = "x") -> str:
    return f"open(folder + '/{name}.txt', 'a').write('{text}')"


def collected(folder, *steps: Step, seconds: float = 60.0) -> tuple[int, dict]:
    """Run steps; returns the exit code and the state that is left."""
    code = Collection(folder, steps, ABOUT, lambda _: None).collect(seconds)
    [result] = load.read([folder / collect.STATE])
    return code, result.data["steps"]


def test_steps_run_in_their_order_and_once(tmp_path):
    steps = [step(name, writes(name)) for name in "ab"]
    code, found = collected(tmp_path, *steps)
    assert (code, list(found)) == (collect.DONE, ["a", "b"])
    assert found["a"]["outcome"] == "done" and found["a"]["files"] == ["a.txt"]
    assert str(tmp_path) not in json.dumps(found)
    assert collected(tmp_path, *steps)[0] == collect.DONE
    assert (tmp_path / "a.txt").read_text() == "x"


def test_a_failed_step_is_told_with_its_last_words_the_others_run_and_it_is_run_again(tmp_path):
    steps = [step("a", "sys.exit('last words')"), step("b", writes("b"))]
    code, found = collected(tmp_path, *steps)
    assert (code, found["a"]["outcome"], found["b"]["outcome"]) == (collect.FAILED, "failed", "done")
    assert "last words" in found["a"]["tail"]
    code, found = collected(tmp_path, step("a", writes("a")), steps[1])
    assert (code, found["a"]["outcome"]) == (collect.DONE, "done")


def test_an_exit_code_may_be_a_result(tmp_path):
    code, found = collected(tmp_path, step("a", "sys.exit(1)", done=(0, 1)), step("b", "sys.exit(7)"))
    assert (code, found["a"]["outcome"], found["b"]["outcome"]) == (collect.UNFINISHED, "done", "cut off")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(collect, "GRACE", 1.0)


@pytest.mark.parametrize("session", [False, True])
def test_a_step_gets_its_share_and_is_ended_with_all_it_started(tmp_path, impatient, session):
    child = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"p = subprocess.Popen(['sleep', '600'], start_new_session={session}); "
        "open(folder + '/pid', 'w').write(str(p.pid)); p.wait()"
    )
    code, found = collected(tmp_path, step("a", child), step("b", writes("b")), seconds=8)
    assert (code, found["a"]["outcome"], found["b"]["outcome"]) == (collect.UNFINISHED, "cut off", "done")
    assert found["a"]["code"] is None and found["a"]["seconds"] < 8
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_fills_its_minutes_gets_its_share_and_what_ends_by_itself_half_of_what_is_left(tmp_path):
    said = []
    clocked = Step("a", ("program_of_a_step", "{folder}", "pass", "{minutes}"), 1, "a.txt")
    steps = clocked, step("b", "pass"), *(step(name, "pass") for name in "cd")
    Collection(tmp_path, steps, ABOUT, said.append).collect(4000)
    given = [int(number) for line in said for number in re.findall(r"at most (\d+) s", line)]
    assert 990 < given[0] <= 1000 and 1900 < given[1] <= 2000
    [result] = load.read([tmp_path / collect.STATE])
    assert result.data["steps"]["a"]["command"][-1] == "15.00"


@pytest.mark.parametrize(("code", "outcome"), [(0, "done"), (3, "cut off")])
def test_a_step_that_is_done_at_the_last_moment_is_done(tmp_path, code, outcome):
    late = f"import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: sys.exit({code})"
    assert collected(tmp_path, step("a", late), seconds=3)[1]["a"]["outcome"] == outcome


@pytest.mark.parametrize(("resumes", "text"), [(False, "x"), (True, "xx")])
def test_files_of_a_step_that_was_cut_off_stay_where_it_goes_on_with_them(tmp_path, resumes, text):
    steps = [step("a", writes("a") + "; sys.exit(7)", resumes=resumes)]
    for _ in range(2):
        collected(tmp_path, *steps)
    assert (tmp_path / "a.txt").read_text() == text


def test_an_interrupted_collection_keeps_what_is_done(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from test_reports_collect import *\n"
        f"steps = step('a', writes('a')), step('b', writes('b') + '; import time; time.sleep(600)')\n"
        f"sys.exit(Collection(Path({str(tmp_path)!r}), steps, ABOUT, print).collect(600))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=examples.ROOT, stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (tmp_path / "b.txt").exists() and time.monotonic() < end:
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == collect.INTERRUPTED
    [result] = load.read([tmp_path / collect.STATE])
    assert {name: x["outcome"] for name, x in result.data["steps"].items()} == {"a": "done", "b": "cut off"}


def test_an_unfinished_collection_of_this_device_and_these_sources_goes_on(tmp_path):
    first = collect.chosen(tmp_path, "A CPU", "12345678abcdefab", ["a", "b"], False)
    assert re.fullmatch(r"a-cpu-20\d\d-\d\d-\d\d-12345678", first.name)
    first.mkdir()
    collected(first, step("a", writes("a")), step("b", "sys.exit(7)"))
    again = collect.chosen(tmp_path, "A CPU", "12345678abcdefab", ["a", "b"], False)
    assert again == first
    for name, digest, steps, fresh in [
        ("B CPU", "12345678", ["a", "b"], False),
        ("A CPU", "87654321", ["a", "b"], False),
        ("A CPU", "12345678", ["a"], False),
        ("A CPU", "12345678", ["a", "b"], True),
    ]:
        assert not collect.chosen(tmp_path, name, digest, steps, fresh).exists()


def test_the_hash_of_sources_sees_every_program(tmp_path):
    (tmp_path / "impls").mkdir()
    (tmp_path / "impls" / "a.py").write_text("x = 1")
    before = collect.sources(tmp_path)
    (tmp_path / "impls" / "a.py").write_text("x = 2")
    assert collect.sources(tmp_path) != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be cpu or cuda:N, got 'tpu'"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--minutes", "nan"], "--minutes must be positive, got nan"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, message):
    assert main(["collect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_two_collections_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "machine", lambda device: "A CPU")
    monkeypatch.setattr(collect, "chosen", lambda *arguments: tmp_path)
    with filelock.FileLock(tmp_path / ".lock"):
        assert main(["collect"]) == 2
    assert "another collect is at work there" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_plain_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "machine", lambda device: "A CPU")
    (tmp_path / "file").write_text("")
    assert main(["collect", "--out", str(tmp_path / "file" / "out")]) == 2
    assert re.match(r"reports: --out .*file/out: ", capsys.readouterr().err)


def test_a_collection_that_was_killed_at_once_goes_on_in_its_folder(tmp_path, monkeypatch):
    folder = collect.chosen(tmp_path, "A CPU", "12345678", ["a"], False)
    folder.mkdir()
    monkeypatch.setattr(Collection, "_run", lambda *arguments: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        Collection(folder, [step("a", "pass")], ABOUT, print).collect(60)
    assert collect.chosen(tmp_path, "A CPU", "12345678", ["a"], False) == folder


def parser(command: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the parser of a step's command, the arguments of its sub-command only."""
    if command[0] == "verify":
        return importlib.import_module("verify.__main__").parser()
    made = argparse.ArgumentParser()
    folder = "autotune" if command[0] == "autotune" else "kimi_linear.commands"
    importlib.import_module(f"{folder}.{command[1]}").configure(made)
    return made


OURS = [step for step in (*CPU, *CUDA) if step.command[0] != "pytest"]


@pytest.mark.parametrize("step", OURS, ids=lambda step: step.name)
def test_every_step_is_a_command_that_there_is(step):
    fields = {"folder": "F", "device": "cpu", "minutes": "1.00"}
    arguments = [part.format(**fields) for part in step.command[1 if step.command[0] == "verify" else 2 :]]
    parsed = vars(parser(step.command).parse_args(arguments))
    assert any(str(value).startswith("F/") for value in parsed.values())


@pytest.mark.parametrize("step", [step for step in CPU if step.command[0] == "pytest"], ids=lambda step: step.name)
def test_every_file_of_tests_that_a_step_runs_is_there(step):
    [file] = [part for part in step.command if part.startswith("tests/")]
    assert (examples.ROOT / file).is_file()
