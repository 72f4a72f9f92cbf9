"""The command as people run it: exit codes one by one, what it prints, what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from in_this_process import judge_here
from jsonschema import Draft202012Validator

from verify import choice, mutants, records, selftest, session
from verify.__main__ import main
from verify.mutants import CLEAN, MUTANTS
from verify.plan import PROFILES
from verify.properties import PROPERTIES
from verify.recipes import DTYPES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMOKE = ("--profile", "smoke", "--max-examples")


def summary(path: Path) -> dict:
    return records.read(path)[-1]


def usage(capsys, *arguments) -> str:
    """Run in this process, expecting exit code 2 and one line on standard error."""
    assert main([str(x) for x in arguments]) == session.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def worker_paths(monkeypatch):
    """Let workers of this process find what it finds, as after an installation."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))


@pytest.fixture(scope="module")
def passing(command, folder):
    return command(
        "broken_kernels:float64_copy",
        *SMOKE,
        2,
        "--seed",
        1,
        "--json",
        folder / "passing.jsonl",
        "--out",
        folder / "none",
    )


@pytest.fixture(scope="module")
def failing(command, folder):
    only = ("--property", "reference_forward")
    return command(
        "broken_kernels:undecayed", *SMOKE, 8, *only, "--json", folder / "failing.jsonl", "--out", folder / "found"
    )


@pytest.fixture(scope="module")
def case_file(failing, folder) -> Path:
    (path,) = (folder / "found").glob("*.json")
    return path


def test_exit_code_0_a_third_partys_float64_copy_passes(passing, folder):
    assert passing.code == session.PASS, passing
    assert summary(folder / "passing.jsonl")["targets"] == {"broken_kernels:float64_copy": session.PASS}
    assert "no counterexample in 2 cases" in passing.out
    assert "UNSUPPORTED use_gate_in_kernel" in passing.out
    assert not (folder / "none").exists()


def test_output_that_goes_to_a_file_holds_no_colour_codes(passing, failing):
    assert "\x1b" not in passing.out + passing.err + failing.out + failing.err


def test_the_table_names_every_judged_property_and_a_verdict(passing, folder):
    judged = {name for r in records.read(folder / "passing.jsonl") if r["kind"] == "case" for name in r["results"]}
    for name in judged:
        assert name.endswith(records.INFINITE) or f"│{name} " in passing.out
    assert "verdict" in passing.out
    assert "term coverage" in passing.out


def test_exit_code_1_a_property_failed(failing, folder):
    assert failing.code == session.FAILED, failing
    assert summary(folder / "failing.jsonl")["code"] == session.FAILED
    assert "FAIL broken_kernels:undecayed :: reference_forward" in failing.out
    assert "observed" in failing.out and "allowed" in failing.out


def test_exit_code_1_again_by_the_printed_replay_command(failing, case_file, worker_paths, capsys):
    (line,) = [x.split() for x in failing.out.splitlines() if "--replay" in x]
    assert line[:3] == ["python", "-m", "verify"]
    assert main(line[3:]) == session.FAILED
    recorded = json.loads(case_file.read_text())
    assert f"observed {recorded['observed']:.3g}, allowed {recorded['allowed']:.3g}" in capsys.readouterr().out


def test_the_script_beside_a_failing_case_shows_the_difference(case_file):
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    run = subprocess.run(
        [sys.executable, case_file.with_suffix(".py")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    differences = [float(x.split()[-1]) for x in run.stdout.splitlines() if "largest difference" in x]
    assert len(differences) == 2
    assert min(differences) > 1e-5  # roundings of float32 stay below 1e-6


def test_a_case_whose_fault_is_gone_passes_its_replay(case_file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "run", judge_here)
    path = tmp_path / "mended.json"
    path.write_text(case_file.read_text().replace("broken_kernels:undecayed", "recurrent_torch"))
    assert main(["--replay", str(path)]) == session.PASS
    assert "holds on this case now" in capsys.readouterr().out


def test_code_is_imported_only_when_it_is_named_on_the_command_line(case_file, capsys):
    shown = usage(capsys, "--replay", case_file)
    assert f"python -m verify broken_kernels:undecayed --replay {case_file}" in shown
    assert "broken_kernels:undecayed" in usage(capsys, "recurrent_torch", "--replay", case_file)


def test_exit_code_2_in_one_line_without_a_traceback(command):
    ended = command("nonsense")
    assert ended.code == session.USAGE, ended
    assert ended.err.startswith("python -m verify: unknown target nonsense; known are ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "target, reason",
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("raises_on_import:f", "raises_on_import:f: SystemExit"),
    ],
)
def test_exit_code_2_a_target_that_does_not_import(worker_paths, folder, capsys, target, reason):
    assert main([target, "--json", str(folder / "usage.jsonl")]) == session.USAGE
    shown = capsys.readouterr()
    assert reason in shown.out
    assert "Traceback" not in shown.out + shown.err


USAGE = [
    (["nonsense"], ["unknown target nonsense", "recurrent_torch", "package.module:function"]),
    (["chunk_troch"], ["unknown target chunk_troch; did you mean chunk_torch", "fla_recurrent"]),
    (["--property", "beauty"], ["unknown property beauty", "causality"]),
    (["--property", "causalty"], ["unknown property causalty; did you mean causality", "reference_forward"]),
    (["--profile", "quik"], ["unknown profile quik; did you mean quick?", "smoke", "deep"]),
    (["--device", "interpreter"], ["got interpreter; did you mean interpret?", "cuda:N"]),
    (["--shard", "3/2"], ["--shard must be I/N with 1 <= I <= N, got 3/2"]),
    (["--workers", "0"], ["--workers must be at least 1, got 0"]),
    (["--timeout", "0"], ["--timeout must be positive, got 0"]),
    (["--resume"], ["--resume needs --json FILE"]),
    (["--adapter", "nowhere.py:A"], ["--adapter nowhere.py:A: no file nowhere.py"]),
    (["--adapter", "A"], ["--adapter must be FILE:Class, got A"]),
    (["flash_kda"], ["flash_kda needs flash_kda, which is not installed"]),
    (["--dtype", "float8"], ["unknown dtype float8", *DTYPES]),
    (["--device", "gpu"], ["--device must be cpu, cuda, cuda:N or interpret, got gpu"]),
    (["--config", "no/such/file"], ["--config no/such/file: no such file"]),
    (["--config", __file__, "broken_kernels:undecayed"], ["--config is for implementations of the table"]),
    (["--max-examples", "0"], ["--max-examples must be at least 1, got 0"]),
    (["--json", "/proc/no/such"], ["--json /proc/no/such"]),
    (["--out", __file__], ["expected a folder"]),
    (["a-b:f"], ["expected package.module:function, got a-b:f"]),
    (["a:f:g"], ["expected package.module:function, got a:f:g"]),
    (["--contract", "float32"], ["--contract is for package.module:function", "recurrent_torch, chunk_torch"]),
    (["--contract", "float32", "chunk_torch"], ["--contract is for package.module:function; chunk_torch has"]),
    (["--self-test", "chunk_torch"], ["--self-test goes together with --seed and --json only, not with TARGET"]),
    (["--self-test", "--profile", "deep"], ["--self-test", "--profile"]),
    (["--self-test", "--property", "split", "--dtype", "float32"], ["--self-test", "--property, --dtype"]),
    (["--self-test", "--config", __file__], ["--self-test", "--config"]),
    (["--replay", __file__, "--contract", "float32"], ["--replay goes together with TARGET and", "--contract"]),
    (["--explain", "beauty"], ["unknown property beauty", "causality"]),
]


@pytest.mark.parametrize("arguments, named", USAGE, ids=[" ".join(x[0][:2])[:30] for x in USAGE])
def test_exit_code_2_names_what_was_expected(capsys, arguments, named):
    shown = usage(capsys, *arguments)
    assert all(text in shown for text in named)


@pytest.mark.parametrize(
    "arguments", [["--seed", "x"], ["--contract", "int4"], ["--frobnicate"]]
)
def test_exit_code_2_for_options_that_do_not_exist(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == session.USAGE
    assert "usage:" in capsys.readouterr().err


def test_exit_code_3_where_nothing_in_the_table_runs(monkeypatch, capsys):
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", ())
    assert main(["--device", "interpret"]) == session.NOTHING
    assert "nothing ran: no implementation in the table runs on interpret" in capsys.readouterr().out


@pytest.mark.parametrize(
    "named, code", [((), session.PASS), (("all",), session.PASS), (("recurrent_torch", "chunk_torch"), session.NOTHING)]
)
def test_exit_code_3_where_one_that_was_named_had_nothing_to_run(monkeypatch, named, code, capsys):
    monkeypatch.setattr(session, "run", judge_here)
    assert main([*named, "--property", "chunk_invariance", *SMOKE, "4"]) == code
    assert "not asked: chunk_invariance (chunk_size not taken)" in capsys.readouterr().out


def test_exit_code_3_a_kernel_that_raises_whatever_it_gets(monkeypatch, capsys):
    monkeypatch.setattr(session, "run", judge_here)
    assert main(["broken_kernels:raises_always", *SMOKE, "2"]) == session.NOTHING
    shown = capsys.readouterr().out
    assert 'UNSUPPORTED every dtype: it cannot run here: RuntimeError: no kernel """ image' in shown
    assert "nothing ran: broken_kernels:raises_always" in shown


@pytest.fixture
def self_test(monkeypatch):
    """Run the self-test on other mutants, one recipe each, in this process."""

    def run(planted, *arguments) -> int:
        short = replace(PROFILES["quick"], examples=1, dtypes=("float32",), tokens=9)
        monkeypatch.setitem(PROFILES, "quick", short)
        monkeypatch.setattr(selftest, "MUTANTS", planted)
        monkeypatch.setattr(mutants, "find", {m.name: m for m in (CLEAN, *planted)}.__getitem__)
        monkeypatch.setattr(session, "run", judge_here)
        return main(["--self-test", *map(str, arguments)])

    return run


def test_exit_code_4_a_mutant_survived(self_test, capsys, folder):
    assert self_test((replace(CLEAN, name="innocent"),), "--json", folder / "survivor.jsonl") == session.SURVIVOR
    shown = capsys.readouterr().out
    assert "SURVIVED" in shown
    assert shown.splitlines()[-1] == "1 mutants, 0 killed"


def test_exit_code_0_all_mutants_killed(self_test, capsys):
    loud = next(m for m in MUTANTS if m.name == "strict_causal_mask")
    assert self_test((loud,)) == session.PASS
    assert capsys.readouterr().out.splitlines()[-1] == "1 mutants, 1 killed"


def test_exit_code_5_nondeterministic(monkeypatch, folder, capsys):
    monkeypatch.setattr(session, "run", judge_here)
    files = ("--json", str(folder / "flaky.jsonl"), "--out", str(folder / "flaky"))
    # a seed of its own: a kernel that errs once per input has met the recipes of other tests in this process
    only = ("--property", "reference_forward", "--profile", "smoke", "--max-examples", "2", "--seed", "5")
    assert main(["broken_kernels:wrong_once", *only, *files]) == session.FLAKY
    assert "NONDETERMINISTIC: it passed when the same case ran again" in capsys.readouterr().out


def test_exit_code_6_crash_is_a_result_and_takes_its_processes_along(command, folder):
    ended = command("broken_kernels:aborts", "recurrent_torch", *SMOKE, 2, "--json", folder / "crash.jsonl")
    assert ended.code == session.CRASH, ended
    assert "CRASH broken_kernels:aborts: worker ended with signal 6" in ended.out
    assert summary(folder / "crash.jsonl")["targets"] == {"broken_kernels:aborts": 6, "recurrent_torch": 0}
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x00987.654\x00" not in commands


def test_exit_code_130_ctrl_c_keeps_the_records_and_leaves_no_process(interrupted, folder):
    path = folder / "interrupted.jsonl"

    def three_cases() -> bool:
        return path.exists() and path.read_text().count('"kind": "case"') > 2

    ended, workers = interrupted(three_cases, "recurrent_torch", *SMOKE, 100_000, "--json", path)
    assert ended.code == session.INTERRUPTED, ended
    assert "records written so far are kept" in ended.err
    assert len([r for r in records.read(path) if r["kind"] == "case"]) > 2
    assert workers
    for _ in range(50):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"workers {workers} are still there")


def test_an_error_of_our_own_is_exit_code_6_with_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(session, "run", None)
    assert main(["recurrent_torch"]) == session.CRASH
    assert "TypeError" in capsys.readouterr().err


def test_list_names_every_implementation_and_property(capsys):
    assert main(["--list"]) == session.PASS
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("recurrent_torch", "chunk_torch", *(p.name for p in PROPERTIES)))


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.name)
def test_explain_says_what_is_claimed_how_it_is_compared_and_what_it_would_have_caught(capsys, prop):
    assert main(["--explain", prop.name]) == session.PASS
    shown = capsys.readouterr().out
    assert shown.startswith(f"{prop.name} ({prop.kind}: ") and "Asked where: " in shown
    assert "Would have caught" in shown


def test_help_says_what_exit_codes_mean(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "0 pass, 1 a property failed, 2 usage, 3 nothing ran, 4 a mutant survived, 5 nondeterministic, 6 crash" in shown
    )
    assert "130 interrupted" in shown


def test_every_line_of_every_run_above_fits_the_schema(folder, passing, failing):
    """Runs that pass, fail, crash, are flaky, misnamed or interrupted, the self-test, the file of a failing case."""
    validator = Draft202012Validator(json.loads((ROOT / "verify" / "records.schema.json").read_text()))
    lines = [record for path in folder.glob("*.jsonl") for record in records.read(path)]
    lines += [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    assert [f"{e.json_path}: {e.message}" for line in lines for e in validator.iter_errors(line)] == []
    assert {line["kind"] for line in lines} >= {"run", "probe", "case", "failure", "target", "summary"}
