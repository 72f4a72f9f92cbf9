"""Measuring in a process that may be lost: a trial that takes it down costs that trial only."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune import measuring
from autotune.cases import Case
from autotune.clock import Bench
from autotune.measuring import Guarded
from autotune.outcomes import BoxOver
from autotune.search import FAILED, MEASURED
from autotune.timing import Box
from impls import ChunkTorchConfig

ROOT = Path(__file__).resolve().parents[2]
BENCH = Bench("chunk_torch", Case("tiny", 1, 64, 2, 16, 16), "float32", "cpu", 1)
DEFAULT = ChunkTorchConfig()


@pytest.fixture(scope="module")
def guarded():
    with Guarded(BENCH, DEFAULT, Box(600)) as found:
        yield found


def test_a_configuration_is_measured_as_in_this_process(guarded):
    found = guarded.outcome(ChunkTorchConfig(chunk_size=32))
    assert found.status == MEASURED and found.ratio.count >= 3


def test_a_configuration_that_raises_leaves_the_process_alone(guarded):
    process = guarded.process
    assert guarded.outcome(ChunkTorchConfig(chunk_size=17)).status == FAILED
    assert guarded.outcome(DEFAULT).status == MEASURED and guarded.process is process


def test_the_end_of_the_box_is_no_outcome(guarded):
    guarded.box = Box(0)
    with pytest.raises(BoxOver):
        guarded.outcome(DEFAULT)
    guarded.box = Box(600)


def test_a_device_that_answers_no_more_is_left(guarded):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    said, goes_on = measuring._survived(SimpleNamespace(settle=lost), None)
    assert "the device was lost" in said and "illegal memory access" in said and not goes_on


STAND_IN = """
import os, time
from autotune import measuring
from autotune.cases import Case
from autotune.clock import Bench, Clock
from autotune.outcomes import BoxOver
from autotune.timing import Box
from impls import ChunkTorchConfig

class Misbehaving(Clock):
    def outcome(self, config):
        if config.heads == 4:
            os._exit(9)
        if config.heads == 8:
            time.sleep(600)
        if config.heads == 32:
            self.watch.settle = lost
        return super().outcome(config)

def lost():
    raise RuntimeError("an illegal memory access was encountered")

measuring.Clock = Misbehaving

if __name__ == "__main__":
    bench = Bench("chunk_torch", Case("tiny", 1, 64, 2, 16, 16), "float32", "cpu", 1)
    with measuring.Guarded(bench, ChunkTorchConfig(), Box(600)) as guarded:
        for heads in (16, 4, 16, 8, 32, 16):
            guarded.seconds = 2.0 if heads == 8 else 120.0  # what is honest may wait for a busy machine
            found = guarded.outcome(ChunkTorchConfig(heads=heads))
            print(found.status, found.message)
    print(guarded.process)
    try:
        measuring.Guarded(bench, ChunkTorchConfig(chunk_size=17), Box(600)).outcome(ChunkTorchConfig())
    except RuntimeError as error:
        print(error)
"""
"""A stand-in for a clock on a device that dies, hangs and gets lost; processes are spawned, and import the script."""


def test_what_dies_hangs_or_loses_the_device_costs_its_own_trial_only(tmp_path):
    script = tmp_path / "misbehaving.py"
    script.write_text(STAND_IN)
    run = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *trials, default = run.stdout.splitlines()
    assert trials == [
        "measured None",
        "failed it ended its process with status 9",
        "measured None",
        "failed it took more than 2 s and was killed",
        "failed the device was lost: RuntimeError: an illegal memory access was encountered",
        "measured None",
        "None",
    ]
    assert default.startswith("the default configuration does not run: ValueError")
