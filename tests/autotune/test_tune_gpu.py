"""Tuning a GPU: the compiler for real, stand-ins for the device and its clock, as there is none where tests run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from impls import tuned

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import math, sys
from contextlib import contextmanager
from types import SimpleNamespace
from autotune import judge, provenance, study, tasks
from autotune.__main__ import main
from autotune.clock import Standing
from autotune.search import MEASURED, Outcome
from autotune.timing import Box, Spread
from impls import devices, targets, tuned
from impls.targets import TARGETS

ABOUT = {"kind": "cuda", "name": "NVIDIA Made Up", "capability": "9.0", "units": 132}

def time_of(config):
    return 1.2 ** (abs(math.log2(config.value_tile / 32)) + abs(math.log2(config.warps / 2)))

class Clock:
    def __init__(self, task):
        self.box, self.usual = Box(0), task.default

    def outcome(self, config):
        x = time_of(config) / time_of(self.usual)
        print("measured", config)
        return Outcome(MEASURED, 0.1, Spread(x, x, x, x, x, 9), Spread(x, x, x, x, x, 9))

    def raced(self, configs):
        def standing(config):
            x = time_of(config) / time_of(self.usual)
            return Standing(config, Spread(x, x, x, x, x, 9), Spread(x, x, x, x, x, 9), x != 1)
        return [standing(x) for x in dict.fromkeys((self.usual, *configs))]

@contextmanager
def timer_of(task, pool):
    yield Clock(task)

for module in (tasks, study, tuned):
    module.named = lambda device: ABOUT
targets.of = lambda device: TARGETS["sm_90"]
provenance.check_device = lambda device: None
study.timer_of = timer_of
judge.verified_config = lambda *asked: {"code": 0, "outcome": "passed", "counts": {}, "failed": [], "reason": None}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
ARGUMENTS = ["tune", "--device", "cuda:0", "--op", "fused_recurrent_kda", "--out", "tuned"]


def tuned_by(folder: Path, *arguments: str) -> str:
    """Run the command in a process that compiles; returns what it printed."""
    (folder / "stand_in.py").write_text(STAND_IN)
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "stand_in.py", *ARGUMENTS, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    shape = ("--tokens", "1", "--heads", "2", "--head-dim", "64", "--fix", "stages=1", "--fix", "value_tile=64")
    return folder, shape, tuned_by(folder, *shape, "--budget", "120s")


def test_what_the_compiler_rules_out_is_never_measured(ran):
    _, _, told = ran
    measured = [line for line in told.splitlines() if line.startswith("measured")]
    # one warp cannot hold 64 x 64 floats in 128 registers a thread
    assert "10 measured, 2 pruned" in told and len(measured) == 10
    assert not [line for line in measured if "warps=1" in line and "registers=128" in line]


def test_the_same_command_goes_on_and_the_file_says_which_device(ran):
    folder, shape, _ = ran
    again = tuned_by(folder, *shape, "--budget", "120s")
    assert "12 points, 12 known" in again and "measured Recurrent" not in again
    found = tuned.read(folder / "tuned" / "nvidia-made-up" / "recurrent_triton.json")
    assert (found["device"]["name"], found["device"]["capability"]) == ("NVIDIA Made Up", "9.0")
    (entry,) = found["entries"]
    assert (entry["config"]["value_tile"], entry["config"]["warps"]) == (64, 2) and not entry["timing"]["noise"]
