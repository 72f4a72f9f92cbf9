"""Anybody's kernel through a class, a registered name or a ready-made record; what does not fit is named."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest
import torch

from verify import adapters, session
from verify.__main__ import main
from verify.drawing import neutral
from verify.peers import PEERS, FlaSafeGate
from verify.recipes import GATES, Recipe
from verify.resolve import misfit, resolve
from verify.targets import TargetError, default_contract

HERE = Path(__file__).parent
FILE = HERE / "my_adapter.py"
SMOKE = ("--profile", "smoke", "--max-examples", "4", "--property", "reference_forward")


def test_an_adapter_says_what_it_takes():
    target = resolve("my_adapter:Transposed", "cpu", adapter=str(FILE))
    assert target.foreign and target.dtypes == ("float32",)
    assert target.refused == {"varlen": "one batch a call", "g < -5": "documented bound"}
    assert target.named == {"scale", "initial_state", "output_final_state"}
    assert {neutral(Recipe(T=8, gates=g), target).gates for g in GATES} <= {
        *("zero", "mild", "long_memory", "per_head", "bounded")
    }


def test_an_adapter_is_judged_replayed_and_called_by_its_script(command, tmp_path):
    ended = command("--adapter", f"{FILE}:Undecayed", *SMOKE, "--out", tmp_path)
    assert ended.code == session.FAILED, ended
    assert "UNSUPPORTED varlen: one batch a call" in ended.out
    (line,) = [x for x in ended.out.splitlines() if "--replay" in x]
    assert command(*line.split()[3:]).code == session.FAILED
    (script,) = tmp_path.glob("*.py")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}  # what the adapter imports; nothing of the judge
    run = subprocess.run([sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert max(float(x.split()[-1]) for x in run.stdout.splitlines() if "largest difference" in x) > 1e-5


@pytest.mark.parametrize(
    "name, message",
    [
        ("Misspelt", "refuses must name some of .*got 'varlem' .did you mean varlen"),
        ("NoCall", "expected a class with __call__"),
        ("Transpose", "no Transpose in my_adapter; did you mean Transposed"),
    ],
)
def test_what_is_no_adapter_is_named(name, message):
    with pytest.raises(TargetError, match=message):
        resolve(f"my_adapter:{name}", "cpu", adapter=str(FILE))


SIGNATURES = [
    (lambda q, k, v: None, "takes 3 of the five tensors"),
    (lambda q, k, v, g, beta, chunk: None, "chunk would have no value"),
    (lambda q, k, v, g, beta, *, mask: None, "mask would have no value"),
    (lambda q, k, v, g, beta, initial_state, output_final_state, eps=1.0: None, None),
    (lambda *tensors, **keywords: None, None),
    (torch.add, None),
]


@pytest.mark.parametrize("function, reason", SIGNATURES, ids=range(len(SIGNATURES)))
def test_a_function_that_cannot_be_called_as_chunk_kda_is_refused(function, reason):
    found = misfit(function)
    assert found is None if reason is None else reason in found


def test_a_wrong_signature_is_exit_code_2(monkeypatch, capsys):
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    monkeypatch.setenv("PYTHONPATH", paths)
    assert main(["broken_kernels:_unlike_chunk_kda", *SMOKE]) == session.USAGE
    assert "expected f(q, k, v, g, beta, *, scale" in " ".join(capsys.readouterr().out.split())


def test_registered_names_are_targets_that_nobody_imports_unasked(monkeypatch, capsys):
    point = EntryPoint("their_kernel", "my_adapter:Transposed", adapters.GROUP)
    monkeypatch.setattr(adapters, "entry_points", lambda group: [point] if group == adapters.GROUP else [])
    sys.modules.pop("my_adapter", None)
    assert main(["--list"]) == session.PASS
    assert "their_kernel" in capsys.readouterr().out and "my_adapter" not in sys.modules
    assert resolve("their_kernel", "cpu").refused["varlen"] == "one batch a call"


def test_a_contract_of_an_adapter_is_a_dtype_or_a_function():
    made = type("A", (), {"__call__": lambda *x: None, "contract": "bfloat16"})
    assert adapters.adapted("a", made, "cpu", None).contract("float32") == default_contract("bfloat16")
    assert adapters.adapted("a", made, "cpu", "float16").contract("float32") == default_contract("float16")
    own = type("B", (), {"__call__": lambda *x: None, "contract": staticmethod(lambda dtype: (dtype, "mine"))})
    assert adapters.adapted("b", own, "cpu", None).contract("float32") == ("float32", "mine")


def test_peers_are_named_with_what_they_need():
    families = {name for name in PEERS if name.startswith("transformers_")}
    assert len(families) == 6 and {"fla", "fla_safe_gate", "fla_recurrent", "flash_kda"} <= set(PEERS)
    assert not PEERS["flash_kda"].installed
    assert PEERS["fla_safe_gate"].keywords == {"safe_gate": True}
    assert FlaSafeGate.settle(Recipe(activation="softplus")).activation == "lower_bound"


@pytest.mark.skipif(not any(distributions(name="fla-core")), reason="fla-core is not installed")
def test_flas_kernels_are_judged_without_a_gpu(command):
    ended = command("fla_recurrent", "--profile", "smoke", "--property", "reference_forward,causality")
    assert ended.code == session.PASS, ended
    assert "on interpret" in ended.out
