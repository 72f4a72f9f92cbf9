"""The compiler as a stage of the tuner: killable, cached, and a ranking that is never called a measurement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.__main__ import main
from autotune.outcomes import USAGE

ROOT = Path(__file__).resolve().parents[2]


def static(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command in a process that compiles: this one interprets."""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "autotune", "static", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)


SMALL = ("--op", "recurrent_triton", "--shape", "T=64,H=1,K=16,V=16", "--fix", "stages=1", "--fix", "registers=0")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    return folder, static(folder, *SMALL, "--out", "found.json")


def test_a_ranking_says_that_it_is_one(ran):
    folder, run = ran
    assert run.returncode == 0, run.stderr
    assert "nothing was measured" in run.stdout and "kernels compiled" in run.stdout
    found = json.loads((folder / "found.json").read_text())
    assert found["kind"] == "static" and found["target"]["name"] == "sm_90"
    times = [x["microseconds"] for x in found["ranked"] if not x["trouble"]]
    assert times == sorted(times) and times[0] > 0
    assert {x["config"]["warps"] for x in found["ranked"]} == {1, 2, 4, 8}
    assert all(x["resources"]["recurrent"]["registers"] > 0 for x in found["ranked"])


def test_what_was_compiled_once_is_recalled(ran):
    folder, _ = ran
    again = static(folder, *SMALL)
    assert again.returncode == 0 and " 0 kernels compiled" in again.stdout, again.stderr


def test_a_sample_says_what_share_of_the_space_is_out(ran):
    folder, _ = ran
    run = static(folder, *SMALL, "--sample", "3")
    assert run.returncode == 0 and "3 configurations, 0 out" in run.stdout, run.stdout + run.stderr
    assert " 0 kernels compiled, 3 recalled" in run.stdout, "the search knew them all"


MISBEHAVING = """
import os, time
from pathlib import Path
import autotune.compiling as compiling
from autotune.arguments import problem_of
from autotune.timing import Box
from impls.compiler_triton import Job
from impls.configs import RecurrentTritonConfig
from impls.targets import TARGETS

def misbehaves(job):
    if job.config.warps == 1:
        os._exit(9)
    if job.config.warps == 2:
        time.sleep(600)
    return "answered"

compiling.outcome = misbehaves

if __name__ == "__main__":
    problem = problem_of("T=64,H=1,K=16,V=16", "float32")
    jobs = [Job(problem, RecurrentTritonConfig(warps=w), TARGETS["sm_90"], "recurrent") for w in (4, 2, 1, 8)]
    with compiling.Compiler(Path("cache"), processes=1, seconds=5.0) as compiler:
        found = compiler.outcomes(jobs, Box(600))
    for job in jobs:
        print(found[job])
"""
"""A stand-in for a compiler that answers, hangs and dies; workers are spawned, and import the script anew."""


def test_a_compiler_that_hangs_or_dies_costs_its_own_job_only(tmp_path):
    script = tmp_path / "misbehaving.py"
    script.write_text(MISBEHAVING)
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "answered",
        "the compiler took more than 5 s and was killed",
        "the compiler ended its process with status 9",
        "answered",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_120"], "--target must be one of"),
        (["--target", "cpu"], "--target"),
        (["--op", "chunk_torch"], "--target"),
        (["--budget", "x"], "--budget"),
        (["--processes", "0"], "--processes"),
        (["--sample", "-1"], "--sample"),
        ([], "TRITON_INTERPRET"),
    ],
)
def test_usage_is_exit_code_2_and_one_line(capsys, arguments, message):
    assert main(["static", *arguments]) == USAGE
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
