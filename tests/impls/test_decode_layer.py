"""A KDA layer's step in one call agrees with the definition, changes nothing that is given, and compiles whole."""

import numpy as np
import pytest
import torch
from steps_drawn import FLOAT32, NAMES, array, assert_close

import kda_spec
from impls import GatedNorm, ShortConvolution, decode_kda, decode_layer
from kda_spec import gates
from kda_spec.layers import rms_norm, short_convolution, sigmoid, silu
from kda_spec.types import Inputs

N, H, HV, K, V, W = 3, 2, 4, 6, 5, 4
SIZES = [H * K, H * K, HV * V]
GIVEN = ("qkv", "g", "beta", "gate", "inputs", "state")


def drawn(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator, D = torch.Generator().manual_seed(0), sum(SIZES)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = {"qkv": normal(N, D), "g": normal(N, HV, K), "beta": normal(N, HV), "gate": normal(N, HV, V)}
    before = {"inputs": normal(N, W - 1, D), "state": normal(N, HV, K, V).float()}
    weights = {"weight": normal(D, W), "norm_weight": normal(V), "dt_bias": normal(HV * K).float()}
    return tokens | before | weights | {"A_log": torch.linspace(-1, 1, HV)}


def stepped(x: dict[str, torch.Tensor], **others):
    return decode_layer(*(x[name] for name in GIVEN), **{name: x[name] for name in x if name not in GIVEN}, **others)


def expected(x: dict[str, torch.Tensor], lower_bound: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return y and the states behind the token, by the definition."""
    x = {name: array(y) for name, y in x.items()}
    qkv = silu(short_convolution(x["qkv"][:, None], x["weight"][:, None], x["inputs"])[0])
    heads = ((H, K), (H, K), (HV, V))
    parts = np.split(qkv, np.cumsum(SIZES)[:2], 2)
    q, k, v = (y.reshape(N, 1, *size) for y, size in zip(parts, heads, strict=True))
    dt_bias, raw = x["dt_bias"].reshape(HV, K), x["g"][:, None]
    if lower_bound is None:
        g = gates.softplus_gate(raw, x["A_log"], dt_bias)
    else:
        g = gates.lower_bound_gate(raw, lower_bound, x["A_log"], dt_bias)
    beta = gates.beta_sigmoid(x["beta"][:, None])
    found = kda_spec.recurrent(Inputs(gates.l2norm(q), gates.l2norm(k), v, g, beta, initial_state=x["state"]))
    return rms_norm(found.o[:, 0], x["norm_weight"], 1e-5) * sigmoid(x["gate"]), found.final_state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_layer_agrees_with_the_definition_and_leaves_what_it_was_given(name, lower_bound):
    x = drawn()
    before = {part: y.clone() for part, y in x.items()}
    y, inputs, S = stepped(x, implementation=name, lower_bound=lower_bound)
    exact = expected(x, lower_bound)
    assert_close(y, exact[0], FLOAT32)
    assert_close(S, exact[1], FLOAT32)
    assert torch.equal(inputs, torch.cat((x["inputs"][:, 1:], x["qkv"][:, None]), 1))
    assert all(torch.equal(x[part], old) for part, old in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_16_bits_are_rounded_once_in_the_output(name):
    x = drawn(torch.float16)
    y, _, S = stepped(x, implementation=name)
    exact = expected(x, None)
    assert y.dtype == torch.float16 and S.dtype == torch.float32
    assert_close(y, exact[0], torch.finfo(torch.float16).eps / 2)
    assert_close(S, exact[1], FLOAT32)


def test_steps_follow_one_another():
    """What one leaves, the next one takes: as by rings and positions in a pool."""
    x, pool = drawn(), drawn()
    rings = torch.zeros(N, W, sum(SIZES))
    rings[:, : W - 1] = pool["inputs"]
    for position in range(W - 1, W + 4):
        y, x["inputs"], x["state"] = stepped(x)
        parts = zip(x["qkv"].split(SIZES, 1), (K, K, V), strict=True)
        q, k, v = (part.unflatten(1, (-1, size))[:, None] for part, size in parts)
        at = torch.full((N,), position)
        o = decode_kda(
            q, k, v, x["g"][:, None], x["beta"][:, None], pool["state"], A_log=x["A_log"], dt_bias=x["dt_bias"],
            convolution=ShortConvolution(*x["weight"].split(SIZES), *rings.split(SIZES, 2), at),
            norm=GatedNorm(x["norm_weight"], x["gate"][:, None]), use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        assert torch.equal(y, o[:, 0]) and torch.equal(x["state"], pool["state"])


def test_the_op_is_what_it_says_and_compiles_whole():
    x = drawn()
    arguments = [x[name] for name in (*GIVEN, "weight", "norm_weight", "A_log", "dt_bias")]
    torch.library.opcheck(torch.ops.kda_forge.decode_layer.default, (*arguments, None, 1e-5, ""))
    graph = torch.compile(stepped, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, graph(x), stepped(x)))


def test_precision_settings_and_autocast_change_no_bit():
    x = drawn()
    y = stepped(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, stepped(x), y))
    finally:
        torch.set_float32_matmul_precision(before)


REFUSED = {
    "inputs of other channels": ({"inputs": torch.zeros(N, W - 1, 5)}, ValueError, "inputs must be"),
    "no state": ({"state": torch.zeros(N, HV, K)}, ValueError, "and state"),
    "a state too few": ({"state": torch.zeros(N - 1, HV, K, V)}, ValueError, "a slot for each of N = 3"),
    "another weight": ({"weight": torch.zeros(sum(SIZES), 3)}, ValueError, "inputs must be"),
    "half a head": ({"qkv": torch.zeros(N, sum(SIZES) - 1)}, ValueError, "qkv must be"),
    "g of another token": ({"g": torch.zeros(N, 1, HV, K)}, ValueError, "g must be"),
    "float64": ({"qkv": torch.zeros(N, sum(SIZES)).double()}, TypeError, "must be"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(case):
    changed, error, message = case
    with pytest.raises(error, match=message):
        stepped(drawn() | changed)
