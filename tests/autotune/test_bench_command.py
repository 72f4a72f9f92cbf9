"""The command as people run it: one real run, then exit codes, time box, interruption and resumption one by one."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autotune import bench, judge, provenance, store
from autotune.__main__ import main
from autotune.outcomes import BoxOver, DeviceLost, worst
from autotune.timing import Box
from impls.devices import slug
from verify import session

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "autotune", "bench"]
PASSED = {"code": 0, "outcome": "passed", "counts": {}, "failed": [], "reason": None}
FAILED = {"code": 1, "outcome": "failed", "counts": {}, "failed": ["causality"], "reason": None}
SPREAD = {"median": 1.0, "low": 1.0, "high": 1.0, "least": 1.0, "most": 1.0, "count": 1}
CEILINGS = {
    "copy": {"bytes": 1, "ms": SPREAD, "bytes_per_second": 1e10},
    "matmul": {"float32": {"size": 8, "ms": SPREAD, "flops_per_second": 1e11}},
}


def command(*arguments, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = [*COMMAND, *map(str, arguments)]
    return subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=110, env=environment, **options)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Run the command for real, once: verification by the smallest profile, ceilings, both small cases."""
    out = tmp_path_factory.mktemp("results") / "bench.json"
    arguments = ("--device", "cpu", "--cases", "small-*", "--profile", "smoke", "--minutes", 1, "--out", out)
    return command(*arguments, "--note", "a test [sic]"), out, arguments


def test_a_real_run_ends_well_and_prints_the_table(real):
    ran, out, _ = real
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "a test [sic]" in ran.stdout and "measured ceilings: copy" in ran.stdout
    assert "over chunk_torch" in ran.stdout and re.search(r"chunk_torch +│ +[\d.]+ \[[\d.]+, [\d.]+\]", ran.stdout)
    assert "not compared: flash_kda: runs on cuda, not on cpu" in ran.stdout
    assert str(out) in ran.stdout


def test_a_real_run_leaves_a_file_that_says_everything(real):
    data = store.read(real[1])
    assert {name: x["outcome"] for name, x in data["verification"].items()} == dict.fromkeys(
        ("recurrent_torch", "chunk_torch"), "passed"
    )
    assert all(x["counts"]["rows"] > 0 for x in data["verification"].values())
    assert [case["name"] for case in data["cases"]] == ["small-unbounded", "small-bounded"]
    for case in data["cases"]:
        assert {x["name"]: x["status"] for x in case["implementations"]} == dict.fromkeys(
            ("recurrent_torch", "chunk_torch"), "measured"
        )
        assert all(x["errors"]["launched"]["o"] < 1e-4 for x in case["implementations"])
        assert len(case["ratios"]) == 2
    assert torch.__version__.startswith(data["identity"]["versions"]["torch"])
    assert data["running"] is None and data["deaths"] == []


def test_a_second_run_measures_nothing_again(real):
    _, out, arguments = real
    before = store.read(out)
    ran = command(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert "verdict" not in ran.stdout and "over chunk_torch" in ran.stdout
    after = store.read(out)
    assert {**after, "updated": None} == {**before, "updated": None}


def test_another_profile_is_another_origin(real):
    _, out, arguments = real
    before = out.read_text()
    ran = command(*arguments, "--profile", "quick")
    assert ran.returncode == 2 and "profile was 'smoke', is 'quick'" in ran.stderr and "--fresh" in ran.stderr
    assert out.read_text() == before


def test_a_file_can_be_shown_again(real, capsys):
    assert main(["bench", "--show", str(real[1])]) == 0
    assert "small-bounded" in capsys.readouterr().out


def test_interrupted_by_the_keyboard_for_real(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--cases", "small-*", "--out", tmp_path / "bench.json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "bench.json").exists():  # it is about to verify
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in errors
    assert store.read(tmp_path / "bench.json")["cases"] == []


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Run in this process, in a folder of its own, with everything that takes seconds stood in for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "verified", lambda names, *rest: dict.fromkeys(names, PASSED))
    monkeypatch.setattr(bench, "ceilings", lambda *rest: CEILINGS)
    monkeypatch.setattr(bench, "contest", lambda case, entrants, stage: record(case, entrants))
    return lambda *arguments: main(["bench", "--cases", "small-*", "--out", "bench.json", *map(str, arguments)])


def record(case, entrants) -> dict:
    """Return a record as of a contest in which everybody who may run takes a millisecond."""
    entries = [
        {
            "name": x.impl.name,
            "ours": x.ours,
            "status": x.refused[0] if x.refused else "measured",
            "message": x.refused[1] if x.refused else None,
            "first_call_s": None,
            "errors": {},
            "failures": {},
            "ms": {} if x.refused else {"launched": SPREAD},
            "over_floor": {} if x.refused else {"launched": 1.0},
        }
        for x in entrants
    ]
    return {
        "name": case.name,
        "sizes": vars(case.sizes),
        "lengths": None,
        "lower_bound": case.lower_bound,
        "dtype": "float32",
        "seconds": 0.0,
        "floor": {"bytes": 1, "flops": 1, "bytes_ms": 1.0, "flops_ms": 1.0, "ms": 1.0},
        "implementations": entries,
        "ratios": [],
    }


def names(path="bench.json") -> list[str]:
    return [case["name"] for case in json.loads(Path(path).read_text())["cases"]]


def failing_at(monkeypatch, name: str, error: BaseException) -> None:
    """Let the contest of one case raise."""

    def contest(case, entrants, stage):
        if case.name == name:
            stage.begins(entrants[0].impl.name)
            raise error
        return record(case, entrants)

    monkeypatch.setattr(bench, "contest", contest)


def test_everything_measured_is_exit_code_0(quick):
    assert quick() == 0
    assert names() == ["small-unbounded", "small-bounded"]


def test_what_fails_verification_is_listed_not_timed_and_exit_code_1(quick, monkeypatch, capsys):
    verdicts = {"chunk_torch": FAILED, "recurrent_torch": PASSED}
    monkeypatch.setattr(judge, "verified", lambda names, *rest: {name: verdicts[name] for name in names})
    assert quick() == 1
    assert "NOT VERIFIED chunk_torch: python -m verify: failed: causality" in capsys.readouterr().out
    entries = {x["name"]: x for x in json.loads(Path("bench.json").read_text())["cases"][0]["implementations"]}
    assert (entries["chunk_torch"]["status"], entries["chunk_torch"]["ms"]) == ("not verified", {})
    assert entries["recurrent_torch"]["status"] == "measured"


def test_interrupted_nothing_finished_is_lost_and_the_same_command_goes_on(quick, monkeypatch, capsys):
    failing_at(monkeypatch, "small-bounded", KeyboardInterrupt())
    assert quick() == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert names() == ["small-unbounded"]
    measured = []
    monkeypatch.setattr(bench, "contest", lambda case, entrants, stage: measured.append(case) or record(case, entrants))
    monkeypatch.setattr(judge, "verified", lambda *rest: pytest.fail("judged already"))
    assert quick() == 0
    assert [case.name for case in measured] == ["small-bounded"]
    assert names() == ["small-unbounded", "small-bounded"]


def test_interrupted_blames_nobody(quick, monkeypatch):
    failing_at(monkeypatch, "small-unbounded", KeyboardInterrupt())
    for _ in range(store.ATTEMPTS + 1):
        assert quick() == 130
    assert json.loads(Path("bench.json").read_text())["deaths"] == []


def test_the_box_that_runs_out_keeps_what_is_finished_and_lists_the_rest(quick, monkeypatch, capsys):
    failing_at(monkeypatch, "small-bounded", BoxOver())
    assert quick() == 7
    assert "not measured (the time box ran out): small-bounded" in capsys.readouterr().out
    assert names() == ["small-unbounded"]


def test_a_box_that_ends_while_verify_runs_measures_nothing(quick, monkeypatch, capsys):
    def verified(*rest):
        raise BoxOver

    monkeypatch.setattr(judge, "verified", verified)
    assert quick() == 7
    assert "not measured (the time box ran out): small-unbounded, small-bounded" in capsys.readouterr().out


def test_a_lost_device_is_exit_code_6_and_its_culprit_is_not_tried_again(quick, monkeypatch, capsys):
    failing_at(monkeypatch, "small-unbounded", DeviceLost("recurrent_torch", "the device was lost: illegal"))
    assert quick() == 6
    assert "DEVICE LOST: the device was lost: illegal" in capsys.readouterr().out
    monkeypatch.setattr(bench, "contest", lambda case, entrants, stage: record(case, entrants))
    assert quick() == 1
    first, second = json.loads(Path("bench.json").read_text())["cases"]
    assert {x["name"]: x["status"] for x in first["implementations"]}["recurrent_torch"] == "failed"
    assert {x["status"] for x in second["implementations"]} == {"measured"}


def test_nothing_timed_is_exit_code_3(quick):
    assert quick("--implementations", "fla") == 3


def test_a_crash_of_ours_is_exit_code_6_with_its_trace(quick, monkeypatch, capsys):
    failing_at(monkeypatch, "small-unbounded", ZeroDivisionError())
    assert quick() == 6
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_only_the_implementations_named_run(quick):
    assert quick("--implementations", "chunk_torch") == 0
    data = json.loads(Path("bench.json").read_text())
    assert [x["name"] for x in data["cases"][0]["implementations"]] == ["chunk_torch"]
    assert data["not_compared"] == []


def test_results_go_to_a_file_of_the_device_and_the_day(quick):
    assert main(["bench", "--cases", "small-bounded"]) == 0
    [path] = Path("results").iterdir()
    assert re.fullmatch(
        rf"bench-{slug(provenance.described('cpu')['name'])}-\d{{4}}-\d\d-\d\d.json", path.name
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda:0"), "sees no CUDA device here; --device cpu runs the same command on the CPU"),
        (("--device", "interpret"), "--device must be cpu or cuda:N, got interpret"),
        (("--device", "cuda"), "--device must be cpu or cuda:N, got cuda"),
        (("--minutes", "0"), "--minutes must be positive, got 0"),
        (("--minutes", "nan"), "--minutes must be positive, got nan"),
        (("--cases", "t9-*"), "--cases 't9-*' matches none of"),
        (("--implementations", "fla,flo"), "--implementations flo: known are"),
        (("--show", "nowhere.json"), "nowhere.json: No such file"),
        (("--out", "."), "Is a directory"),
    ],
)
def test_usage_is_exit_code_2_and_one_line(quick, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quick(*arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""
    assert not Path("bench.json").exists()


def test_a_device_behind_the_last_is_refused(quick, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert quick("--device", "cuda:2") == 2
    assert "torch sees 2 CUDA devices, from cuda:0 on" in capsys.readouterr().err


def test_cases_and_implementations_are_listed(quick, capsys):
    assert quick("--list") == 0
    shown = capsys.readouterr().out
    assert "t8192-h64-mixed-bounded" in shown and "1300+547+2048+963+271+3063" in shown
    assert "chunk_torch" in shown and "flash_kda" in shown and "only when named" in shown


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "7 the time box ran out" in shown and "examples" in shown and "--device cuda:0 --minutes" in shown


def test_a_command_must_be_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "code"), [({0}, 0), ({0, 7}, 7), ({7, 1}, 1), ({1, 6, 7}, 6), ({3, 0}, 3), ({3, 7}, 7), (set(), 0)]
)
def test_precedence_of_exit_codes(codes, code):
    assert worst(codes) == code


class Verify:
    """A stand-in for the process of python -m verify."""

    def __init__(self, seconds: float):
        self.seconds, self.signals = seconds, []

    def poll(self):
        return None if self.seconds else 0

    def wait(self, timeout):
        if timeout < self.seconds:
            raise subprocess.TimeoutExpired("verify", timeout)
        self.seconds = 0

    def send_signal(self, sent):
        self.signals.append(sent)
        self.seconds = 0


def test_a_verify_that_outlasts_the_box_is_interrupted_so_that_it_ends_its_workers(monkeypatch):
    process = Verify(seconds=100)
    monkeypatch.setattr(subprocess, "Popen", lambda *rest, **options: process)
    with pytest.raises(BoxOver):
        judge.verified(["chunk_torch"], "cpu", "quick", Box(50, lambda: 0.0))
    assert process.signals == [signal.SIGINT]


def test_an_interrupt_while_verify_is_being_started_ends_it(monkeypatch):
    process = Verify(seconds=100)

    def pressed(*rest, **options):
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", pressed)
    answer = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        judge.verified(["chunk_torch"], "cpu", "quick", Box(50, lambda: 0.0))
    assert process.signals == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is answer


def test_a_verify_that_ends_in_time_is_left_alone_and_without_a_summary_it_crashed(monkeypatch):
    process = Verify(seconds=10)
    monkeypatch.setattr(subprocess, "Popen", lambda *rest, **options: process)
    found = judge.verified(["chunk_torch"], "cpu", "quick", Box(50, lambda: 0.0))
    assert process.signals == []
    assert (found["chunk_torch"]["code"], found["chunk_torch"]["outcome"]) == (session.CRASH, "crashed")
    assert judge.refusal(found["chunk_torch"]) == "python -m verify: crashed: it ended without a summary"
