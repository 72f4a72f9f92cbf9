"""The Triton rows run with what files say of their device, if it fits; interpreted on a CPU they look nothing up."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from impls import ChunkTritonConfig, RecurrentTritonConfig, chunk_triton, kda, recurrent_triton, tuned
from impls.defaults import default_chunk, default_recurrent
from impls.targets import TARGETS, named
from impls.tuned import Shape

H200 = {"kind": "cuda", "name": "NVIDIA H200", "capability": "9.0", "units": 132}
SPREAD = {"median": 0.9, "low": 0.8, "high": 1.0, "least": 0.7, "most": 1.1, "count": 9}
PROVENANCE = {"versions": {"triton": "3.7.1"}, "sources": "0" * 16, "date": "2026-11-21T00:00:00+00:00"}
SHAPE = Shape(100, 1, 2, 16, 16, "float32", False)
USUAL = default_chunk(16, 16, "float32", named("interpret"))
TUNED = replace(USUAL, chunk_size=64, walk_stages=2, segments=1)
"""Another configuration than the default of these sizes."""


def put(folder: Path, configs: dict[Shape | None, object], name: str = "chunk_triton", device: dict = H200) -> Path:
    """Write a file of a configuration per shape, None for the default row."""
    entries = [
        {
            "shape": shape._asdict(),
            "config": asdict(config),
            "provenance": PROVENANCE,
            "verified": {"profile": "tune", "outcome": "passed"},
            "timing": {"ms": SPREAD, "over_default": SPREAD, "ties": [], "noise": False},
        }
        for shape, config in configs.items()
        if shape
    ]
    data = {"schema": 1, "kind": "tuned", "implementation": name, "device": device, "provenance": PROVENANCE}
    data |= {"entries": entries, "default": asdict(configs[None]) if None in configs else None}
    tuned.check(data)
    path = tuned.path_of(folder, name, device["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    tuned.forget()
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return the folder that is looked through first, on a machine whose CPU tensors count as an H200's."""
    monkeypatch.setattr(tuned, "named", lambda device: H200)
    monkeypatch.setenv("KDA_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    tuned.forget()
    yield tmp_path / "own"
    tuned.forget()


@pytest.fixture
def ran(monkeypatch) -> list:
    """Collect the configurations that the Triton rows run with."""
    configs = []
    for module in (chunk_triton, recurrent_triton):

        def planned(problem, config, target, plan=module.plan):
            configs.append(config)
            return plan(problem, config, target)

        monkeypatch.setattr(module, "plan", planned)
    return configs


@pytest.fixture
def inputs(draw):
    return draw(1, 100, 2, 2, 16, 16)


def test_a_call_runs_with_the_row_of_its_shape_and_has_its_bits(folder, inputs, ran):
    usual = kda(*inputs, implementation="chunk_triton", config=USUAL)[0]
    put(folder, {SHAPE: TUNED})
    o, _ = kda(*inputs, implementation="chunk_triton")
    expected, _ = kda(*inputs, implementation="chunk_triton", config=TUNED)
    assert ran == [USUAL, TUNED, TUNED]
    assert torch.equal(o, expected) and not torch.equal(o, usual)


def test_the_recurrence_runs_with_the_row_of_its_shape(folder, inputs, ran):
    put(folder, {SHAPE: RecurrentTritonConfig(warps=8)}, "recurrent_triton")
    for more, expected in (
        ({}, RecurrentTritonConfig(warps=8)),
        ({"config": RecurrentTritonConfig(warps=2)}, RecurrentTritonConfig(warps=2)),
    ):
        kda(*(x[:, :3] for x in inputs), implementation="recurrent_triton", **more)
        kda(*inputs, implementation="recurrent_triton", **more)
        assert ran[-1] == expected
    assert ran[0] == default_recurrent(16, 16, "float32", named("interpret")), "three tokens are of another bucket"


CALLS = {
    "the bucket of the shape": ({"tokens": 70}, TUNED),
    "another bucket": ({"tokens": 30}, USUAL),
    "the default row": ({"tokens": 30, "default": replace(USUAL, walk_stages=1)}, replace(USUAL, walk_stages=1)),
    "packed sequences": ({"cu_seqlens": torch.tensor([0, 60, 100])}, USUAL),
    "the C of the row": ({"chunk_size": 64}, TUNED),
    "another C": ({"chunk_size": 32}, replace(USUAL, chunk_size=32)),
    "a configuration in the call": ({"config": USUAL}, USUAL),
    "states every 64 tokens": ({"return_intermediate_states": True}, TUNED),
    "states within a chunk": ({"return_intermediate_states": True, "state_interval": 48}, USUAL),
}


@pytest.mark.parametrize(("call", "expected"), CALLS.values(), ids=CALLS)
def test_what_runs_is_given_else_tuned_else_the_default(folder, inputs, ran, call, expected):
    call = dict(call)
    tokens, default = call.pop("tokens", 100), call.pop("default", None)
    put(folder, {SHAPE: TUNED} | ({None: default} if default else {}))
    kda(*(x[:, :tokens] for x in inputs), implementation="chunk_triton", **call)
    assert ran == [expected]


def test_states_at_the_borders_of_tuned_chunks_are_those_of_the_configuration(folder, inputs):
    put(folder, {SHAPE: TUNED})
    asked = {"implementation": "chunk_triton", "return_intermediate_states": True, "output_final_state": True}
    for x, expected in zip(kda(*inputs, **asked), kda(*inputs, config=TUNED, **asked), strict=True):
        assert torch.equal(x, expected)


def test_what_does_not_fit_the_device_is_passed_over_with_one_warning(folder, inputs, ran, monkeypatch, tmp_path):
    big = replace(USUAL, chunk_size=64, value_tile=16, walk_stages=5)
    small = replace(TUNED, value_tile=16, walk_stages=1)
    path = put(folder, {SHAPE: big})
    put(tmp_path / "packaged", {SHAPE: small})
    monkeypatch.setattr(tuned, "target_of", lambda device: replace(TARGETS["interpret"], shared_memory=48 << 10))
    with pytest.warns(RuntimeWarning, match=r"is not used: \w+ needs \d+ bytes of shared memory") as said:
        kda(*inputs, implementation="chunk_triton")
        kda(*(x[:, :90] for x in inputs), implementation="chunk_triton")
    assert ran == [small, small]
    assert len(said) == 1 and str(path) in str(said[0].message)


def test_a_cap_on_registers_is_nothing_for_amd(folder, monkeypatch):
    put(folder, {SHAPE: replace(USUAL, walk_registers=128)})
    monkeypatch.setattr(tuned, "target_of", lambda device: TARGETS["sm_90"])
    assert tuned.looked_up("chunk_triton", "cuda:0", SHAPE) is not None
    tuned.forget()
    monkeypatch.setattr(tuned, "target_of", lambda device: TARGETS["gfx942"])
    with pytest.warns(RuntimeWarning, match="walk_registers must be 0 on gfx942"):
        assert tuned.looked_up("chunk_triton", "cuda:0", SHAPE) is None


def test_a_gpu_without_a_file_takes_that_of_its_capability(folder, inputs, ran, monkeypatch):
    monkeypatch.setattr(tuned, "named", lambda device: H200 | {"name": "NVIDIA H100", "units": 114})
    put(folder, {SHAPE: TUNED})
    put(folder, {SHAPE: USUAL}, device=H200 | {"name": "NVIDIA B200", "capability": "10.0"})
    kda(*inputs, implementation="chunk_triton")
    assert ran == [TUNED]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("chunk_triton", "--tokens 100 --heads 2 --sequences 1 --head-dim 16 --dtype float32"),
        ("recurrent_triton", "--tokens 1 --heads 2 --sequences 3 --head-dim 16 --dtype bfloat16"),
    ],
)
def test_on_a_gpu_that_nothing_is_tuned_for_one_warning_names_the_file_and_the_command(folder, name, sizes):
    shape = SHAPE if name == "chunk_triton" else SHAPE._replace(T=1, N=3, dtype="bfloat16")
    with pytest.warns(RuntimeWarning) as said:
        assert tuned.for_call(name, "cuda:0", shape) is tuned.for_call(name, "cuda:0", shape._replace(T=5)) is None
    (warning,) = said
    assert f"nvidia-h200/{name}.json" in str(warning.message)
    assert f"python -m autotune tune --device cuda:0 --op {name} {sizes} makes it" in str(warning.message)


def test_interpreted_on_a_cpu_nothing_is_looked_up_and_nothing_is_said(folder, inputs, ran, monkeypatch):
    cpu = {"kind": "cpu", "name": "A CPU", "capability": None, "units": None}
    put(folder, {SHAPE: TUNED}, device=cpu)
    monkeypatch.setattr(tuned, "named", lambda device: cpu)
    monkeypatch.setattr(tuned, "read", lambda path: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kda(*inputs, implementation="chunk_triton")
        kda(*(x[:, :3] for x in inputs), implementation="recurrent_triton")
    assert ran == [USUAL, default_recurrent(16, 16, "float32", named("interpret"))]


def test_values_of_cu_seqlens_are_not_looked_at(folder):
    """Reading them would wait for the device: of tensors without values the number of sequences is all that counts."""
    put(folder, {SHAPE._replace(N=2, packed=True): TUNED})
    q, v = (torch.empty(1, 100, 2, 16, device="meta") for _ in range(2))
    shape = tuned.shape_of(q, v, torch.empty(3, dtype=torch.int64, device="meta"))
    assert tuned.looked_up("chunk_triton", "cpu", shape).config == TUNED


def test_a_configuration_of_a_file_is_of_its_kind(folder):
    with pytest.raises(ValueError, match="walk_warps"):
        put(folder, {SHAPE: replace(TUNED, walk_warps=3)})
    with pytest.raises(ValueError, match="config"):
        put(folder, {SHAPE: ChunkTritonConfig()}, "recurrent_triton")
