"""Captured inputs: what a trained layer gave its recurrence is one more family, cut from a file by recipes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from verify import captured
from verify.__main__ import main
from verify.captured import CapturedError
from verify.drawing import strategy_of
from verify.exact import round_to
from verify.families import materialise
from verify.plan import Plan
from verify.recipes import Recipe, drawn, from_json
from verify.resolve import resolve

FILE = Path(__file__).parent / "captured-mqar-kda.safetensors"
"""Two sequences of 24 tokens of an MQAR toy with 98.9% accuracy: its first layer, 2 heads of 16 channels."""


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return load_file(FILE)


def recipe(**changes) -> Recipe:
    return captured.recast(replace(Recipe(B=2, T=9, H=2, K=16, V=16, seed=3), **changes), captured.named(FILE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_case_is_a_window_of_the_file(arrays, dtype):
    case = materialise(recipe(dtype=dtype, B=1, H=1))
    windows = [
        (b, t, h)
        for b in range(2)
        for t in range(24)
        for h in range(2)
        if np.array_equal(case.q[0, :, 0], round_to(np.roll(arrays["q"], -t, axis=1)[b, :9, h].astype(float), dtype))
    ]
    [(b, t, h)] = windows
    for name in ("k", "v", "g"):
        expected = round_to(np.roll(arrays[name], -t, axis=1)[b, :9, h].astype(float), case.gate_dtype)
        assert np.array_equal(getattr(case, name)[0, :, 0], expected)


def test_a_trained_layer_is_no_random_one():
    case = materialise(recipe(T=24))
    keys = case.k[0, :, 0] / np.linalg.norm(case.k[0, :, 0], axis=-1, keepdims=True)
    assert (keys @ keys.T - np.eye(24)).max() > 0.85  # the same key again, after other tokens
    assert case.g.min() < -5 and case.g.max() > -1e-4


@pytest.mark.parametrize(
    "sizes", [{"T": 100}, {"B": 5, "H": 3}, {"K": 5, "V": 33}, {"T": 0}, {"B": 1, "lengths": (4, 0, 5)}]
)
def test_any_size_is_cut_and_stays_in_the_domain(sizes):
    case = materialise(recipe(**sizes))
    size = {"B": 2, "T": 9, "H": 2, "K": 16, "V": 16} | sizes
    assert case.q.shape == tuple(size[x] for x in "BTHK") and case.v.shape == tuple(size[x] for x in "BTHV")
    assert case.cu_seqlens == ((0, 4, 4, 9) if "lengths" in sizes else None)
    assert (case.beta * np.sum(case.k * case.k, axis=-1) <= 1).all()


def test_seeds_choose_other_windows():
    cases = [materialise(recipe(seed=seed)) for seed in range(20)]
    assert len({case.digest() for case in cases}) > 15
    assert materialise(recipe(seed=3)).digest() == cases[3].digest()


def test_recipes_are_stored_with_their_file_and_older_ones_without():
    made = recipe()
    assert from_json(json.loads(json.dumps(made.to_json()))) == made
    assert "captured" not in Recipe().to_json()


def test_every_recipe_of_a_plan_is_of_the_file():
    plan = Plan("chunk_torch", "cpu", "smoke", ("float32",), 0, 6, inputs=captured.named(FILE))
    strategy = strategy_of(plan, resolve("chunk_torch", "cpu"), "float32")
    met = [drawn(strategy, number) for number in range(12)]
    assert all(x.captured == plan.inputs and x.K <= 16 and x.plain and x.conditioning == "beta<=1" for x in met)
    assert len({(x.B, x.T, x.H, bool(x.lengths), x.state) for x in met}) > 6


def test_implementations_are_judged_on_a_captured_file(tmp_path, capsys):
    run = ["chunk_torch", "--inputs", str(FILE), "--profile", "smoke", "--json", str(tmp_path / "run.jsonl")]
    assert main([*run, "--out", str(tmp_path / "failures")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    cases = [x for x in records if x["kind"] == "case"]
    assert cases and all(x["recipe"]["captured"].startswith(str(FILE)) for x in cases)
    assert {"reference_forward", "causality"} <= {name for x in cases for name in x["results"]}


def test_runs_on_other_inputs_are_neither_gone_on_with_nor_joined(tmp_path, arrays, in_process, capsys):
    path = tmp_path / "a.safetensors"
    only = ["chunk_torch", "--profile", "smoke", "--property", "causality", "--max-examples", "2"]

    def run(code: int, inputs: list[str], *more: str) -> None:
        assert main([*only, *inputs, *more]) == code

    def shard(i: int) -> str:
        return str(tmp_path / f"{i}.jsonl")

    save_file(arrays, path)
    run(0, ["--inputs", str(path)], "--shard", "1/2", "--json", shard(1))
    save_file(arrays | {"v": arrays["v"] * 2}, path)
    for inputs in (["--inputs", str(path)], []):
        run(2, inputs, "--shard", "1/2", "--json", shard(1), "--resume")
        assert f"is of another run: inputs {path}#" in capsys.readouterr().err
        run(0, inputs, "--shard", "2/2", "--json", shard(2))
        assert main(["merge", shard(1), shard(2), "-o", str(tmp_path / "all.jsonl")]) == 2
        assert f"is of another run than {shard(1)}: inputs {path}#" in capsys.readouterr().err


def test_a_kernel_that_is_wrong_on_them_is_found_and_its_case_replayed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FILE.parents[2]), str(FILE.parent)]))
    out = tmp_path / "failures"
    target = ["broken_kernels:undecayed"]
    assert (
        main(
            [*target, "--inputs", str(FILE), "--profile", "smoke", "--property", "reference_forward", "--out", str(out)]
        )
        == 1
    )
    [failure] = out.glob("*.json")
    assert json.loads(failure.read_text())["recipe"]["captured"].startswith(str(FILE))
    assert main([*target, "--replay", str(failure)]) == 1


BAD = {
    "expected q, k, v, g and beta, got no beta": lambda x: {name: x[name] for name in "qkvg"},
    "shapes of q, k, v, g and beta must fit": lambda x: x | {"v": x["v"][:, :-1]},
    "q and v must be": lambda x: x | {"q": x["q"][0]},
    "v must be finite": lambda x: x | {"v": x["v"] * np.nan},
    "g must be at most 0": lambda x: x | {"g": -x["g"]},
    "keys must be normalised, got one of length 3": lambda x: x | {"k": 3 * x["k"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_outside_of_the_domain_is_refused_by_name(tmp_path, arrays, message, capsys):
    path = tmp_path / "bad.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in BAD[message](arrays).items()}, path)
    assert main(["chunk_torch", "--inputs", str(path)]) == 2
    said = capsys.readouterr().err
    assert "--inputs" in said and "bad.safetensors: " + message in said


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"", "no safetensors"), (b"{}" * 9, "no saf")]
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content, message, capsys):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main(["chunk_torch", "--inputs", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_another_file_under_the_same_name_is_refused(tmp_path, arrays):
    path = tmp_path / "a.safetensors"
    save_file(arrays, path)
    name = captured.named(path)
    save_file(arrays | {"v": arrays["v"] * 2}, path)
    with pytest.raises(CapturedError, match="expected the file with SHA-256"):
        captured.read(name)
