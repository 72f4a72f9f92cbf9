"""Tuned configurations: which file and row a call finds, and that no file can break an op."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from impls import ChunkTorchConfig, choice, kda, tuned
from impls.tuned import Shape

SHAPE = Shape(4096, 1, 16, 128, 128, "float32", False)
SPREAD = {"median": 0.9, "low": 0.8, "high": 1.0, "least": 0.7, "most": 1.1, "count": 9}
PROVENANCE = {"versions": {"torch": "2.13.0"}, "sources": "0" * 16, "date": "2026-11-21T00:00:00+00:00"}


def entry(shape: Shape = SHAPE, **config) -> dict:
    return {
        "shape": shape._asdict(),
        "config": asdict(ChunkTorchConfig(**config)),
        "provenance": PROVENANCE,
        "verified": {"profile": "tune", "outcome": "passed", "counts": {}},
        "timing": {"ms": SPREAD, "over_default": SPREAD, "ties": [], "noise": False},
    }


def file_of(*entries: dict, default: dict | None = None, device: dict | None = None) -> dict:
    return {
        "schema": 1,
        "kind": "tuned",
        "implementation": "chunk_torch",
        "device": device or {"kind": "cpu", "name": "A CPU"},
        "provenance": PROVENANCE,
        "entries": list(entries),
        "default": default,
    }


def put(folder: Path, data: object, device: str = "A CPU") -> Path:
    path = tuned.path_of(folder, "chunk_torch", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    tuned.forget()
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tuned, "named", lambda device: {"kind": "cpu", "name": "A CPU"})
    monkeypatch.setenv("KDA_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    tuned.forget()
    yield tmp_path / "own"
    tuned.forget()


def found(shape: Shape = SHAPE, chunks_of: int | None = None):
    return tuned.looked_up("chunk_torch", "cpu", shape, chunks_of)


def test_the_same_shape_is_before_its_bucket_and_the_default_row_is_last(folder):
    put(
        folder,
        file_of(
            entry(SHAPE._replace(T=3000), heads=4), entry(heads=8), default=asdict(ChunkTorchConfig(block_tokens=256))
        ),
    )
    exact, bucket, default = (found(SHAPE._replace(T=T)) for T in (4096, 4000, 4097))
    assert (exact.row, exact.config.heads) == ("exact", 8)
    assert (bucket.row, bucket.config.heads) == ("bucket", 4)
    assert (default.row, default.config.block_tokens, default.entry) == ("default", 256, None)


@pytest.mark.parametrize(("here", "used"), [(2, 1), (3, 0)])
@pytest.mark.parametrize("row", ["entry", "default"])
def test_a_bound_on_threads_holds_where_there_are_as_many_as_it_was_tuned_with(folder, monkeypatch, row, here, used):
    bounded, told = entry(threads=1, heads=4), PROVENANCE | {"environment": {"threads": "2"}}
    file = file_of(bounded) if row == "entry" else file_of(default=bounded["config"])
    bounded["provenance"] = file["provenance"] = told
    put(folder, file)
    monkeypatch.setattr(torch, "get_num_threads", lambda: here)
    v = torch.empty(1, 4096, 16, 128)
    config = choice.chunk_torch_config((0, -1), v, v, None, 0)
    assert (config.threads, config.heads) == (used, 4)


@pytest.mark.parametrize(
    "change", [{"K": 64}, {"V": 64}, {"dtype": "bfloat16"}, {"packed": True}, {"HV": 17}, {"N": 2}]
)
def test_another_bucket_finds_nothing(folder, change):
    put(folder, file_of(entry()))
    assert found(SHAPE._replace(**change)) is None


def test_the_folder_that_is_named_is_before_the_users_and_that_before_what_ships(folder, tmp_path):
    for heads, where in ((4, tmp_path / "packaged"), (8, tmp_path / "cache/kda-forge/configs"), (32, folder)):
        put(where, file_of(entry(heads=heads)))
        assert found().config.heads == heads


def test_the_generic_cpu_serves_a_cpu_that_has_no_file(folder):
    put(folder, file_of(entry(heads=4)), tuned.GENERIC)
    assert found().nearest and found().config.heads == 4
    put(folder, file_of(entry(heads=8)))
    assert not found().nearest and found().config.heads == 8


def test_the_nearest_gpu_has_the_same_capability_and_the_most_alike_number_of_units(folder, monkeypatch):
    here = {"kind": "cuda", "name": "H100", "capability": "9.0", "units": 114}
    monkeypatch.setattr(tuned, "named", lambda device: here)
    for name, capability, units, heads in (("H200", "9.0", 132, 4), ("H20", "9.0", 78, 8), ("B200", "10.0", 114, 32)):
        device = {"kind": "cuda", "name": name, "capability": capability, "units": units}
        put(folder, file_of(entry(heads=heads), device=device), name)
    assert found().nearest and found().config.heads == 4


def test_of_two_files_of_one_gpu_that_of_the_first_folder_serves_its_siblings(folder, tmp_path, monkeypatch):
    H200 = {"kind": "cuda", "name": "H200", "capability": "9.0", "units": 132}
    monkeypatch.setattr(tuned, "named", lambda device: H200 | {"name": "H100"})
    put(tmp_path / "cache/kda-forge/configs", file_of(entry(heads=4), device=H200), "H200")
    put(folder, file_of(entry(heads=8), device=H200), "H200")
    assert found().config.heads == 8


def test_only_chunks_that_divide_the_interval_of_kept_states_are_taken(folder):
    put(folder, file_of(entry(chunk_size=64), default=asdict(ChunkTorchConfig(chunk_size=16))))
    assert found(chunks_of=128).config.chunk_size == 64
    assert found(chunks_of=48).config.chunk_size == 16


BAD = {
    "no JSON": "{",
    "another schema": json.dumps(file_of(entry()) | {"schema": 2}),
    "an unknown field": json.dumps(file_of(entry() | {"config": {"speed": 11}})),
    "what cannot run": json.dumps(file_of(entry() | {"config": {"chunk_size": 17}})),
    "another kind of value": json.dumps(file_of(entry() | {"config": {"chunk_size": "32; rm"}})),
    "what is not verified": json.dumps(file_of(entry() | {"verified": {"profile": "tune", "outcome": "failed"}})),
    "half a token": json.dumps(file_of(entry())).replace('"T": 4096', '"T": 4096.0'),
    "endless brackets": "[" * 100_000,
    "an unknown implementation": json.dumps(file_of(entry()) | {"implementation": "subprocess"}),
    "another implementation": json.dumps(
        file_of(entry() | {"config": {"compile": False}}) | {"implementation": "recurrent_torch"}
    ),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_used_is_passed_over_with_one_warning(folder, tmp_path, text):
    put(tmp_path / "packaged", file_of(entry(heads=4)))
    path = put(folder, text)
    with pytest.warns(RuntimeWarning, match="is not used") as said:
        assert found().config.heads == 4
    assert len(said) == 1 and str(path) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(SHAPE._replace(T=4001)).config.heads == 4


def test_folders_that_cannot_be_read_or_named_are_passed_over(folder, tmp_path, monkeypatch):
    put(tmp_path / "packaged", file_of(entry(heads=4)))
    monkeypatch.setattr(Path, "is_file", lambda self: 1 / 0)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    tuned.forget()
    assert found().config.heads == 4


def test_a_shape_that_was_not_seen_yet_reads_no_file(folder, monkeypatch):
    put(folder, file_of(entry(heads=8)))
    found()
    monkeypatch.setattr(tuned, "read", lambda path: 1 / 0)
    monkeypatch.setattr(tuned.os.path, "isfile", lambda path: 1 / 0)
    assert found(SHAPE._replace(T=2500)).config.heads == 8 and found(SHAPE._replace(T=1)) is None


def test_other_devices_have_nothing_tuned(folder):
    put(folder, file_of(entry()))
    assert tuned.looked_up("chunk_torch", "mps", SHAPE) is None


def test_a_huge_file_is_not_read(folder, monkeypatch):
    put(folder, file_of(entry()))
    monkeypatch.setattr(tuned, "LIMIT", 100)
    with pytest.warns(RuntimeWarning, match="at most 100 bytes"):
        assert found() is None


def test_where_nothing_is_tuned_one_warning_names_the_file_and_the_command(folder):
    with pytest.warns(RuntimeWarning) as said:
        assert all(tuned.for_call("chunk_torch", "cpu", SHAPE._replace(T=T)) is None for T in (4096, 1))
    (warning,) = said
    assert "a-cpu/chunk_torch.json" in str(warning.message)
    assert "python -m autotune tune --op chunk_torch --tokens 4096 --heads 16" in str(warning.message)


def test_nothing_is_looked_up_where_the_environment_says_so(folder, monkeypatch, recwarn):
    put(folder, file_of(entry(heads=32)))
    monkeypatch.setenv("KDA_TUNED", "0")
    tuned.forget()
    assert tuned.for_call("chunk_torch", "cpu", SHAPE) is None and not recwarn.list
    monkeypatch.setenv("KDA_TUNED", "no")
    tuned.forget()
    with pytest.raises(ValueError, match="KDA_TUNED must be 0 or 1, got 'no'"):
        tuned.for_call("chunk_torch", "cpu", SHAPE)


def test_a_file_that_knows_other_shapes_is_no_reason_to_warn(folder):
    put(folder, file_of(entry()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.for_call("chunk_torch", "cpu", SHAPE._replace(T=1)) is None


@pytest.mark.parametrize("name", ["chunk_torch", "recurrent_torch"])
def test_what_ships_serves_any_cpu_and_compiles_nothing(name):
    tuned.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in (SHAPE, SHAPE._replace(T=1, HV=3, K=7), SHAPE._replace(dtype="bfloat16", packed=True, N=5)):
            found = tuned.for_call(name, "cpu", shape)
            assert found.path.parent.name == tuned.GENERIC and not found.config.compile
    tuned.forget()


@pytest.fixture
def inputs(draw):
    return draw(1, 100, 2, 2, 16, 16)


def run(inputs, **keywords):
    with torch.no_grad():
        return kda(*inputs, implementation="chunk_torch", output_final_state=True, **keywords)


def test_a_call_runs_with_what_was_tuned_for_its_shape(folder, inputs):
    usual = run(inputs)
    shape = Shape(100, 1, 2, 16, 16, "float32", False)
    put(folder, file_of(entry(shape, chunk_size=64)))
    o, S = run(inputs)
    expected = run(inputs, config=ChunkTorchConfig(chunk_size=64))
    assert torch.equal(o, expected[0]) and torch.equal(S, expected[1]) and not torch.equal(S, usual[1])
    assert torch.equal(run(inputs, chunk_size=16)[1], usual[1])
    assert torch.equal(run(inputs, config=ChunkTorchConfig())[1], usual[1])


def test_kept_states_are_never_between_chunks(folder, inputs):
    put(folder, file_of(entry(Shape(100, 1, 2, 16, 16, "float32", False), chunk_size=128)))
    o, S, h = run(inputs, return_intermediate_states=True, state_interval=64)
    expected = run(inputs, return_intermediate_states=True, state_interval=64, config=ChunkTorchConfig())
    assert torch.equal(o, expected[0]) and torch.equal(h, expected[2])
