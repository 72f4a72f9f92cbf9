"""`python -m autotune show` for the rows that run on a GPU, and the commands that it and the warnings name."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autotune import provenance, show
from autotune.__main__ import main, parser
from autotune.outcomes import NOTHING, PASS, USAGE
from impls import IMPLEMENTATIONS, ChunkTritonConfig, tuned
from impls.targets import TARGETS

SHAPE = tuned.Shape(8192, 1, 64, 128, 128, "bfloat16", False)
ASKED = ["--device", "cuda:0", "--shape", "T=8192,HV=64,dtype=bfloat16"]
H200 = {"kind": "cuda", "name": "NVIDIA H200", "capability": "9.0", "units": 132}


@pytest.fixture
def h200(tmp_path, monkeypatch) -> Path:
    """Return the user's folder of tuned files on a machine that seems to have an H200."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(provenance, "check_device", lambda device: None)
    monkeypatch.setattr(tuned, "target_of", lambda device: TARGETS["sm_90"])
    for module in (tuned, show):
        monkeypatch.setattr(module, "named", lambda device: H200)
    tuned.forget()
    yield tuned.user_folder()
    tuned.forget()


def put(folder: Path, config: ChunkTritonConfig, device: dict = H200) -> Path:
    data = json.loads((tuned.PACKAGED / tuned.GENERIC / "chunk_torch.json").read_text())
    data |= {"implementation": "chunk_triton", "device": device, "default": None}
    data["entries"] = [data["entries"][0] | {"shape": SHAPE._asdict(), "config": asdict(config)}]
    tuned.check(data)
    path = tuned.path_of(folder, "chunk_triton", device["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def test_the_row_of_a_triton_kernel_is_explained_with_its_file(h200, capsys):
    path = put(h200, ChunkTritonConfig(chunk_size=32, intra_tiles=2))
    assert main(["show", "--op", "chunk_triton", *ASKED]) == PASS
    told = capsys.readouterr().out
    assert "the entry of this shape" in told and str(path) in told and "chunk_size=32, value_tile=64" in told
    assert tuned.digest("cuda:0") in told


def test_the_file_of_the_nearest_gpu_is_said_to_be_its(h200, capsys):
    put(h200, ChunkTritonConfig(), H200 | {"name": "NVIDIA H100", "units": 114})
    assert main(["show", "--op", "chunk_triton", "--json", *ASKED]) == PASS
    told = json.loads(capsys.readouterr().out)["chunk_triton"]
    assert told["nearest"] and "nvidia-h100" in told["path"] and "nvidia-h200" in told["looked_for"][0]["path"]


def test_a_row_that_does_not_fit_is_said_to_be_passed_over(h200, capsys):
    put(h200, replace(ChunkTritonConfig(), chunk_size=64, value_tile=128, walk_stages=5))
    with pytest.warns(RuntimeWarning, match="is not used: walk needs .* sm_90 has 232448"):
        assert main(["show", "--op", "chunk_triton", *ASKED]) == NOTHING
    assert "1 entries" in capsys.readouterr().out


def test_on_a_gpu_all_rows_are_explained_and_what_is_missing_comes_with_its_command(h200, capsys):
    put(h200, ChunkTritonConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["show", *ASKED]) == NOTHING
    told = capsys.readouterr().out
    assert all(row.name in told for row in IMPLEMENTATIONS) and "dplr" not in told
    assert main(["show", "--op", "dplr_triton", *ASKED]) == NOTHING
    assert "dplr_triton" in capsys.readouterr().out
    assert f"to tune it: {tuned.command('recurrent_triton', 'cuda:0', SHAPE)}" in told


def test_on_a_cpu_the_rows_that_are_only_interpreted_there_are_left_out_and_refused_by_name(capsys):
    tuned.forget()
    assert main(["show"]) == PASS
    told = capsys.readouterr().out
    assert "chunk_torch" in told and "triton" not in told
    assert main(["show", "--op", "chunk_triton"]) == USAGE
    assert "--op chunk_triton: its kernels look files up on a GPU only" in capsys.readouterr().err
    assert main(["show", "--op", "chunk_kda"]) == USAGE
    assert "--op must be one of recurrent_torch, chunk_torch" in capsys.readouterr().err


SIZES = {
    SHAPE: "--tokens 8192 --heads 64 --sequences 1 --head-dim 128 --dtype bfloat16",
    SHAPE._replace(T=1, N=8): "--tokens 1 --heads 64 --sequences 8 --head-dim 128 --dtype bfloat16",
    SHAPE._replace(V=64): "--tokens 8192 --heads 64 --sequences 1 --head-dim 128 --dtype bfloat16 --default-row",
    SHAPE._replace(N=4, packed=True): (
        "--tokens 2048 --heads 64 --sequences 4 --head-dim 128 --dtype bfloat16 --default-row"
    ),
    SHAPE._replace(T=0, N=0, dtype="float64", packed=True): (
        "--tokens 1 --heads 64 --sequences 1 --head-dim 128 --dtype float32 --default-row"
    ),
}


@pytest.mark.parametrize(("shape", "sizes"), SIZES.items())
@pytest.mark.parametrize(("device", "where"), [("cpu", ""), ("cuda:1", "--device cuda:1 ")])
def test_the_command_tunes_for_the_shape_or_where_that_cannot_be_for_all_others(shape, sizes, device, where):
    command = tuned.command("chunk_torch", device, shape)
    assert command == f"python -m autotune tune {where}--op chunk_torch {sizes}"
    asked = parser().parse_args(command.split()[3:])
    assert (asked.device, asked.op, asked.default_row) == (device, "chunk_torch", "default-row" in command)
