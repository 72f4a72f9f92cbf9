"""The Triton rows agree with the definition, interpreted: every configuration, size, packing, activation and dtype."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

import kda_spec
from impls import IMPLEMENTATIONS, kda
from impls.chunk_triton import op
from impls.configs import ChunkTritonConfig, RecurrentTritonConfig
from kda_spec import gates
from kda_spec.types import Inputs

NAMES = [row.name for row in IMPLEMENTATIONS if "interpret" in row.devices]
# Twice the worst relative error of a whole tensor over this file's cases, 2.4e-7 (K = 256).
FLOAT32 = 4.8e-7
# In 16 bits: one rounding of the outputs. chunk_triton rounds the operands of its products and what it stores as well:
# 1.12 roundings in o and 0.92 in S at worst, and twice that.
NARROW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = {"recurrent_triton": 1.0, "chunk_triton": 2.25}


def reference(inputs, scale=None, initial_state=None, cu_seqlens=None):
    arrays = [x.double().numpy() if isinstance(x, torch.Tensor) else x for x in inputs]
    S0 = None if initial_state is None else initial_state.double().numpy()
    packing = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    outputs = kda_spec.recurrent(Inputs(*arrays, scale=scale, initial_state=S0, cu_seqlens=packing))
    return outputs.o, outputs.final_state


def relative_error(x: torch.Tensor, exact: np.ndarray) -> float:
    assert tuple(x.shape) == exact.shape
    difference = np.linalg.norm(x.double().numpy() - exact)
    return float(difference / np.linalg.norm(exact)) if exact.any() else float(difference)


def assert_agree(name, inputs, exact, **keywords):
    """Run a row and compare with exact (o, S); return what else it returned."""
    narrow = NARROW.get(inputs[2].dtype)
    bound = ROUNDINGS[name] * narrow if narrow else FLOAT32
    o, S, *kept = kda(*inputs, implementation=name, output_final_state=True, **keywords)
    assert o.dtype == inputs[2].dtype and S.dtype == torch.float32
    assert relative_error(o, exact[0]) <= bound
    assert relative_error(S, exact[1]) <= (FLOAT32 if name == "recurrent_triton" else bound)
    return kept


CONFIGS = [
    *[ChunkTritonConfig(chunk_size=C, intra_tiles=tiles) for C in (16, 32, 64) for tiles in (1, 2) if C // tiles >= 16],
    ChunkTritonConfig(value_tile=16),
    ChunkTritonConfig(chunk_size=32, intra_tiles=2, recompute=True),
    ChunkTritonConfig(segments=2),
    ChunkTritonConfig(segments=3, recompute=True, value_tile=16),
    ChunkTritonConfig(chunk_size=32, segments=2, intra_tiles=2, value_tile=32),
    ChunkTritonConfig(segments=1000),
    RecurrentTritonConfig(value_tile=16),
]


def row_of(config) -> str:
    return next(row.name for row in IMPLEMENTATIONS if row.config is type(config))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: ".".join(map(str, astuple(config))))
@pytest.mark.parametrize("bounds", [None, (0, 0, 33, 34, 34, 50, 66, 66)], ids=["padded", "packed"])
def test_every_configuration_agrees_from_and_to_states_in_both_layouts(draw, draw_state, config, bounds):
    inputs, N = draw(1, 66, 1, 1, 17, 20, resets=True), 1 if bounds is None else len(bounds) - 1
    S0, cu_seqlens = draw_state(N, 1, 17, 20), None if bounds is None else torch.tensor(bounds)
    exact = reference(inputs, 0.7, S0, cu_seqlens)
    assert_agree(row_of(config), inputs, exact, config=config, initial_state=S0, cu_seqlens=cu_seqlens, scale=0.7)
    turned = {"initial_state": S0.mT, "state_v_first": True, "return_intermediate_states": True}
    (h,) = assert_agree(
        row_of(config), inputs, (exact[0], exact[1].swapaxes(2, 3)),
        config=config, cu_seqlens=cu_seqlens, scale=0.7, **turned,
    )  # fmt: skip
    runs = list(zip((bounds or (0, 66)), (bounds or (0, 66))[1:], strict=False))
    enters = [(n, first, t) for n, (first, last) in enumerate(runs) for t in range(first, last, 64)]
    assert h.shape == (1, len(enters), 1, 20, 17)
    for i, (n, first, t) in enumerate(enters):
        _, S = reference([x[:, first:t] for x in inputs], initial_state=S0[n : n + 1])
        assert relative_error(h[0, i].mT, S[0]) <= FLOAT32


# Several pieces of the transition; K == BK and V % value tile == 0, so that only the rows of tiles are masked.
PIECES = [(64, 32), (100, 16), (256, 17)]


@pytest.mark.parametrize("K, V", PIECES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [None, (0, 3, 3, 70)], ids=["padded", "packed"])
def test_segments_agree_where_a_transition_takes_several_pieces(draw, draw_state, K, V, dtype, bounds):
    inputs, config = draw(1, 70, 1, 1, K, V, dtype), ChunkTritonConfig(value_tile=16, segments=3)
    S0 = draw_state(1 if bounds is None else len(bounds) - 1, 1, K, V)
    packing = None if bounds is None else torch.tensor(bounds)
    exact = reference(inputs, initial_state=S0, cu_seqlens=packing)
    assert_agree("chunk_triton", inputs, exact, config=config, initial_state=S0, cu_seqlens=packing)


@pytest.mark.parametrize("segments", [1, 3])
def test_a_long_memory_is_not_rounded_from_chunk_to_chunk(draw, draw_state, segments):
    """States that hardly change for 13 chunks: 0.13 roundings of bfloat16 at worst, 1.4 if every chunk rounded them."""
    (q, k, v, g, beta), S0 = draw(1, 200, 1, 1, 16, 16), draw_state(1, 1, 16, 16)
    inputs = [x.bfloat16() for x in (q, k, v / 16, torch.full_like(g, -1e-3), beta / 16)]
    exact, config = reference(inputs, initial_state=S0), ChunkTritonConfig(segments=segments)
    asked = {"config": config, "initial_state": S0, "output_final_state": True}
    o, S = kda(*inputs, implementation="chunk_triton", **asked)
    assert relative_error(o, exact[0]) <= 2.25 * NARROW[torch.bfloat16]
    assert relative_error(S, exact[1]) <= 0.27 * NARROW[torch.bfloat16]


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_interval_runs_again_from_its_kept_state_bit_for_bit(draw, draw_state, segments, dtype):
    """What a backward needs saved: the op keeps float32, whatever the inputs are; segments of 32 tokens."""
    inputs, S0 = draw(1, 70, 1, 2, 17, 20, dtype), draw_state(1, 2, 17, 20)
    launch = [int(x) for x in astuple(ChunkTritonConfig(segments=segments))]
    again = [int(x) for x in astuple(ChunkTritonConfig(segments=1))]

    def run(x, state, interval, launch):
        return op(*x, None, None, state, None, None, 1.0, None, False, "none", "none", False, True, interval, launch)

    o, S, h = run(inputs, S0, 32, launch)
    assert h.dtype == torch.float32 and h.shape == (1, 3, 2, 17, 20) and torch.equal(h[:, 0], S0)
    for i in range(3):
        span = slice(32 * i, 32 * (i + 1))
        o_again, S_again, _ = run([x[:, span].contiguous() for x in inputs], h[:, i], 0, again)
        assert torch.equal(o[:, span], o_again)
    assert torch.equal(S, S_again)


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("initial", [False, True])
def test_kept_states_of_segments_enter_every_interval(draw, draw_state, segments, initial):
    inputs, S0 = draw(2, 70, 1, 1, 5, 3), draw_state(2, 1, 5, 3) if initial else None
    config = ChunkTritonConfig(segments=segments)
    asked = {"state_interval": 16, "return_intermediate_states": True, "initial_state": S0}
    (h,) = assert_agree("chunk_triton", inputs, reference(inputs, initial_state=S0), config=config, **asked)
    assert h.shape == (2, 5, 1, 5, 3)
    for i in range(5):
        _, S = reference([x[:, : 16 * i] for x in inputs], initial_state=S0)
        assert relative_error(h[:, i], S) <= FLOAT32


# B, T, H, HV, K, V: no power of two, one channel, the most; grouped heads; no tokens, no sequences.
SHAPES = [
    (1, 5, 1, 2, 1, 1),
    (1, 18, 1, 1, 3, 256),
    (2, 17, 1, 3, 16, 17),
    (1, 18, 2, 4, 17, 3),
    (1, 16, 1, 1, 60, 16),
    (1, 17, 1, 1, 256, 60),
    (1, 17, 1, 1, 256, 256),
    (1, 18, 1, 1, 1, 100),
    (2, 0, 1, 2, 3, 5),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_agrees(draw, draw_state, name, shape):
    B, _, _, HV, K, V = shape
    inputs, S0 = draw(*shape), draw_state(B, HV, K, V)
    assert_agree(name, inputs, reference(inputs, initial_state=S0), initial_state=S0)


PACKINGS = [[0, 0, 0, 16, 33], [0, 33, 33, 33], [0, 1, 2, 3, 3, 3, 33], [0, 17, 17, 33], [0, 33], [0, 16, 32, 33]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("i", range(len(PACKINGS)), ids=lambda i: str(PACKINGS[i]))
def test_packed_sequences_agree_empty_ones_included(draw, draw_state, name, i):
    packing, dtype = PACKINGS[i], (torch.int32, torch.int64)[i % 2]
    inputs, S0, cu_seqlens = draw(1, 33, 1, 1, 4, 3), draw_state(len(packing) - 1, 1, 4, 3), torch.tensor(packing)
    exact = reference(inputs, initial_state=S0, cu_seqlens=cu_seqlens)
    assert_agree(name, inputs, exact, initial_state=S0, cu_seqlens=cu_seqlens.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_or_packing_of_no_sequences_gives_empty_results(draw, name):
    for shape, cu_seqlens in (((0, 20, 1, 2, 4, 3), None), ((1, 0, 1, 2, 4, 3), torch.tensor([0]))):
        o, S = kda(*draw(*shape), implementation=name, cu_seqlens=cu_seqlens, output_final_state=True)
        assert o.shape == (shape[0], shape[1], 2, 3) and S.shape == (0, 2, 4, 3)


# The keywords that turn an activation on, and what the definition makes of raw q, k, g, beta.
FLAGS = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
ACTIVATIONS = {
    "l2norm": {"use_qk_l2norm_in_kernel": True},
    "softplus": {"use_gate_in_kernel": True, "A_log": True},
    "softplus, dt_bias": {"use_gate_in_kernel": True, "A_log": True, "dt_bias": True},
    "bounded": {"use_gate_in_kernel": True, "lower_bound": -5.0},
    "bounded, A_log, dt_bias": {"use_gate_in_kernel": True, "A_log": True, "dt_bias": True, "lower_bound": -5.0},
    "sigmoid": {"use_beta_sigmoid_in_kernel": True},
    "2 sigmoid": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
    "all": {**dict.fromkeys((*FLAGS, "A_log", "dt_bias"), True)},
}


def raw_inputs(draw, asked, dtype, T=20, HV=2, K=6):
    """Return raw inputs, the keywords of the call with A_log and dt_bias drawn, and the activated inputs."""
    q, k, v, g, beta = draw(1, T, 1, HV, K, 5)
    q, k = (3 * q, 5 * k) if "use_qk_l2norm_in_kernel" in asked else (q, k)
    g = 8 * (g + 1) if "use_gate_in_kernel" in asked else g
    beta = 20 * (beta - 0.5) if "use_beta_sigmoid_in_kernel" in asked else beta
    raw = [x.to(dtype) for x in (q, k, v, g, beta)]
    parameters = {"A_log": torch.linspace(-2, 2, HV), "dt_bias": torch.linspace(-1, 1, HV * K)}
    keywords = asked | {name: x for name, x in parameters.items() if name in asked}
    return raw, keywords, activated(raw, keywords)


def activated(raw, keywords):
    q, k, v, g, beta = (x.double().numpy() for x in raw)
    if "use_qk_l2norm_in_kernel" in keywords:
        q, k = gates.l2norm(q), gates.l2norm(k)
    if "use_gate_in_kernel" in keywords:
        A, bias = (None if (x := keywords.get(name)) is None else x.double().numpy() for name in ("A_log", "dt_bias"))
        bias = None if bias is None else bias.reshape(g.shape[2:])
        bound = keywords.get("lower_bound")
        g = gates.softplus_gate(g, A, bias) if bound is None else gates.lower_bound_gate(g, bound, A, bias)
    if "use_beta_sigmoid_in_kernel" in keywords:
        beta = gates.beta_sigmoid(beta, keywords.get("allow_neg_eigval", False))
    return q, k, v, g, beta


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("asked", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_every_activation_agrees_with_the_definition_in_every_dtype(draw, name, asked):
    for dtype in (torch.float32, *NARROW):
        raw, keywords, exact = raw_inputs(draw, asked, dtype)
        assert_agree(name, raw, reference(exact), **keywords)


@pytest.mark.parametrize("config", [ChunkTritonConfig(recompute=True), ChunkTritonConfig(segments=2, recompute=True)])
def test_a_walk_that_recomputes_activates_alike(draw, config):
    raw, keywords, exact = raw_inputs(draw, ACTIVATIONS["all"], torch.float32, T=35)
    assert_agree("chunk_triton", raw, reference(exact), config=config, **keywords)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("reset", [-torch.inf, -1000.0])
def test_a_gate_that_forgets_all_gives_zero_decays_and_no_nan(draw, name, dtype, reset):
    q, k, v, g, beta = draw(1, 35, 1, 2, 6, 5, dtype)
    g[:, 5::17], g[:, 3::7, :, :3], g[:, 0] = reset, reset, reset
    assert_agree(name, (q, k, v, g, beta), reference((q, k, v, g, beta)))


@pytest.mark.parametrize("name", NAMES)
def test_every_input_may_have_a_dtype_of_its_own(draw, draw_state, name):
    q, k, v, g, beta = draw(1, 20, 1, 2, 6, 5)
    A_log, dt_bias = torch.linspace(-1, 1, 2).double(), torch.linspace(-1, 1, 12).half()
    raw = (q.bfloat16(), k.bfloat16(), v.bfloat16(), (8 * (g + 1)).half(), beta)
    keywords = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    for S0 in (draw_state(1, 2, 6, 5, torch.bfloat16), draw_state(1, 2, 6, 5)):
        exact = reference(activated(raw, keywords), initial_state=S0)
        assert_agree(name, raw, exact, initial_state=S0, **keywords)


def test_default_configurations_are_what_no_configuration_means(draw):
    inputs = draw(1, 20, 1, 1, 6, 5)
    for config in (ChunkTritonConfig(), RecurrentTritonConfig(), replace(ChunkTritonConfig(), chunk_size=32)):
        chunk_size = getattr(config, "chunk_size", None)
        given, _ = kda(*inputs, implementation=row_of(config), config=config)
        assert torch.equal(kda(*inputs, implementation=row_of(config), chunk_size=chunk_size)[0], given)
