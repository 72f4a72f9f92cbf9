"""The Triton rows refuse what they cannot run, before anything is launched, with what was expected and what came."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from impls import ChunkTorchConfig, chosen, find, kda
from impls.choice import chunk_triton_config, chunk_triton_launch
from impls.configs import ChunkTritonConfig, RecurrentTritonConfig, invalid
from impls.targets import named

ROOT = Path(__file__).parents[2]
NAMES = ("chunk_triton", "recurrent_triton")
CHUNK, RECURRENT = ChunkTritonConfig(), RecurrentTritonConfig()


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def run(self, buffers, scalars):
        raise AssertionError(f"{self.name} was launched")

    monkeypatch.setattr("impls.plan.Launch.run", run)


def refused(error, message, name, inputs, **keywords):
    with pytest.raises(error) as raised:
        kda(*inputs, implementation=name, **keywords)
    assert message in str(raised.value)


@pytest.mark.parametrize("which", range(6))
def test_inputs_that_want_a_gradient_are_refused_and_without_autograd_are_not(draw, draw_state, which):
    name = "recurrent_triton"
    inputs = [*draw(1, 3, 1, 1, 2, 2), draw_state(1, 1, 2, 2)]
    inputs[which].requires_grad_()
    refused(ValueError, f"{name} has no backward", name, inputs[:5], initial_state=inputs[5])
    with torch.no_grad(), pytest.raises(AssertionError, match="was launched"):
        kda(*inputs[:5], implementation=name, initial_state=inputs[5])


@pytest.mark.parametrize("which", ["A_log", "dt_bias"])
def test_gate_parameters_that_want_a_gradient_are_refused(draw, which):
    parameters = {"A_log": torch.zeros(1), "dt_bias": torch.zeros(2)}
    parameters[which].requires_grad_()
    asked = {"use_gate_in_kernel": True, **parameters}
    refused(ValueError, "has no backward", "recurrent_triton", draw(1, 3, 1, 1, 2, 2), **asked)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_refused(draw, name):
    message = f"{name} takes float32, bfloat16, float16, not float64"
    refused(ValueError, message, name, draw(1, 3, 1, 1, 2, 2, torch.float64))


def test_cpu_tensors_need_the_interpreter():
    code = f"""if True:
        import torch, impls
        x = torch.zeros(1, 3, 1, 2)
        for name in {NAMES}:
            try:
                impls.kda(x, x, x, x, x[..., 0], implementation=name)
            except ValueError as error:
                print(error)"""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=plain, check=True)
    hint = "; CPU tensors run in Triton's interpreter, where TRITON_INTERPRET=1 is set before triton is imported"
    assert done.stdout.splitlines() == [f"{name} runs on cuda, interpret, not on cpu{hint}" for name in NAMES]


@pytest.mark.parametrize(
    "call",
    [
        "impls.decode_kda(x, x, x, x, x[..., 0], torch.zeros(1, 1, 2, 2), implementation='decode_triton')",
        "impls.dplr(x, x, x, x, x, x, implementation='dplr_triton')",
    ],
    ids=["decode_kda", "dplr"],
)
def test_what_is_no_row_needs_the_interpreter_too(call):
    """Triton's own error is `0 active drivers`."""
    code = f"import torch, impls\nx = torch.zeros(1, 3, 1, 2)\n{call}"
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=plain)
    assert "ValueError: q must be on a GPU for a Triton kernel, got cpu; CPU tensors run in" in done.stderr


def test_where_triton_is_missing_the_rows_say_so(monkeypatch):
    monkeypatch.setattr("impls.table.HAS_TRITON", False)
    for name in NAMES:
        assert find(name).supports(device="cuda") == f"{name} needs triton, which is not installed"
    assert chosen(form="chunk", device="cuda").name == "chunk_torch"


def test_nobody_chooses_an_interpreted_row():
    for form in ("chunk", "recurrent", None):
        assert "cpu" in chosen(form=form, device="cpu").devices


@pytest.mark.parametrize(
    "name, kind, others",
    [
        ("chunk_triton", "ChunkTritonConfig", ["fast", RECURRENT, ChunkTorchConfig(), {"chunk_size": 16}]),
        ("recurrent_triton", "RecurrentTritonConfig", ["fast", CHUNK, 32]),
    ],
)
def test_configurations_of_another_kind_are_refused(draw, name, kind, others):
    for other in others:
        refused(
            TypeError, f"config must be a {kind} for {name}, got", name, draw(1, 3, 1, 1, 2, 2), config=other
        )  # fmt: skip


WRONG = {
    "chunk_size": [0, 8, 48, 128, 16.0, "16"],
    "value_tile": [0, 8, 24, 512, None],
    "segments": [-1, 2000, 1.5],
    "recompute": [1, None],
    "saves": [1, None],
    "intra_tiles": [0, 3, 4],
    "warps": [0, 3, 32, True],
    "stages": [0, 9],
    "contiguity": [0, 3, 16],
    "registers": [-8, 16, 100, 256],
}
FIELDS = [(config, field.name) for config in (CHUNK, RECURRENT) for field in fields(config)]


@pytest.mark.parametrize("config, name", FIELDS, ids=[f"{type(c).__name__}.{name}" for c, name in FIELDS])
def test_every_field_of_a_configuration_is_checked_and_named(draw, config, name):
    row = "chunk_triton" if config is CHUNK else "recurrent_triton"
    assert invalid(config) is None
    for value in WRONG.get(name) or WRONG[name.split("_")[1]]:
        wrong = replace(config, **{name: value})
        assert invalid(wrong).startswith(f"{name} must be ") and invalid(wrong).endswith(f"got {value!r}")
        refused(ValueError, f"{name} must be ", row, draw(1, 3, 1, 1, 2, 2), config=wrong)


def test_tiles_have_the_16_tokens_that_a_matrix_instruction_takes():
    assert "intra_tiles" in (invalid(replace(CHUNK, chunk_size=16, intra_tiles=2)) or "")
    assert invalid(replace(CHUNK, chunk_size=32, intra_tiles=2)) is None


def test_contradicting_chunk_sizes_are_refused(draw):
    inputs = draw(1, 3, 1, 1, 2, 2)
    asked = {"config": ChunkTritonConfig(chunk_size=16), "chunk_size": 32}
    refused(ValueError, "chunk_size must be config.chunk_size = 16, got 32", "chunk_triton", inputs, **asked)
    refused(ValueError, "chunk_size must be one of 16, 32, 64, got 128", "chunk_triton", inputs, chunk_size=128)
    refused(ValueError, "chunk_size must be None for recurrent_triton", "recurrent_triton", inputs, chunk_size=16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bounds, message",
    [
        ([0, 2], "cu_seqlens must run from 0 to T = 3, got 0 to 2"),
        ([1, 3], "cu_seqlens must run from 0 to T = 3, got 1 to 3"),
        ([0, 2, 1, 3], "cu_seqlens must never fall, got 2 then 1 at positions 1 and 2"),
        ([0, 9, 3], "cu_seqlens must never fall, got 9 then 3 at positions 1 and 2"),
    ],
)
def test_bad_packings_are_refused(draw, name, bounds, message):
    for keeps in (False, True):
        asked = {"cu_seqlens": torch.tensor(bounds), "return_intermediate_states": keeps}
        refused(ValueError, message, name, draw(1, 3, 1, 1, 2, 2), **asked)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keywords_and_intervals_between_chunks_are_refused(draw, name):
    inputs = draw(1, 3, 1, 1, 2, 2)
    refused(TypeError, "scales", name, inputs, scales=1.0)
    refused(ValueError, "must be a positive", name, inputs, return_intermediate_states=True, state_interval=0)
    if name == "chunk_triton":
        asked = {"return_intermediate_states": True, "state_interval": 24}
        refused(ValueError, "must be a multiple of the chunk size 16, got 24", name, inputs, **asked)


def test_a_configuration_that_needs_too_much_shared_memory_is_refused_before_a_launch_with_one_that_fits():
    launch, _ = chunk_triton_launch(ChunkTritonConfig(chunk_size=64, walk_stages=5), None)
    with pytest.raises(ValueError, match=r"walk needs \d+ bytes of shared memory .* gfx942 has 65536; .* would fit"):
        chunk_triton_config(launch, 256, 256, "bfloat16", named("gfx942"))
    assert chunk_triton_config((16,), 256, 256, "bfloat16", named("gfx942")).chunk_size == 16
