"""The implementations agree with the definition, over every size, dtype and mode that they take."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kda_spec
from impls import IMPLEMENTATIONS, ChunkTorchConfig, kda
from kda_spec.types import Inputs

ON_CPU = [row for row in IMPLEMENTATIONS if "cpu" in row.devices]  # the others: test_triton_reference.py
VARIANTS = [(row.name, C) for row in ON_CPU for C in row.chunk_sizes or (None,)]
# Twice the worst relative error of a whole tensor over this file's cases, which is 2.8e-7 token by token and 1.6e-6 in
# chunks (K = 1: all keys collinear), and 1.3e-15 in float64. The 16-bit formats: one rounding of the outputs.
FLOAT32 = {"recurrent_torch": 6e-7, "chunk_torch": 3.2e-6}
# The same for near-collinear keys with beta = 2: 9.5e-7 and 1.5e-5 (growing with C), and 5.4e-14.
FLOAT32_REFLECTIONS = {"recurrent_torch": 2e-6, "chunk_torch": 3e-5}
BOUNDS = {torch.float64: 3e-15, torch.float32: None, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# B, T, H, HV, K, V: lengths around chunk borders; channels that are no powers of two, or one, or the most.
SHAPES = [
    (2, 0, 1, 2, 3, 16),
    (3, 1, 2, 2, 16, 3),
    (8, 15, 1, 1, 1, 1),  # 8 sequences: one number alone, if it happens to be small, has no relative error to speak of
    (1, 16, 1, 3, 3, 60),
    (2, 17, 2, 4, 60, 16),
    (1, 63, 2, 2, 16, 128),
    (1, 64, 1, 2, 128, 3),
    (1, 65, 1, 1, 256, 1),
    (1, 65, 1, 1, 1, 256),
    (2, 130, 2, 6, 16, 16),
    (5, 130, 4, 4, 3, 1),
    (1, 300, 1, 17, 16, 3),
]
PACKINGS = [[0, 0, 30, 31, 31, 95, 160], [0, 160], [0, 1, 2, 3, 160, 160], [0, 64, 128, 160]]


def reference(inputs, scale=None, initial_state=None, cu_seqlens=None):
    arrays = [x.double().numpy() for x in inputs]
    S0 = None if initial_state is None else initial_state.double().numpy()
    packing = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    outputs = kda_spec.recurrent(Inputs(*arrays, scale=scale, initial_state=S0, cu_seqlens=packing))
    return outputs.o, outputs.final_state


def relative_error(x: torch.Tensor, exact: np.ndarray) -> float:
    assert tuple(x.shape) == exact.shape
    difference = np.linalg.norm(x.double().numpy() - exact)
    return float(difference / np.linalg.norm(exact)) if exact.any() else float(difference)


def assert_agree(inputs, bound, name, C, **keywords):
    o, S = kda(*inputs, implementation=name, chunk_size=C, output_final_state=True, **keywords)
    exact_o, exact_S = reference(inputs, **keywords)
    assert o.dtype == inputs[2].dtype
    assert S.dtype == (torch.float64 if o.dtype == torch.float64 else torch.float32)
    assert relative_error(o, exact_o) <= (bound or FLOAT32[name])
    assert relative_error(S, exact_S) <= (FLOAT32[name] if o.itemsize == 2 else bound or FLOAT32[name])


@pytest.mark.parametrize("name, C", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_agrees_in_both_precisions(draw, draw_state, shape, name, C):
    B, _, _, HV, K, V = shape
    for dtype in (torch.float64, torch.float32):
        S0 = draw_state(B, HV, K, V, dtype)
        assert_agree(draw(*shape, dtype), BOUNDS[dtype], name, C, initial_state=S0, scale=0.7)


@pytest.mark.parametrize("name, C", VARIANTS)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_sequences_agree(draw, draw_state, packing, name, C):
    inputs, cu_seqlens = draw(1, 160, 2, 4, 16, 5, torch.float64), torch.tensor(packing)
    S0 = draw_state(len(packing) - 1, 4, 16, 5, torch.float64)
    assert_agree(inputs, BOUNDS[torch.float64], name, C, cu_seqlens=cu_seqlens, initial_state=S0)
    o, S = kda(*inputs, implementation=name, chunk_size=C, cu_seqlens=cu_seqlens.int(), cu_seqlens_cpu=cu_seqlens)
    assert relative_error(o, reference(inputs, cu_seqlens=cu_seqlens)[0]) <= BOUNDS[torch.float64]
    assert S is None


@pytest.mark.parametrize("name, C", VARIANTS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_dtype_agrees_and_gates_of_minus_infinity_forget(draw, name, C, dtype):
    assert_agree(draw(2, 130, 2, 4, 16, 12, dtype, resets=True), BOUNDS[dtype], name, C)


@pytest.mark.parametrize("name, C", VARIANTS)
def test_near_collinear_keys_and_beta_2_agree(draw, name, C):
    q, k, v, g, beta = draw(1, 130, 1, 2, 32, 16, torch.float64)
    near = torch.nn.functional.normalize(k[:, :1] + 0.02 * k, dim=-1)
    hard = (q, near, v, 0.01 * g, torch.full_like(beta, 1.999))
    assert_agree(hard, 1e-13, name, C)
    assert_agree([x.float() for x in hard], FLOAT32_REFLECTIONS[name], name, C)


@pytest.mark.parametrize("name, C", VARIANTS)
def test_gates_and_betas_may_have_a_dtype_of_their_own(draw, name, C):
    q, k, v, g, beta = draw(1, 40, 2, 2, 16, 8)
    mixed = (q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta.half())
    assert_agree(mixed, BOUNDS[torch.bfloat16], name, C)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_initial_states_of_every_legal_dtype_are_read(draw, draw_state, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs, S0 = draw(2, 20, 1, 2, 8, 8, wide), draw_state(2, 2, 8, 8, dtype)
    for name in ("recurrent_torch", "chunk_torch"):
        assert_agree(inputs, BOUNDS[wide], name, None, initial_state=S0)


@pytest.mark.parametrize("lower_bound, with_A_log", [(None, True), (-5.0, True), (-5.0, False)])
def test_activations_agree_with_the_definition(draw, lower_bound, with_A_log):
    from kda_spec import gates

    q, k, v, g, beta = draw(2, 33, 2, 4, 6, 5, torch.float64)
    q, k, raw_g, raw_beta = 3 * q, 5 * k, 8 * (g + 1), 20 * (beta - 0.5)
    A_log = torch.linspace(-2, 2, 4, dtype=torch.float64) if with_A_log else None
    dt_bias = torch.linspace(-1, 1, 24, dtype=torch.float64)
    bias, A = dt_bias.numpy().reshape(4, 6), None if A_log is None else A_log.numpy()
    if lower_bound is None:
        decay = gates.softplus_gate(raw_g.numpy(), A, bias)
    else:
        decay = gates.lower_bound_gate(raw_g.numpy(), lower_bound, A, bias)
    activated = (gates.l2norm(q.numpy()), gates.l2norm(k.numpy()), v, decay, gates.beta_sigmoid(raw_beta.numpy(), True))
    exact, _ = reference([torch.as_tensor(x) for x in activated])
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    for name in ("recurrent_torch", "chunk_torch"):
        raw = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound, "allow_neg_eigval": True, **flags}
        o, _ = kda(q, k, v, raw_g, raw_beta, implementation=name, **raw)
        assert relative_error(o, exact) <= 1e-13


def test_a_compiled_block_agrees_in_every_mode_and_keeps_the_claims(draw):
    config = ChunkTorchConfig(chunk_size=16, block_tokens=16, heads=4, compile=True)
    inputs = draw(3, 37, 1, 2, 16, 5, resets=True)
    o, S = kda(*inputs, implementation="chunk_torch", config=config, output_final_state=True)
    exact_o, exact_S = reference(inputs)
    assert max(relative_error(o, exact_o), relative_error(S, exact_S)) <= FLOAT32["chunk_torch"]
    with torch.inference_mode():
        alone, _ = kda(*(x[1:2] for x in inputs), implementation="chunk_torch", config=config)
    assert torch.equal(alone[0], o[1])
    shorter, _ = kda(*(x[:, :20].requires_grad_() for x in inputs), implementation="chunk_torch", config=config)
    assert torch.equal(shorter, o[:, :20])


RUN = """
import warnings
import torch
from impls import ChunkTorchConfig, kda
draw = torch.Generator().manual_seed(0)
inputs = [torch.rand(1, 20, 2, *size, generator=draw) for size in ((16,), (16,), (16,), (16,), ())]
inputs[3] = -inputs[3]
eager, _ = kda(*inputs, implementation="chunk_torch", config=ChunkTorchConfig())
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    found = [kda(*inputs, implementation="chunk_torch")[0] for _ in range(2)]
print([str(x.message) for x in seen if "uncompiled" in str(x.message)])
print(all(torch.equal(x, eager) for x in found))
"""


def chunk_torch_with(**environment):
    environment = os.environ | {"KDA_TUNED": "0"} | environment
    run = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout.splitlines(), run.stderr


def test_without_a_compiler_what_should_be_compiled_runs_uncompiled_and_says_so_once():
    rc, (said, same), _ = chunk_torch_with(KDA_COMPILE="1", CXX="no-such-compiler", PATH="")
    assert rc == 0 and same == "True"
    assert said.count("compile=True runs uncompiled") == 1 and "no-such-compiler" in said


def test_the_environment_says_nothing_but_0_or_1_about_compiling():
    assert chunk_torch_with(KDA_COMPILE="0")[:2] == (0, ["[]", "True"])
    for value in ("yes", "-1"):
        rc, _, error = chunk_torch_with(KDA_COMPILE=value)
        assert rc == 1 and f"KDA_COMPILE must be 0 or 1, got '{value}'" in error


def test_every_row_of_the_table_has_a_bound_here_or_runs_interpreted():
    assert set(FLOAT32) == set(FLOAT32_REFLECTIONS) == {row.name for row in ON_CPU}
    assert all("interpret" in row.devices for row in IMPLEMENTATIONS if row not in ON_CPU)
