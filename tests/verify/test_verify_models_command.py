"""`python -m verify kimi_linear` as people run it: verdicts, exit codes, files to see a failure again."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

pytest.importorskip("safetensors", reason="safetensors is not installed (pip install kda-forge[model])")

from safetensors.numpy import load_file

from kda_spec import forward, settings_of
from verify import records, selftest, session
from verify.__main__ import main
from verify.models import command as models
from verify.models import judge, mutants, targets
from verify.models.properties import PROPERTIES
from verify.plan import PROFILES

ROOT = Path(__file__).parents[2]
SMOKE = ("--profile", "smoke", "--max-examples")
BROKEN = "model-mutant:last_of_equals"


def judge_here(batches, listen, **how):
    """Stand in for session.run where worker processes are not the point: they take seconds to start."""
    verdicts = {}
    for plan in (plan for batch in batches for plan in batch):
        verdict = verdicts[plan.target] = session.Verdict(plan.target)

        def emit(kind, verdict=verdict, **fields):
            record = json.loads(records.line({"schema": records.SCHEMA, "kind": kind, **fields}))
            assert Draft202012Validator(records.DEFINITIONS).is_valid(record), record
            verdict.add(record)
            listen(record)

        judge.judge(plan, emit)
    return verdicts


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(session, "run", judge_here)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """Judge a model that takes the last of equal experts; returns the folder of its failure."""
    folder = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run", judge_here)
        assert main([BROKEN, *SMOKE, "12", "--property", "router_ties", "--out", str(folder)]) == session.FAILED
    return folder


@pytest.fixture
def failure(found, tmp_path) -> Path:
    """Return the file of that failure, a copy of its own."""
    [path] = shutil.copytree(found, tmp_path / "found").glob("*.json")
    return path


def test_exit_code_0_kimi_linear_beside_the_definition(command, tmp_path):
    """Run worker processes on the model itself."""
    path = tmp_path / "records.jsonl"
    ended = command("kimi_linear", *SMOKE, 6, "--json", path, "--out", tmp_path)
    assert ended.code == session.PASS, ended.out + ended.err
    assert "no counterexample in 6 cases of these families" in ended.out
    lines = records.read(path)
    assert [x["kind"] for x in lines] == ["run", *6 * ["case"], "target", "summary"]
    assert all(Draft202012Validator(records.DEFINITIONS).is_valid(x) for x in lines)
    assert all(float(r["ratio"]) < 1 for x in lines[1:7] for r in x["results"].values())


def test_exit_code_1_with_the_smallest_case_and_a_command_to_see_it_again(here, tmp_path, capsys):
    assert main([BROKEN, *SMOKE, "12", "--property", "router_ties", "--out", str(tmp_path)]) == session.FAILED
    shown = capsys.readouterr().out
    assert f"FAIL {BROKEN} :: router_ties" in shown and "layers=k prompts=[1] tail=1" in shown
    again = next(line for line in shown.splitlines() if "--replay" in line).split()
    assert again[:5] == ["python", "-m", "verify", BROKEN, "--replay"]
    assert main(again[3:]) == session.FAILED
    assert "router_ties" in capsys.readouterr().out


def test_a_failure_keeps_the_checkpoint_that_shows_it(failure):
    folder = failure.with_suffix("")
    texts = json.loads((folder / "texts.json").read_text())
    tensors = {
        name: x.astype(np.float64) for path in folder.glob("*.safetensors") for name, x in load_file(path).items()
    }
    settings = settings_of(json.loads((folder / "config.json").read_text()))
    out = forward(np.array(texts["ids"][:1]), tensors, settings)
    assert np.all(out.routings[0].margin == 0) and texts["tail"] == 1


def test_a_failure_that_is_mended_passes_its_replay(failure, here, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "find", lambda target, find=mutants.find: find(f"{targets.MUTANT}clean"))
    assert main([BROKEN, "--replay", str(failure)]) == session.PASS
    assert f"{BROKEN}: pass: router_ties holds on this case now" in capsys.readouterr().out


TAMPERED = [
    (lambda d: d["recipe"].update(width=65), "recipe.width: 65 is greater than the maximum of 64"),
    (lambda d: d["recipe"].update(layers="x"), "'x' does not match"),
    (lambda d: d["recipe"].update(seed=d["recipe"]["seed"] + 1), "its recipe now makes other inputs"),
    (lambda d: d["recipe"].update(top_groups=2), "top_groups must be at most groups"),
    (lambda d: d.update(property="causality"), "expected the failure of a property of a model"),
    (lambda d: d.update(schema=2), "expected a failure record of schema version 1"),
    (lambda d: d.update(target="kimi_linear"), "the file names kimi_linear, got model-mutant:last_of_equals"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED)
def test_a_file_from_anybody_is_checked_before_anything_runs(change, message, failure, capsys):
    data = json.loads(failure.read_text())
    change(data)
    failure.write_text(json.dumps(data))
    assert main([BROKEN, "--replay", str(failure)]) == session.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kimi_linear", "recurrent_torch"), "kimi_linear is judged alone, got kimi_linear recurrent_torch"),
        (("kimi_linear", "--config", "pyproject.toml"), "--config: for implementations of the op"),
        (("kimi_linear", "--head-dims", "4"), "--head-dims: for implementations of the op, kimi_linear is a model"),
        (("kimi_linear", "--device", "cuda:0"), "kimi_linear is judged on cpu in float32, got cuda:0"),
        (("kimi_linear", "--dtype", "bfloat16"), "kimi_linear is judged on cpu in float32, got bfloat16"),
        (("kimi_linear", "--max-examples", "0"), "--max-examples must be at least 1, got 0"),
        (("kimi_linear", "--property", "causality"), "unknown property causality; a model has prefill, decode"),
        (("kimi_linear", "--explain", "causality"), "unknown property causality; a model has prefill, decode"),
        (("kimi_linear", "--replay", "nowhere.json"), "--replay nowhere.json: No such file or directory"),
    ],
)
def test_exit_code_2_says_what_was_expected(arguments, message, capsys):
    assert main(list(arguments)) == session.USAGE
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


def test_exit_code_2_a_model_whose_package_is_missing(here, monkeypatch, capsys):
    monkeypatch.setitem(targets.TARGETS, "kimi_linear", "no_such_package.verification:load")
    monkeypatch.setattr(session, "run", lambda batches, listen: {"kimi_linear": _refused(batches[0][0])})
    assert main(["kimi_linear", *SMOKE, "1"]) == session.USAGE
    assert "kimi_linear cannot be judged: no_such_package.verification:load: No module" in capsys.readouterr().out


def _refused(plan) -> session.Verdict:
    """Do what a worker does with the error."""
    verdict = session.Verdict(plan.target)
    with pytest.raises(targets.TargetError) as raised:
        judge.judge(plan, lambda kind, **fields: None)
    verdict.add({"kind": "usage", "target": plan.target, "reason": str(raised.value), "trace": ""})
    return verdict


INNOCENT = replace(mutants.CLEAN, name="innocent")
LOUD = next(m for m in mutants.MUTANTS if m.name == "gated_norm_missing")


@pytest.mark.parametrize("name", ["model:nothing", "model:", "model:json:", "model:json:no_such_loader"])
def test_a_model_of_anybody_that_is_not_there_is_named(name):
    with pytest.raises(targets.TargetError, match=f"{name} cannot be judged: "):
        targets.resolve(name)


def test_anybody_s_model_is_judged_with_the_forms_that_it_takes(here, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    source = """
from verify.models.mutants import find
def load(folder):
    return find("model-mutant:clean")(folder)
load.refuses = ("per_head", "KDA alone")
"""
    (tmp_path / "their_model.py").write_text(source)
    out = ("--out", str(tmp_path), "--json", str(tmp_path / "records.jsonl"))
    assert main(["model:their_model:load", *SMOKE, "8", *out]) == session.PASS
    assert re.search(r"UNSUPPORTED per_head, [1-9]\d% of the recipes", capsys.readouterr().out)
    met = [x["recipe"] for x in records.read(tmp_path / "records.jsonl") if x["kind"] == "case"]
    assert len(met) == 8 and all(r["gate"] != "per_head" and "m" in r["layers"] for r in met)


@pytest.mark.parametrize(("planted", "code", "dead"), [(LOUD, session.PASS, 1), (INNOCENT, session.SURVIVOR, 0)])
def test_the_self_test_judges_the_judge(planted, code, dead, here, monkeypatch, tmp_path, capsys):
    suite = selftest.Suite(targets.MUTANT, mutants.CLEAN, [planted], PROPERTIES, ("float32",))
    monkeypatch.setattr(models, "SUITE", suite)
    monkeypatch.setattr(mutants, "MUTANTS", [planted])
    monkeypatch.setitem(PROFILES, "quick", replace(PROFILES["quick"], examples=2, tokens=5))
    path = tmp_path / "matrix.jsonl"
    assert main(["kimi_linear", "--self-test", "--json", str(path)]) == code
    shown, [record] = capsys.readouterr().out, records.read(path)
    assert f"1 mutants, {dead} killed" in shown and "the clean control passes (2 cases)" in shown
    assert record["control"] == [] and bool(record["matrix"][planted.name]) == bool(dead)


def test_properties_are_listed_and_explained(capsys):
    assert main(["kimi_linear", "--list"]) == session.PASS
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [p.name for p in PROPERTIES]
    assert main(["kimi_linear", "--explain", "absorbed"]) == session.PASS
    assert "W_K,h^T q_nope" in capsys.readouterr().out


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.name)
def test_every_property_says_what_it_claims_and_what_it_would_have_caught(prop):
    assert prop.explanation.splitlines()[0].endswith((".", ",", "=")) or prop.explanation.count("\n") > 1
    assert prop.name == "fork" or "Would have caught" in prop.explanation


WITHOUT = """
import sys
sys.modules["safetensors"] = None
from verify.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("kimi_linear",), session.USAGE, "python -m verify: a model needs safetensors: install kda-forge[model]"),
        (("--explain", "causality"), session.PASS, ""),
    ],
)
def test_only_models_need_safetensors(arguments, code, message):
    ended = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code and ended.stderr.strip() == message


@pytest.mark.slow
def test_every_mutant_dies_and_the_control_passes_on_the_quick_profile(command):
    ended = command("kimi_linear", "--self-test")
    assert ended.code == session.PASS, ended.out + ended.err
    assert f"{len(mutants.MUTANTS)} mutants, {len(mutants.MUTANTS)} killed" in ended.out
    assert "properties that killed no mutant: none" in ended.out
