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

from reports import collect, load, processes, shares
from reports.__main__ import main
from reports.collect import Collection
from reports.steps import CPU, CUDA, Step

ABOUT = {"device": "cpu", "machine": "A CPU", "sources": "0" * 16, "minutes": 1.0}


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    """Let `python -m program_of_a_step` be found by the processes of a collection, on an idle machine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def step(name: str, program: str, needs: float = 1, **about) -> Step:
    """Return a step that runs a program, which knows its folder."""
    return Step(name, ("program_of_a_step", "{folder}", program), f"{name}.txt", needs, **about)


def clocked(name: str, needs: float = 1, weight: float = 1, **about) -> Step:
    """Return a step that is told its minutes and does nothing."""
    return Step(name, ("program_of_a_step", "{folder}", "pass", "{minutes}"), f"{name}.txt", needs, weight, **about)


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


def test_what_commands_write_down_does_not_say_where_the_checkout_is(tmp_path, monkeypatch):
    for module in (collect, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "results" / "one"
    folder.mkdir(parents=True)
    assert collected(folder, step("a", "open(folder + '/a.txt', 'w').write(folder)"))[0] == collect.DONE
    assert (folder / "a.txt").read_text() == "results/one"


def test_a_failed_step_is_told_with_its_last_words_the_others_run_and_it_is_run_again(tmp_path):
    steps = [step("a", "sys.exit('last words')"), step("b", writes("b"))]
    code, found = collected(tmp_path, *steps)
    assert (code, found["a"]["outcome"], found["b"]["outcome"]) == (collect.FAILED, "failed", "done")
    assert "last words" in found["a"]["tail"]
    code, found = collected(tmp_path, step("a", writes("a")), steps[1])
    assert (code, found["a"]["outcome"]) == (collect.DONE, "done")


def test_an_exit_code_may_be_a_result(tmp_path):
    steps = step("a", writes("a") + "; sys.exit(1)", done=(0, 1)), step("b", "sys.exit(7)")
    code, found = collected(tmp_path, *steps)
    assert (code, found["a"]["outcome"], found["b"]["outcome"]) == (collect.UNFINISHED, "done", "cut off")


def test_an_exit_code_without_a_file_is_none(tmp_path):
    """Python ends with 1 where a module cannot be imported: no property has failed."""
    code, found = collected(tmp_path, step("a", "import no_such_module", done=(0, 1)))
    assert (code, found["a"]["outcome"]) == (collect.FAILED, "failed") and "no_such_module" in found["a"]["tail"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1.0)


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


def given(steps: list[Step], left: float, took: dict[str, float] | None = None, slow: float = 1.0) -> dict:
    """Return the seconds of each step's share where they take what they need, or what is said; None: passed over."""
    shared = {}
    for i, step in enumerate(steps):
        needs = {x: shares.need(x, slow, None) for x in steps[i:]}
        own = shared[step.name] = shares.share(needs, left)
        left -= 0 if own is None else own if step.clocked else min((took or {}).get(step.name, step.needs * slow), own)
    return shared


def test_what_is_to_spare_goes_to_what_fills_its_minutes_by_weight():
    steps = [step("a", "pass", 60), clocked("b", 100, 3), clocked("c", 50, 1), step("d", "pass", 30)]
    assert given(steps, 655) == {"a": 267.5, "b": 400, "c": 150, "d": 45}


@pytest.mark.parametrize("minutes", [20, 30, 60])
def test_everything_fits_its_box_on_two_quiet_cores(minutes):
    shared = given(CPU, 60 * minutes - 30)
    assert None not in shared.values()
    assert all(shared[step.name] >= step.needs for step in CPU)
    assert sum(shared[step.name] if step.clocked else step.needs for step in CPU) <= 60 * minutes - 30


@pytest.mark.parametrize("greedy", [step.name for step in CPU if not step.clocked])
def test_a_step_that_does_not_end_leaves_all_others_what_they_need(greedy):
    shared = given(CPU, 20 * 60 - 30, {greedy: 1e9})
    assert all(shared[step.name] >= step.needs for step in CPU)


LONGEST = max(step.needs for step in CPU)
BOXES = [(minutes, slow) for minutes in (4, 6, 10, 20) for slow in (1, 2, 4) if 0.95 * 60 * minutes >= slow * LONGEST]


@pytest.mark.parametrize(("minutes", "slow"), BOXES)
def test_calls_of_any_length_come_to_an_end_and_none_outlasts_its_box(minutes, slow):
    """On a machine of any pace, with time enough for the longest step, every call does something new."""
    waiting, calls = list(CPU), 0
    while waiting:
        shared = given(waiting, 60 * minutes * 0.95, slow=slow)
        done = [step for step in waiting if shared[step.name] is not None]
        assert done and sum(shared[x.name] if x.clocked else slow * x.needs for x in done) <= 60 * minutes
        waiting, calls = [step for step in waiting if step not in done], calls + 1
    assert calls <= 1 + slow * sum(step.needs for step in CPU) / (60 * minutes * 0.95) * 2


def test_a_box_that_nothing_fits_into_goes_to_the_first_step(tmp_path):
    said = []
    steps = step("a", writes("a"), 1000), step("b", writes("b"), 2000)
    assert Collection(tmp_path, steps, ABOUT, said.append).collect(60) == collect.UNFINISHED
    assert [line for line in said if "takes about" in line] == [
        "a: not begun, takes about 1000 s and 57 s are left", "b: not begun, takes about 2000 s and 57 s are left",
    ]  # fmt: skip
    assert re.search(r"^a: at most (56|57) s$", "\n".join(said), re.M) and "not done: b" in said[-1]


def test_who_was_cut_off_gets_what_the_others_left_over(tmp_path):
    twice = writes("a") + "; sys.exit(0 if open(folder + '/a.txt').read() == 'xx' else 7)"
    code, found = collected(tmp_path, step("a", twice, resumes=True), step("b", writes("b"), 20))
    assert (code, found["a"]["outcome"], list(found)) == (collect.DONE, "done", ["b", "a"])


def test_the_next_call_goes_on_with_what_was_passed_over(tmp_path):
    steps = step("a", writes("a")), step("b", writes("b"), 1000), step("c", writes("c"))
    code, found = collected(tmp_path, *steps, seconds=120)
    assert (code, list(found)) == (collect.UNFINISHED, ["a", "c"])
    code, found = collected(tmp_path, *steps, seconds=3000)
    assert (code, list(found)) == (collect.DONE, ["a", "c", "b"])
    assert (tmp_path / "a.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("outcome", "about", "needs"),
    [("done", {}, 20), ("cut off", {}, 150), ("cut off", {"resumes": True}, 20), ("failed", {}, 20)],
)
def test_what_was_cut_off_and_begins_anew_needs_more_than_it_had(outcome, about, needs):
    assert shares.need(step("a", "pass", 10, **about), 2.0, {"outcome": outcome, "seconds": 100.0}) == needs


def test_the_pace_is_told_by_what_ended_by_itself():
    steps = [step("a", "pass", 10), step("b", "pass", 30), clocked("c", 10)]
    records = {name: {"seconds": seconds} for name, seconds in (("a", 30.0), ("b", 30.0), ("c", 1000.0))}
    assert [shares.pace([], {}, load) for load in (0.0, 1.5, 100.0)] == [1.0, 2.5, shares.SLOWEST]
    assert shares.pace(steps, records) == 1.5
    assert shares.pace(steps[:1], {"a": {"seconds": 1e6}}) == shares.SLOWEST
    assert shares.pace(steps[:1], {"a": {"seconds": 1e-6}}) == 1.0


@pytest.mark.parametrize(("slow", "minutes"), [(1.0, 255 / 60), (2.0, 165 / 60), (4.0, 0.5)])
def test_minutes_leave_time_for_what_comes_behind_them(slow, minutes):
    assert shares.told(clocked("tune", after=90, leaves=60), 300, slow) == pytest.approx(minutes)


def test_a_step_is_told_its_minutes(tmp_path):
    collected(tmp_path, clocked("a"), seconds=400)
    [result] = load.read([tmp_path / collect.STATE])
    assert 5.9 < float(result.data["steps"]["a"]["command"][-1]) <= 6.02


@pytest.mark.parametrize(("code", "outcome"), [(0, "done"), (3, "cut off")])
def test_a_step_that_is_done_at_the_last_moment_is_done(tmp_path, code, outcome):
    late = f"{writes('a')}\nimport time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: sys.exit({code})"
    assert collected(tmp_path, step("a", late), seconds=8)[1]["a"]["outcome"] == outcome


@pytest.mark.parametrize(("resumes", "text"), [(False, "x"), (True, "xx")])
def test_files_of_a_step_that_was_cut_off_stay_where_it_goes_on_with_them(tmp_path, resumes, text):
    collected(tmp_path, step("a", writes("a") + "; sys.exit(7)", resumes=resumes))  # run twice: time is left over
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
