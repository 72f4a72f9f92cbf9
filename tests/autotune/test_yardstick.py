"""KDA held against general DPLR: what is counted, compiled and timed is told, and kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autotune import yardstick
from autotune.__main__ import main
from autotune.outcomes import INTERRUPTED, PASS, UNFINISHED, USAGE
from impls.targets import TARGETS
from reports import load

ROOT = Path(__file__).resolve().parents[2]


def test_both_are_the_same_function_on_the_same_tokens():
    calls = yardstick._calls(48, 2, "float32", "cpu")
    (o, S), (expected, final) = calls["dplr"](), calls["kda"]()
    assert torch.allclose(o, expected, atol=1e-6) and torch.allclose(S, final, atol=1e-6)


def test_counts_do_not_hang_on_the_length():
    few, many = (yardstick.counted(T, 16, "bfloat16", TARGETS["sm_90"]) for T in (2048, 65536))
    assert few["flops"]["dplr_over_kda"] == pytest.approx(1.41, abs=0.005) == many["flops"]["dplr_over_kda"]
    assert few["bytes"]["dplr_over_kda"] == pytest.approx(many["bytes"]["dplr_over_kda"], rel=0.02)
    assert few["launches"] == {"kda": 2, "dplr": 2}


def test_the_table_says_what_was_measured_and_the_file_keeps_it(tmp_path):
    """In a process that compiles: this one interprets."""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "autotune", "yardstick", "--tokens", "128,64", "--heads", "1", "--out", "y.json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == PASS, run.stderr
    assert "general DPLR over KDA" in run.stdout and "0 bytes spilled" in run.stdout
    found = json.loads((tmp_path / "y.json").read_text())
    assert (found["kind"], found["schema"]) == ("yardstick", 1) and [x["T"] for x in found["timed"]] == [64, 128]
    launches = found["compiled"]["launches"]
    assert all(launches["dplr"][x]["code"]["tensor"] > launches["kda"][x]["code"]["tensor"] for x in ("intra", "walk"))


def test_what_is_missing_is_said(capsys):
    assert main(["yardstick", "--tokens", "64", "--heads", "1", "--minutes", "1e-9"]) == UNFINISHED
    told = capsys.readouterr().out
    assert "not timed" in told and "not compiled: " in told and "TRITON_INTERPRET" in told


def test_lengths_that_are_finished_are_kept_and_not_timed_again(tmp_path, monkeypatch):
    """Interrupted in the second of two lengths; the same command times that one alone."""
    out, begun, real = tmp_path / "y.json", [], yardstick.timed

    def interrupted(T, *others):
        begun.append(T)
        if T == 128 and len(begun) == 2:
            raise KeyboardInterrupt
        return real(T, *others)

    monkeypatch.setattr(yardstick, "timed", interrupted)
    monkeypatch.setattr(yardstick.provenance, "sources", lambda: "as they are")
    command = ["yardstick", "--tokens", "64,128", "--heads", "1", "--out", str(out)]
    assert main(command) == INTERRUPTED
    first = json.loads(out.read_text())["timed"]
    assert [x["T"] for x in first] == [64]
    assert main(command) == PASS and begun == [64, 128, 128]
    found = json.loads(out.read_text())["timed"]
    assert found[0] == first[0] and [x["T"] for x in found] == [64, 128]
    assert [x.kind for x in load.read([out])] == ["yardstick"], "reports read it"
    assert main([*command, "--heads", "2"]) == PASS and begun[3:] == [64, 128]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(yardstick, "timed", None)
    (tmp_path / "there").touch()
    assert main(["yardstick", "--tokens", "64", "--out", str(tmp_path / "there" / "y.json")]) == USAGE
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--target", "sm_1"], "--target must be one of"),
        (["--heads", "0"], "--heads"),
        (["--device", "gpu"], "--device"),
    ],
)
def test_usage_is_exit_code_2_and_one_line(capsys, arguments, message):
    assert main(["yardstick", *arguments]) == USAGE
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
