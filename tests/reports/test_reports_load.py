"""Files of results are read, whatever wrote them, or refused by name and version."""

import json
import os
import shutil
import subprocess
import sys

import example_results as examples
import pytest

from reports import load

STORED = [*sorted((examples.ROOT / "results").glob("*.json")), *sorted((examples.ROOT / "impls/tuned").rglob("*.json"))]
WRITTEN = {
    "bench", "tuned", "trials", "static", "yardstick", "cpu prefill and decode", "cost of tuning",
    "benchmarks", "model prefill and decode", "model on a cpu", "synthetic tasks", "compile", "collected", "run",
    "case", "failure", "self-test",
}  # fmt: skip


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_every_stored_result_is_read_and_says_where_it_comes_from(path):
    [result] = load.read([path])
    assert result.data == json.loads(path.read_text())
    assert result.origin.device and result.origin.versions and result.origin.date.startswith("20")
    assert path.name in str(result.origin)


def test_the_one_schema_knows_every_writer():
    kinds = {rule["if"]["properties"]["kind"]["const"] for rule in json.loads(load.RESULT.read_text())["allOf"]}
    assert kinds >= WRITTEN
    assert kinds == set(json.loads(load.RESULT.read_text())["properties"]["kind"]["enum"])


def test_records_of_a_killed_run_are_read_up_to_their_last_whole_line(tmp_path):
    path = examples.lines(tmp_path / "a.jsonl", *examples.records(), unfinished='{"schema": 1, "ki')
    [result] = load.read([path])
    assert (result.kind, result.data) == (load.RECORDS, examples.records())


def test_records_may_have_any_name_and_hold_a_self_test(tmp_path):
    path = examples.lines(tmp_path / "records.json", *examples.records(), examples.self_test())
    assert [x.kind for x in load.read([path])] == [load.RECORDS, load.SELF_TEST]


def test_a_record_without_a_date_is_read_and_the_origin_says_so(tmp_path):
    run, *others = examples.records()
    del run["date"]
    [result] = load.read([examples.lines(tmp_path / "old.jsonl", run, *others)])
    assert result.origin.date is None and "date not recorded" in str(result.origin)


def test_records_of_a_model_from_before_caches_were_cut_back_are_read(tmp_path):
    numbers = (
        "seed dense width kda_heads head_dim taps mla_heads latent nope rope value experts top_k groups top_groups"
    )
    flags = "full_rank_gate full_rank_forget renormalise biased_weights plain_eps"
    recipe = {"version": 1, "layers": "km", "shared": 0, "gate": "softplus", "decay": "mild", "router": "even"}
    recipe |= dict.fromkeys(numbers.split(), 1) | dict.fromkeys(flags.split(), False)
    recipe |= {"count_from": 1, "prompts": [3], "tail": 1}
    case = examples.case("model", absorbed=examples.outcome(0.1)) | {"recipe": recipe}
    [result] = load.read([examples.lines(tmp_path / "old.jsonl", examples.records()[0], case)])
    assert result.data[1]["recipe"] == recipe


def test_folders_are_read_with_all_below_them_each_file_once(tmp_path):
    (tmp_path / "a").mkdir()
    path = examples.document(tmp_path / "a" / "model.json", examples.model())
    (tmp_path / "README.md").write_text("no result")
    assert [x.origin.file for x in load.read([tmp_path, path])] == ["a/model.json"]


BROKEN = [
    (lambda x: x | {"schema": 3}, r"schema version 3 of 'model prefill and decode'; readable: 1, 2"),
    (lambda x: x | {"schema": "1"}, r"schema version '1' of"),
    (lambda x: x | {"schema": True}, r"schema version True of"),
    (lambda x: {k: v for k, v in x.items() if k != "schema"}, r"schema version None of"),
    (lambda x: x | {"kind": "horoscope"}, r"unknown kind of result 'horoscope' \(schema version 1\)"),
    (lambda x: x | {"kind": ["a"]}, r"unknown kind of result \['a'\]"),
    (lambda x: {"schema": 1}, r"unknown kind of result ''"),
    (lambda x: x | {"rows": [{"model": "a"}]}, r"no result of kind 'model prefill and decode', version 1: rows/0: "),
    (lambda x: x | {"more": 1}, r"version 1: the whole: Additional properties"),
    (lambda x: [x], r"expected an object with kind and schema, got list"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_is_no_result_is_refused_by_name(tmp_path, change, message):
    path = examples.document(tmp_path / "broken.json", change(examples.model()))
    with pytest.raises(load.ResultError, match=rf"broken\.json: .*{message}"):
        load.read([path])


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ('{"a": NaN}', "NaN is no JSON"), ("\xff", "no JSON")])
def test_what_is_no_json_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(load.ResultError, match=rf"x\.json: .*{message}"):
        load.read([tmp_path / "x.json"])


def test_a_broken_line_of_records_is_named(tmp_path):
    path = examples.lines(tmp_path / "a.jsonl", *examples.records()[:1], {"schema": 3, "kind": "case"})
    with pytest.raises(load.ResultError, match=r"a\.jsonl:2: schema version 3 of 'case'"):
        load.read([path])


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_not_there_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(load.ResultError, match=name):
        load.read([tmp_path / name])


def test_schemas_are_found_wherever_the_checkout_lies(tmp_path):
    root = tmp_path / "a b%20c"
    for part in ("reports", "verify/records.schema.json", "autotune/bench.schema.json", "impls/tuned.schema.json"):
        source, target = examples.ROOT / part, root / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    path = examples.lines(tmp_path / "verify.jsonl", *examples.records())
    program = (
        "import sys; from pathlib import Path; from reports import load; print(load.read([Path(sys.argv[1])])[0].kind)"
    )
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    asked = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(asked, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == load.RECORDS, run.stderr
