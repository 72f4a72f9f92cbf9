"""What verify was asked of a configuration has to have happened: passing with less is not passing."""

import json
from pathlib import Path

import pytest

from autotune import judge
from autotune.judge import shortfall, verified_config
from impls import ChunkTorchConfig
from verify import session
from verify.plan import PROFILES

FULL = {"repeats": 10, "pairs": 1024, "programs": 1024, "backward": 3}


@pytest.mark.parametrize(
    "counts, backward, missing",
    [
        (FULL, True, None),
        (FULL | {"backward": 0}, False, None),
        (FULL | {"repeats": 3}, True, "3 times, not 10"),
        (FULL | {"programs": 528}, True, "528 programs in some launch"),
        ({"repeats": 10, "pairs": 64, "backward": 1}, True, "64 programs"),
        (FULL | {"backward": 0}, True, "no gradient"),
        ({}, True, "0 times"),
    ],
)
def test_a_configuration_has_not_passed_what_its_profile_left_out(counts, backward, missing):
    short = shortfall(counts, PROFILES["tune"].demands, backward)
    assert short is None if missing is None else missing in short


@pytest.mark.parametrize("counts, code", [(FULL, session.PASS), (FULL | {"repeats": 3}, session.NOTHING)])
def test_a_verdict_says_what_is_missing(monkeypatch, tmp_path, counts, code):
    lines = [
        {"schema": 1, "kind": "target", "target": "chunk_torch", "counts": counts},
        {"schema": 1, "kind": "summary", "code": 0, "targets": {"chunk_torch": session.PASS}},
    ]

    def run(command, *others):
        with open(command[command.index("--json") + 1], "w") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(judge, "_run", run)
    verdict = verified_config("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (16,), True, tmp_path)
    assert verdict["code"] == code and verdict["counts"] == counts
    assert verdict["reason"] is None if code == session.PASS else "3 times, not 10" in verdict["reason"]


def test_who_is_cut_off_goes_on_with_the_same_cases_and_leaves_nothing_behind(monkeypatch, tmp_path):
    asked, seen = ("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (16,), True, tmp_path), []
    summary = {"schema": 1, "kind": "summary", "code": 0, "targets": {"chunk_torch": session.PASS}}

    def run(command, *others):
        path = Path(command[command.index("--json") + 1])
        assert "--resume" in command and json.loads(Path(command[command.index("--config") + 1]).read_text())
        seen.append(path.read_text() if path.exists() else "")
        with path.open("a") as stream:
            stream.write(json.dumps(summary if len(seen) > 1 else {"schema": 1, "kind": "case"}) + "\n")
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(judge, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        verified_config(*asked)
    verified_config(*asked)
    verified_config(*asked)
    assert seen == ["", '{"schema": 1, "kind": "case"}\n', ""]
    assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob("*.config"))


def test_two_that_judge_the_same_at_once_have_files_of_their_own(tmp_path):
    with judge._kept(tmp_path, "same") as one, judge._kept(tmp_path, "same") as other:
        assert one.parent == tmp_path != other.parent
