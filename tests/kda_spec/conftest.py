"""Draw inputs of every family, and tiny models: what the tests of the forms, gradients, gates and layers share."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from kda_spec import Inputs, Settings, settings_of, tensor_shapes

# Name -> (keys, gates, beta). Every family lies in the domain; those named `reset` and `abyss` leave that of chunkwise.
FAMILIES = {
    "mild": ("random", "mild", "unit"),
    "no decay": ("random", "none", "unit"),
    "strong gates": ("random", "strong", "unit"),
    "per-head gates": ("random", "per-head", "unit"),
    "near-collinear keys": ("collinear", "mild", "unit"),
    "one-hot keys": ("one-hot", "mild", "one"),
    "zero keys": ("zero", "mild", "unit"),
    "beta 0": ("random", "mild", "zero"),
    "beta 2": ("random", "none", "two"),
    "beta 2, collinear": ("collinear", "mild", "two"),
    "reset -inf": ("random", "reset", "unit"),
    "abyss -1000": ("random", "abyss", "unit"),
}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw_keys(rng, kind: str, shape) -> np.ndarray:
    if kind == "one-hot":
        return np.eye(shape[-1])[rng.integers(shape[-1], size=shape[:-1])]
    if kind == "collinear":
        return unit(unit(rng.standard_normal(shape[-1])) + 0.02 * rng.standard_normal(shape))
    return unit(rng.standard_normal(shape)) * (0.0 if kind == "zero" else 1.0)


def draw_gates(rng, kind: str, shape) -> np.ndarray:
    B, T, HV, K = shape
    factor = {"none": 0.0, "strong": 8.0, "per-head": 3.0 ** -np.arange(HV)[:, None]}.get(kind, 0.3)
    g = -factor * rng.random(shape)
    if kind in ("reset", "abyss"):
        g[:, T // 3 :: 7] = -np.inf if kind == "reset" else -1000.0
        g[:, :2, :, 0] = -np.inf if kind == "reset" else -1000.0
    return g


def draw_beta(rng, kind: str, shape) -> np.ndarray:
    return {"zero": 0.0, "one": 1.0, "two": 2.0}.get(kind, rng.random(shape)) * np.ones(shape)


def draw(family="mild", seed=0, B=1, T=19, H=2, HV=None, K=5, V=3, state=True, scale=None, cu_seqlens=None) -> Inputs:
    rng, HV = np.random.default_rng(seed), HV or H
    keys, gates, beta = FAMILIES[family]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    return Inputs(
        q=rng.standard_normal((B, T, H, K)),
        k=draw_keys(rng, keys, (B, T, H, K)),
        v=rng.standard_normal((B, T, HV, V)),
        g=draw_gates(rng, gates, (B, T, HV, K)),
        beta=draw_beta(rng, beta, (B, T, HV)),
        scale=scale,
        initial_state=rng.standard_normal((N, HV, K, V)) if state else None,
        cu_seqlens=cu_seqlens,
    )


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ||actual - expected|| / ||expected||, 0 where both are empty or zero."""
    assert actual.shape == expected.shape
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return 0.0 if difference == 0 else float(difference / np.linalg.norm(expected))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Name one family of inputs after the other."""
    return request.param


@pytest.fixture
def cases() -> SimpleNamespace:
    """Offer `draw(family, seed, **sizes)` and `relative(actual, expected)`."""
    table: dict[str, Callable] = {"draw": draw, "relative": relative}
    return SimpleNamespace(**table)


# A released config.json made tiny: every size different, a dense first layer, MLA last though no multiple of four.
TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "linear_attn_config": {
        "full_attn_layers": [3, 5],
        "kda_layers": [1, 2, 4],
        "num_heads": 2,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    },
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "q_lora_rank": None,
    "mla_use_nope": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 12,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tiny_tensors(settings: Settings, seed=0) -> dict[str, np.ndarray]:
    """Draw every tensor of a checkpoint: float64 arrays of numbers that float32 holds, streams of about unit size."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(settings).items():
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("_bias"):
            x = 0.1 * x
        elif len(shape) == 2 and "embed" not in name:
            x = x * shape[1] ** -0.5 * (0.03 if "kv_a" in name else 1.0)  # small, or the eps of the norm behind is lost
        tensors[name] = x.astype(np.float32).astype(np.float64)
    return tensors


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Offer `config` (a released config.json made tiny), `settings`, and `tensors(settings, seed)`."""
    return SimpleNamespace(config=TINY, settings=settings_of(TINY), tensors=tiny_tensors)
