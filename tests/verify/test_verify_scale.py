"""Parts of a run: by shards, workers and a cluster the same cases; what is finished is not judged again."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest
from in_this_process import judge_here

from verify import parts, records, remembered, session
from verify.__main__ import main
from verify.plan import Plan
from verify.recipes import Recipe

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = ("--profile", "smoke", "--property", "reference_forward,causality,determinism", "--max-examples", "8")


@pytest.fixture(autouse=True)
def worker_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))


def run(*arguments, code: int = session.PASS) -> None:
    assert main([str(x) for x in arguments]) == code


def cases(path: Path) -> Counter:
    """Count the cases of a file by number and inputs."""
    return Counter((x["number"], x["inputs"]) for x in records.read(path) if x["kind"] == "case")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run", judge_here)
        run("recurrent_torch", *SMALL, "--json", path)
    return path


def test_workers_judge_the_same_cases(whole, tmp_path):
    run("recurrent_torch", *SMALL, "--workers", 2, "--json", tmp_path / "two.jsonl")
    assert cases(tmp_path / "two.jsonl") == cases(whole)
    found = [x for x in records.read(tmp_path / "two.jsonl") if x["kind"] == "target"]
    assert [x["counts"]["cases"] for x in found] == [4, 4]


def test_shards_are_joined_to_the_whole(in_process, whole, tmp_path, capsys):
    for i in (1, 2):
        run("recurrent_torch", *SMALL, "--shard", f"{i}/2", "--json", tmp_path / f"{i}.jsonl")
    run("merge", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "-o", tmp_path / "all.jsonl")
    assert cases(tmp_path / "all.jsonl") == cases(whole) and "8 cases" in capsys.readouterr().out
    joined = records.read(tmp_path / "all.jsonl")
    assert joined[-1]["targets"] == {"recurrent_torch": 0} and joined[0]["identity"]["shard"] == [1, 1]
    run("merge", tmp_path / "1.jsonl", "-o", tmp_path / "none.jsonl", code=session.USAGE)
    assert "missing 2/2" in capsys.readouterr().err
    run("merge", whole, tmp_path / "2.jsonl", "-o", tmp_path / "none.jsonl", code=session.USAGE)
    assert "expected every shard once" in capsys.readouterr().err


def test_what_a_killed_run_has_finished_is_not_judged_again(in_process, whole, tmp_path, capsys):
    path = tmp_path / "killed.jsonl"
    kept = [x for x in records.read(whole) if x["kind"] in ("run", "case")][:4]
    path.write_text("".join(map(records.line, kept)) + '{"schema": 1, "kind": "ca')
    run("recurrent_torch", *SMALL, "--json", path, "--resume")
    assert cases(path) == cases(whole)
    assert "recurrent_torch: 8 cases" in capsys.readouterr().out
    counts = [next(x["counts"] for x in records.read(p) if x["kind"] == "target") for p in (path, whole)]
    assert counts[0] == counts[1] and "repeats" in counts[0]
    run("recurrent_torch", *SMALL, "--seed", 3, "--json", path, "--resume", code=session.USAGE)
    assert "is of another run: seed 0 for 3" in capsys.readouterr().err


def test_a_failure_before_the_kill_is_still_reported(in_process, tmp_path, capsys):
    path, only = tmp_path / "undecayed.jsonl", ("broken_kernels:undecayed", *SMALL, "--out", tmp_path)
    run(*only, "--json", path, code=session.FAILED)
    kept = [x for x in records.read(path) if x["kind"] in ("run", "case")]
    path.write_text("".join(map(records.line, kept)))
    run(*only, "--json", path, "--resume", code=session.FAILED)
    assert "FAIL broken_kernels:undecayed :: reference_forward" in capsys.readouterr().out


def test_parts_cover_a_plan_once():
    plan = Plan("t", "cpu", "smoke", ("float32",), 0, 23, shard=(1, 3))
    found = [n for batch in parts.parts([plan], 4) for part in batch for n in part.numbers("float32")]
    assert sorted(found) == plan.numbers("float32") == list(range(1, 23, 3))


def test_what_takes_longest_starts_first():
    names = ["recurrent_torch", "recurrent_triton", "chunk_torch", "chunk_triton"]
    devices = ["interpret" if name.endswith("triton") else "cpu" for name in names]
    plans = [Plan(*target, "smoke", ("float32",), 0, 23) for target in zip(names, devices, strict=True)]
    order = [batch[0].target for batch in parts.parts(plans, 2)]
    assert order == ["chunk_triton", "chunk_torch", "recurrent_torch", "recurrent_triton"]


def test_diff_tells_what_is_worse(in_process, whole, tmp_path, capsys):
    run("diff", whole, whole)
    assert "no difference" in capsys.readouterr().out
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    for line in (x for x in lines if x["kind"] == "case"):
        line["results"]["causality"] = {"ratio": "inf", "what": "o", "observed": 1.0, "allowed": 0.0, "where": ""}
    worse = tmp_path / "worse.jsonl"
    worse.write_text("".join(map(records.line, lines)))
    run("diff", whole, worse, code=session.FAILED)
    shown = capsys.readouterr().out
    assert "FAILS" in shown and "WORSE CODE" in shown and "2 regressions" in shown
    run("diff", worse, whole)
    assert "passes now" in capsys.readouterr().out
    run("diff", whole, tmp_path / "nowhere", code=session.USAGE)
    for line in (x for x in lines if x["kind"] == "case"):
        del line["results"]["causality"]
    worse.write_text("".join(map(records.line, lines)))
    run("diff", whole, worse, code=session.FAILED)
    assert "NOT ASKED" in capsys.readouterr().out


def test_a_cluster_of_two_workers_judges_the_same_cases(whole, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="pip install 'kda-forge[fleet]'")
    monkeypatch.setattr("verify.distributed.PIECES", 1)  # a process takes seconds to start
    run("recurrent_torch", *SMALL, "--scheduler", "local", "--workers", 2, "--json", tmp_path / "far.jsonl")
    assert cases(tmp_path / "far.jsonl") == cases(whole)


def test_no_scheduler_is_exit_code_2(capsys):
    pytest.importorskip("distributed", reason="pip install 'kda-forge[fleet]'")
    run("recurrent_torch", *SMALL, "--scheduler", "tcp://127.0.0.1:1", code=session.USAGE)
    assert "--scheduler tcp://127.0.0.1:1: expected the address of a dask scheduler" in capsys.readouterr().err


def test_who_hangs_is_told_with_the_case_that_it_hung_on(tmp_path, capsys):
    files = ("--out", tmp_path, "--json", tmp_path / "hung.jsonl")
    only = ("--profile", "smoke", "--property", "reference_forward", "--max-examples", 2, "--timeout", 4)
    run("broken_kernels:hangs", *only, *files, code=session.CRASH)
    shown = capsys.readouterr().out
    assert "no record for 4 s: killed" in shown
    (crash,) = [x for x in records.read(tmp_path / "hung.jsonl") if x["kind"] == "crash"]
    if "recipe" in crash:  # not where the probe hung
        assert crash["property"].startswith("reference_forward") and "--replay" in shown


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    pytest.importorskip("redis", reason="pip install 'kda-forge[fleet]'")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with closing(socket.socket()) as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


@pytest.fixture(params=["a folder", "redis"])
def database(request, tmp_path) -> str:
    return str(tmp_path / "examples") if request.param == "a folder" else request.getfixturevalue("redis_server")


def test_what_failed_before_is_judged_first_and_forgotten_when_it_passes(in_process, database, tmp_path):
    def first(target: str, code: int) -> list[int]:
        path = tmp_path / "run.jsonl"
        only = (target, *SMALL[:-1], 4, "--database", database, "--out", tmp_path, "--json", path)
        run(*only, code=code)
        return [x["number"] for x in records.read(path) if x["kind"] == "case"]

    name = "broken_kernels:undecayed"
    assert min(first(name, session.FAILED)) == 0
    assert first(name, session.FAILED)[0] == -1
    opened = remembered.opened(database)
    kept = remembered.recalled(opened, name)
    assert kept
    remembered.remember(opened, name, [], kept)
    assert remembered.recalled(opened, name) == ()
    remembered.remember(opened, "recurrent_torch", [{"recipe": Recipe(T=3).to_json()}], [])
    assert first("recurrent_torch", session.PASS)[0] == -1
    assert remembered.recalled(opened, "recurrent_torch") == ()


@pytest.mark.parametrize("url, message", [("redis://127.0.0.1:1/0", "127.0.0.1:1"), ("http://x", "redis://HOST")])
def test_no_database_is_exit_code_2(url, message, capsys):
    run("recurrent_torch", *SMALL, "--database", url, code=session.USAGE)
    assert message in capsys.readouterr().err


def test_reports_name_every_property_and_escape_what_targets_say(in_process, tmp_path, capsys):
    files = {"--junit": tmp_path / "a.xml", "--html": tmp_path / "a.html"}
    arguments = [x for pair in files.items() for x in pair]
    run("broken_kernels:undecayed", "recurrent_torch", *SMALL, *arguments, "--out", tmp_path, code=session.FAILED)
    root = ElementTree.parse(files["--junit"]).getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"broken_kernels:undecayed", "recurrent_torch"}
    assert int(root.get("failures")) >= 1 and suites["recurrent_torch"].get("failures") == "0"
    failed = suites["broken_kernels:undecayed"].find("testcase[@name='reference_forward']/failure")
    assert "observed" in failed.get("message") and "--replay" in failed.text
    page = files["--html"].read_text()
    assert "reference_forward" in page and "--replay" in page and "<script" not in page and "http" not in page


def test_strict_fails_where_a_term_was_not_exercised(in_process, capsys):
    only = ("recurrent_torch", "--profile", "smoke", "--property", "determinism", "--max-examples", 1)
    run(*only)
    run(*only, "--strict", code=session.FAILED)
    assert "NOT TESTED (FAIL: --strict)" in capsys.readouterr().out
