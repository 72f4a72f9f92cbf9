"""Measuring and compiling on a dask cluster of two workers on this machine; the race and the judge stay here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autotune import judge, tune
from autotune.__main__ import main
from autotune.arguments import implementation_of, problem_of
from autotune.cases import Case
from autotune.clock import Bench
from autotune.outcomes import PASS, USAGE, UsageError
from autotune.search import FAILED, MEASURED
from autotune.space import Setting, space_of
from autotune.timing import Box
from impls import ChunkTorchConfig, tuned

pytest.importorskip("distributed", reason="pip install 'kda-forge[fleet]'")

from autotune import fleet  # it needs nothing of dask until a scheduler is named
from verify.cluster import cluster

ROOT = Path(__file__).parents[2]
TINY = ["--op", "chunk_torch", "--tokens", "64", "--heads", "2", "--head-dim", "16", "--fix", "compile=false"]
BENCH = Bench("chunk_torch", Case("tune", 1, 64, 2, 16, 16), "float32", "cpu", 1)
DEFAULT = ChunkTorchConfig(compile=False)


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the workers compile
        with cluster(processes=2, resources={"CPU": 1}) as found:
            yield found


def address(pool) -> str:
    return pool.client.scheduler.address


def tried(found: fleet.Fleet, *configs) -> dict:
    left = list(configs)
    found.box = Box(60.0)
    return dict(found.outcomes(lambda flying: left.pop() if left else None))


def test_a_study_is_measured_by_all_workers_and_ends_in_a_file(pool, tmp_path, monkeypatch, capsys):
    passed = {"code": 0, "outcome": "passed", "counts": {}, "failed": [], "reason": None}
    monkeypatch.setattr(judge, "verified_config", lambda *asked: passed)
    monkeypatch.setattr(tune.study.clock, "FINAL", tune.study.clock.Effort(least=3, most=3, seconds=0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ["tune", *TINY, "--budget", "60s", "--scheduler", address(pool), "--out", str(tmp_path / "x"), "--json"]
    assert main(asked) == PASS
    [result] = json.loads(capsys.readouterr().out)["results"]
    setting = Setting(problem_of("T=64,H=2,K=16,V=16", "float32"))
    space = space_of(implementation_of("chunk_torch"), setting, {"compile": False})
    assert result["trials"] == space.counted().left == sum(result["entry"]["timing"]["ways"].values())
    assert tuned.read(Path(result["path"]))["entries"] == [result["entry"]]


def test_a_configuration_that_raises_is_a_failed_trial(pool):
    found = tried(fleet.Fleet(pool, BENCH, DEFAULT), DEFAULT, replace(DEFAULT, chunk_size=17))
    assert found[DEFAULT].status == MEASURED and found[replace(DEFAULT, chunk_size=17)].status == FAILED


def test_what_ends_its_worker_is_tried_once_more_and_then_to_blame(pool, monkeypatch):
    found, submitted = fleet.Fleet(pool, BENCH, DEFAULT), []

    def deadly(config):
        submitted.append(config)
        return pool.submit(os._exit, 3, resources={"CPU": 1})

    monkeypatch.setattr(found, "_submit", deadly)
    [outcome] = tried(found, DEFAULT).values()
    assert submitted == [DEFAULT] * 2 and outcome.status == FAILED


def test_what_the_cluster_lost_is_no_fault_of_a_configuration(pool, monkeypatch):
    found = fleet.Fleet(pool, BENCH, DEFAULT)
    monkeypatch.setattr("verify.cluster.VACANT", 0.0)
    monkeypatch.setattr(found, "_submit", lambda config: pool.submit(abs, 1, resources={"TPU": 1}))
    with pytest.raises(UsageError, match="no worker with TPU=1 is left"):
        tried(found, DEFAULT)


def test_a_worker_of_other_sources_is_refused(pool):
    found = fleet.Fleet(pool, BENCH, DEFAULT)
    found.about = found.about | {"sources": "others"}
    with pytest.raises(UsageError, match="is another: sources was 'others'"):
        tried(found, DEFAULT)


def test_a_cluster_without_such_a_device_is_refused(pool, monkeypatch):
    monkeypatch.setattr(fleet, "ANSWER", 0.0)
    with pytest.raises(UsageError, match="no worker offers GPU=1"):
        fleet.Fleet(pool, replace(BENCH, device="cuda:0"), DEFAULT)


def test_kernels_are_compiled_there(pool, tmp_path):
    pytest.importorskip("triton")
    small = ["--op", "recurrent_triton", "--shape", "T=64,H=1,K=16,V=16", "--fix", "stages=1", "--fix", "registers=0"]
    called = [sys.executable, "-m", "autotune", "static", *small, "--scheduler", address(pool)]
    about = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    clean = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(called, cwd=tmp_path, env=clean | about, capture_output=True, text=True)
    assert run.returncode == PASS and " 0 recalled" in run.stdout, run.stdout + run.stderr
    assert "0 kernels compiled" not in run.stdout and list((tmp_path / "kda-forge" / "compiled").glob("*.json"))


@pytest.mark.parametrize("command", ["tune", "static"])
def test_what_is_no_scheduler_is_a_usage_error(command, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([command, "--scheduler", "nonsense"]) == USAGE
    assert "autotune: --scheduler nonsense: expected the address of a dask scheduler" in capsys.readouterr().err


