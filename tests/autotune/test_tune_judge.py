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
RUN = {"schema": 1, "kind": "run"}
SUMMARY = {"schema": 1, "kind": "summary", "code": 0, "targets": {"chunk_torch": session.PASS}}


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
    lines = [RUN, {"schema": 1, "kind": "target", "target": "chunk_torch", "counts": counts}, SUMMARY]

    def run(command, *others):
        with open(command[command.index("--json") + 1], "w") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(judge, "_run", run)
    verdict = verified_config("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (16,), True, tmp_path)
    assert verdict["code"] == code and verdict["counts"] == counts
    assert verdict["reason"] is None if code == session.PASS else "3 times, not 10" in verdict["reason"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Return a function that judges, given what verify writes before it ends, and what it found in its file."""
    found = []

    def judged(*lines, cut_off: bool = False) -> dict:
        def run(command, *others):
            path = Path(command[command.index("--json") + 1])
            assert "--resume" in command and json.loads(Path(command[command.index("--config") + 1]).read_text())
            found.append(path.read_text() if path.exists() else None)
            with path.open("a") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
            if cut_off:
                raise KeyboardInterrupt

        monkeypatch.setattr(judge, "_run", run)
        return verified_config("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (16,), True, tmp_path)

    return judged, found


def left(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_who_is_cut_off_goes_on_with_the_same_cases_and_leaves_nothing_behind(runs, tmp_path):
    judged, found = runs
    with pytest.raises(KeyboardInterrupt):
        judged(RUN, cut_off=True)
    assert judged()["code"] == session.CRASH  # no summary: what was judged is kept
    assert judged(SUMMARY)["reason"] != judge.SILENT
    judged(RUN, SUMMARY)
    assert found == [None, *[json.dumps(RUN) + "\n"] * 2, None] and not left(tmp_path)


@pytest.mark.parametrize("text", ["no JSON\n", json.dumps({"schema": 1, "kind": "summary"}) + "\n", ""])
def test_what_is_no_run_is_not_gone_on_with(runs, tmp_path, text):
    judged, found = runs
    with pytest.raises(KeyboardInterrupt):
        judged(RUN, cut_off=True)
    [kept] = tmp_path.glob("*.jsonl")
    kept.write_text(text)
    judged(RUN, SUMMARY)
    assert found == [None, None] and not left(tmp_path)


def test_another_machine_begins_anew(runs, tmp_path, monkeypatch):
    judged, found = runs
    with pytest.raises(KeyboardInterrupt):
        judged(RUN, cut_off=True)
    monkeypatch.setattr(judge.devices, "named", lambda device: {"name": f"another {device}"})
    judged(RUN, SUMMARY)
    assert found == [None, None] and len(left(tmp_path)) == 2  # the records and the configuration of the first
    monkeypatch.setattr(judge, "FORGOTTEN", -1)
    judged(RUN, SUMMARY)
    assert not left(tmp_path)


def test_two_that_judge_the_same_at_once_have_files_of_their_own(tmp_path):
    with judge._kept(tmp_path, "same") as one, judge._kept(tmp_path, "same") as other:
        assert one.parent == tmp_path != other.parent
