"""Files of failing cases: what may come from anybody is checked before it is used, and what they say is not code."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from impls import ops, table
from verify import records, replay
from verify.families import materialise
from verify.mutants import CLEAN
from verify.recipes import Recipe
from verify.trial import Measure

HERE = Path(__file__).parent


def failure_of(target: str, **changes) -> dict:
    """Make a failure record without a run."""
    recipe = Recipe(T=2).to_json()
    inputs = materialise(Recipe(T=2)).digest()
    plain = {"schema": records.SCHEMA, "kind": "failure", "target": target, "device": "cpu", "property": "split"}
    filled = {"recipe": recipe, "steady": True, "inputs": inputs, "config": None, "contract": None}
    return plain | filled | records.outcome(Measure("o", 2.0, 1.0, where="row (0, 0)")) | changes


def made_script(folder: Path, **failure) -> str:
    return replay.save(folder, failure_of(**failure)).with_suffix(".py").read_text(encoding="utf-8")


def test_a_saved_failure_is_read_back(tmp_path):
    failure = failure_of("chunk_torch", property="split@-inf", contract=None)
    read = replay.load(replay.save(tmp_path, failure))
    assert {k: v for k, v in read.items() if k != "versions"} == failure


@pytest.mark.parametrize("target", ["recurrent_torch", "chunk_torch"])
def test_the_script_of_a_table_row_calls_that_row(tmp_path, target, monkeypatch):
    called = []
    whole = {name: table.find(name) for name in ("recurrent_torch", "chunk_torch")}

    def find(name):
        called.append(name)
        return whole[name]

    monkeypatch.setattr(ops, "find", find)
    exec(made_script(tmp_path, target=target), {"__name__": "__main__"})
    assert called == [target]


def test_the_script_of_an_interpreted_kernel_interprets_with_bfloat16_mended(tmp_path):
    recipe = Recipe(T=10, dtype="bfloat16")
    made = {"recipe": recipe.to_json(), "inputs": materialise(recipe).digest(), "device": "interpret"}
    replay.save(tmp_path, failure_of("interpreted_kernel:wrong_tenth", **made))
    (path,) = tmp_path.glob("*.py")
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    differences = [float(x.split()[-1]) for x in run.stdout.splitlines() if "largest difference" in x]
    assert len(differences) == 2, run.stderr
    assert 0.1 < max(differences) < 10


def test_a_script_finds_the_kernel_in_the_folder_where_it_is_run(tmp_path):
    (tmp_path / "mine.py").write_text((HERE / "broken_kernels.py").read_text())
    folder = tmp_path / "verify-results"
    replay.save(folder, failure_of("mine:undecayed"))
    (path,) = folder.glob("*.py")
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run([sys.executable, path], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "largest difference" in run.stdout, run.stderr


@pytest.mark.parametrize("device, place", [("cpu", "cpu"), ("interpret", "cpu"), ("cuda:1", "cuda:1")])
def test_a_script_puts_its_tensors_where_the_kernel_ran(tmp_path, device, place):
    recipe = Recipe(T=2, lengths=(1, 1))
    made = {"recipe": recipe.to_json(), "inputs": materialise(recipe).digest(), "device": device}
    text = made_script(tmp_path, target="recurrent_torch", **made)
    assert f".to({place!r}, dtype)" in text
    assert f"torch.tensor([0, 1, 2], device={place!r})" in text


@pytest.mark.parametrize("kernel, shown", [("state_forgotten", "got      None"), ("returns_o_only", "o\n  got      [")])
def test_the_script_shows_what_is_no_pair_of_tensors(tmp_path, capsys, kernel, shown):
    exec(made_script(tmp_path, target=f"broken_kernels:{kernel}"), {"__name__": "__main__"})
    assert shown in capsys.readouterr().out


RAW = {"activation": "softplus", "sigmoid": "sigmoid", "l2norm": True, "state": True}


@pytest.mark.parametrize("how", [{}, {"B": 2, "state": True}, RAW, {"lengths": (2, 3), "T": 5}])
def test_the_script_of_a_wrong_gradient_shows_every_gradient(tmp_path, capsys, how):
    recipe = Recipe(**{"T": 5, "K": 3, "V": 4} | how)
    made = {"recipe": recipe.to_json(), "inputs": materialise(recipe).digest(), "property": "reference_backward"}
    exec(made_script(tmp_path, target="chunk_torch", **made), {"__name__": "__main__"})
    shown = capsys.readouterr().out.splitlines()
    names = ["o", "final_state", "dq", "dk", "dv", "dg", "dbeta"]
    names += ["dinitial_state"] * recipe.state + ["dA_log", "ddt_bias"] * (recipe.activation == "softplus")
    assert [x for x in shown if x[0] != " "] == names
    differences = [float(x.split()[-1]) for x in shown if "largest difference" in x]
    assert len(differences) == len(names) and max(differences) < 1e-4


def test_a_script_says_where_one_call_does_not_show_the_failure(tmp_path, capsys):
    exec(made_script(tmp_path, target="chunk_torch", property="gated_deltanet"), {"__name__": "__main__"})
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("gated_deltanet asks for more than this call: `python -m verify chunk_torch --replay`")
    assert "asks for more" not in made_script(tmp_path, target="chunk_torch", property="reference_forward")


HOSTILE = [
    '"""\nimport os',
    "\r\nraise SystemExit",
    "\x0c\x00\u2028raise SystemExit",
    "\\",
    "\udc80",
    "coding: rot13",
    "{target}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_target_says_does_not_become_code(tmp_path, text):
    calm = made_script(tmp_path, target="broken_kernels:undecayed", what="raised", where="")
    hostile = made_script(tmp_path, target="broken_kernels:undecayed", what=f"raised {text}", where=text)
    assert ast.dump(ast.parse(hostile)) == ast.dump(ast.parse(calm))


def test_a_mutant_gets_no_script(tmp_path):
    replay.save(tmp_path, failure_of(f"mutant:{CLEAN.name}"))
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


SIZES = {
    "huge": {"T": 10**9},
    "no tokens, huge state": {"T": 0, "K": 10**5, "V": 10**5},
    "many empty sequences": {"T": 0, "lengths": [0] * 1000, "K": 1000, "V": 1000},
    "beyond any integer": {"seed": 0, "B": 10**30},
    "a batch of packed sequences": {"B": 2, "T": 3, "lengths": [1, 2]},
    "lengths that miss a token": {"T": 4, "lengths": [1, 2]},
    "a float": {"T": 3.0},
    "a float length": {"T": 3, "lengths": [3.0]},
    "a word": {"T": "3"},
    "true": {"T": True},
    "negative": {"seed": -1},
    "nothing": {"H": 0},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_recipe_that_nothing_can_or_should_be_made_of_is_refused_before_it_is_made(tmp_path, monkeypatch, sizes):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(failure_of("recurrent_torch", recipe=Recipe().to_json() | sizes)))
    monkeypatch.setattr(replay, "materialise", None)
    with pytest.raises(ValueError, match="recipe"):
        replay.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inputs": "0123456789abcdef"}, "hash .*recorded 0123456789abcdef"),
        ({"schema": 2}, "expected a failure record of schema version 1"),
        ({"kind": "case"}, "expected a failure record"),
        ({"property": "beauty"}, "unknown property beauty"),
        ({"recipe": {"version": 7}}, "recipe"),
        ({"recipe": "a case"}, "recipe: 'a case' is not of type 'object'"),
        ({"contract": ...}, "'contract' is a required property"),
        ({"contract": "zzz"}, "contract: 'zzz' is not"),
        ({"device": 3}, "device: 3 is not of type 'string'"),
        ({"property": ["split"]}, "property: .'split'. is not of type 'string'"),
        ({"target": "broken_kernels:__import__('os')"}, "expected a target like package.module:function"),
        ({"target": "broken_kernels:undecayed\n"}, "expected a target like package.module:function"),
        ({"colour": "red"}, "colour.* unexpected"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_case_file_that_would_replay_something_else_is_refused(tmp_path, changes, message):
    changed = {k: v for k, v in (failure_of("broken_kernels:undecayed") | changes).items() if v is not ...}
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        replay.load(path)


@pytest.mark.parametrize("text", [None, "", "[]", "no JSON", "[" * 100_000, "\x00"], ids=lambda x: str(x)[:9])
def test_a_file_that_is_no_case_is_refused(tmp_path, text):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="--replay .*file.json: "):
        replay.load(path)
