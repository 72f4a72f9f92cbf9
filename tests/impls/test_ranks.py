"""Ranks of one job run with the same tuned files, or every one of them is told: two processes with gloo on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from impls import tuned
from impls.ranks import check_same

ROOT = Path(__file__).parents[2]
RANK = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
from impls import tuned
from impls.ranks import check_same

rank, folder, here = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)

def asked():
    tuned.forget()
    try:
        return check_same(device="cpu")
    except RuntimeError as error:
        return f"{error}; {error.__cause__!r}"

def broken(device):
    raise OSError("no such folder")

told = {"same": asked()}
os.environ["KDA_CONFIG_DIR"] = here
told["different"] = asked()
if rank == 1:
    import impls.ranks
    impls.ranks.digest = broken
told["broken"] = asked()
print(json.dumps(told))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def told(differently_tuned) -> list[dict[str, str]]:
    """Return what both ranks say with equal files, with another file for rank 1, and where rank 1 cannot read it."""
    folder = differently_tuned
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "KDA_CONFIG_DIR": str(folder / "0")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), str(folder / str(rank))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    return [json.loads(output) for output, _ in ends]


def test_equal_files_pass_with_one_digest(told):
    first, second = (x["same"] for x in told)
    assert first == second and len(bytes.fromhex(first)) == 32


def test_different_files_raise_on_both_and_name_the_ranks_and_their_digests(told):
    first, second = (x["different"] for x in told)
    assert first == second and first.startswith("ranks would run with different tuned files, by rank and digest 0: ")
    digests = [part.split(": ")[1] for part in first.split("digest ")[1].split(": give")[0].split("; ")]
    assert told[0]["same"].startswith(digests[0]) and digests[0] != digests[1]


def test_a_rank_that_cannot_read_its_files_keeps_nobody_waiting(told):
    assert "1: unknown, an error there" in told[0]["broken"]
    assert "this rank cannot tell" in told[1]["broken"] and "no such folder" in told[1]["broken"]


def test_without_a_process_group_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="torch.distributed must be initialised"):
        check_same()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "named", lambda device: {"kind": "cpu", "name": "A CPU"})
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KDA_CONFIG_DIR", str(tmp_path / "own"))
    tuned.forget()
    yield tmp_path / "own"
    tuned.forget()


PACKAGED = {name: tuned.PACKAGED / tuned.GENERIC / f"{name}.json" for name in ("chunk_torch", "recurrent_torch")}


def put(folder: Path, name: str, text: str) -> str:
    path = tuned.path_of(folder, name, "A CPU")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    tuned.forget()
    return tuned.digest("cpu")


def test_a_digest_is_of_what_can_be_used_wherever_it_lies(folder, monkeypatch):
    text = PACKAGED["chunk_torch"].read_text()
    first = tuned.digest("cpu")
    second = put(folder, "chunk_torch", text)
    third = put(folder, "recurrent_torch", PACKAGED["recurrent_torch"].read_text())
    assert len({first, second, third}) == 3
    assert put(folder, "chunk_torch", json.dumps(json.loads(text))) == third, "spaces choose nothing"
    monkeypatch.setenv("KDA_CONFIG_DIR", str(folder.with_name("elsewhere")))
    folder.rename(folder.with_name("elsewhere"))
    tuned.forget()
    assert tuned.digest("cpu") == third
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert put(folder.with_name("elsewhere"), "chunk_torch", "{") not in (first, second, third)


def test_a_digest_is_of_what_this_process_runs_with_not_of_what_was_written_since(folder):
    told = put(folder, "chunk_torch", PACKAGED["chunk_torch"].read_text())
    tuned.path_of(folder, "chunk_torch", "A CPU").unlink()
    assert tuned.digest("cpu") == told
    tuned.forget()
    assert tuned.digest("cpu") != told
