"""What verify was asked of a configuration has to have happened: passing with less is not passing."""

import json

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
def test_a_verdict_says_what_is_missing(monkeypatch, counts, code):
    lines = [
        {"schema": 1, "kind": "target", "target": "chunk_torch", "counts": counts},
        {"schema": 1, "kind": "summary", "code": 0, "targets": {"chunk_torch": session.PASS}},
    ]

    def run(command, *others):
        with open(command[command.index("--json") + 1], "w") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(judge, "_run", run)
    verdict = verified_config("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (16,), True)
    assert verdict["code"] == code and verdict["counts"] == counts
    assert verdict["reason"] is None if code == session.PASS else "3 times, not 10" in verdict["reason"]
