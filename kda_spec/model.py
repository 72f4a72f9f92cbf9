"""Compute Kimi Linear: embedding, blocks, logits, from the tensors of the released checkpoint under their own names.

    block    x <- x + attention(RMSNorm(x)),  then  x <- x + feed_forward(RMSNorm(x))         section 4, Figure 3

`settings_of` reads the released config.json, `tensor_shapes` says what the checkpoint holds, `forward` is the model.
Arrays of float64 make the definition; arrays of float32 show what that precision loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kda_spec.layers import (
    KdaSettings,
    KdaState,
    MlaSettings,
    MlaState,
    MoeSettings,
    Routing,
    Tensors,
    kda_layer,
    mla_layer,
    mlp,
    moe_layer,
    rms_norm,
)
from kda_spec.recurrent import kda

State = KdaState | MlaState
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    """Hold the sizes of a model and the kind of every layer."""

    vocabulary: int
    width: int
    """Channels of the residual stream, hidden_size."""
    dense_width: int
    """Channels of the MLP of a layer without experts, intermediate_size."""
    attention: tuple[str, ...]
    """"kda" or "mla", layer by layer."""
    feed_forward: tuple[str, ...]
    """"mlp" or "moe", layer by layer."""
    kda: KdaSettings
    mla: MlaSettings
    moe: MoeSettings
    eps: float = 1e-5


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """Hold logits [B, T, vocabulary], the cache behind the last token, and what happened on the way.

    cache: a state per layer. hidden: the residual stream [B, T, width] before the first block and after every one.
    routings: per layer what the router chose, None for a layer without experts.
    """

    logits: np.ndarray
    cache: tuple[State, ...]
    hidden: tuple[np.ndarray, ...]
    routings: tuple[Routing | None, ...]


def settings_of(config: Mapping) -> Settings:
    """Read the content of a released config.json. Keys that it has not choose other forms, all off where absent:

    q_lora_rank, kv_a_layernorm_eps, router_weight_uses_score_correction_bias, and in linear_attn_config
    gate_lower_bound, use_full_rank_gate, use_full_rank_forget, gate ("head": one decay per head).

    Raises ValueError, naming the key, for what is missing and for what the model cannot be: layers listed twice or not
    at all, sizes that do not divide, an activation other than SiLU, positions in MLA, tied embeddings.
    """
    try:
        _check_config(config)
        return _settings(config, config["linear_attn_config"])
    except KeyError as error:
        raise ValueError(f"config must have the key {error}") from error


def tensor_shapes(settings: Settings) -> Shapes:
    """Return name and shape of every tensor of the checkpoint, in its order; A_log and dt_bias alone are float32."""
    D = settings.width
    shapes = {"model.embed_tokens.weight": (settings.vocabulary, D)}
    attention = {"kda": _kda_shapes(settings.kda, D), "mla": _mla_shapes(settings.mla, D)}
    feed_forward = {
        "mlp": _prefixed("mlp.", _mlp_shapes(D, settings.dense_width)),
        "moe": _prefixed("block_sparse_moe.", _moe_shapes(settings.moe, D)),
    }
    for i, (mixer, ffn) in enumerate(zip(settings.attention, settings.feed_forward, strict=True)):
        norms = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        layer = norms | _prefixed("self_attn.", attention[mixer]) | feed_forward[ffn]
        shapes |= _prefixed(f"model.layers.{i}.", layer)
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (settings.vocabulary, D)}


def empty_cache(settings: Settings, B: int, dtype=np.float64) -> tuple[State, ...]:
    """Return the cache before the first token of B sequences: zeros for KDA, no latents for MLA."""
    k, m = settings.kda, settings.mla
    tail = np.zeros((B, k.taps - 1, k.heads * k.head_dim), dtype)
    fresh = {
        "kda": KdaState(tail, tail, tail, S=np.zeros((B, k.heads, k.head_dim, k.head_dim), dtype)),
        "mla": MlaState(np.zeros((B, 0, m.latent), dtype), np.zeros((B, 0, m.rope), dtype)),
    }
    return tuple(fresh[kind] for kind in settings.attention)


def forward(
    ids, tensors: Tensors, settings: Settings, cache: tuple[State, ...] | None = None, *, absorbed=False, recurrence=kda
) -> ModelOutputs:
    """Run the model on ids [B, T] behind the tokens of `cache` (None: a new text), which stays as it is.

    absorbed: form of MLA (`mla_layer`); recurrence: form of KDA (`kda_layer`). Raises ValueError for ids that are no
    integers of the vocabulary and for tensors that are missing, of wrong shapes, or not the model's.
    """
    ids = _checked_ids(ids, settings.vocabulary)
    check_tensors(tensors, settings)
    embedding = tensors["model.embed_tokens.weight"]
    x, hidden, states, routings = embedding[ids], [], [], []
    for i, state in enumerate(cache or empty_cache(settings, len(ids), embedding.dtype)):
        hidden.append(x)
        x, state, routing = block(x, tensors, settings, i, state, absorbed, recurrence)
        states.append(state)
        routings.append(routing)
    logits = rms_norm(x, tensors["model.norm.weight"], settings.eps) @ tensors["lm_head.weight"].T
    return ModelOutputs(logits, tuple(states), (*hidden, x), tuple(routings))


def block(x, tensors: Tensors, settings: Settings, i: int, state: State, absorbed=False, recurrence=kda):
    """Run block i (section 4, Figure 3): x [B, T, D] to the new x, the state behind it, and the routing or None."""
    w = _within(tensors, f"model.layers.{i}.")
    attention, normed = _within(w, "self_attn."), rms_norm(x, w["input_layernorm.weight"], settings.eps)
    if settings.attention[i] == "kda":
        y, state = kda_layer(normed, attention, settings.kda, state, recurrence)
    else:
        y, state = mla_layer(normed, attention, settings.mla, state, absorbed)
    x = x + y
    y, routing = _feed_forward(rms_norm(x, w["post_attention_layernorm.weight"], settings.eps), w, settings, i)
    return x + y, state, routing


def check_tensors(tensors: Tensors, settings: Settings) -> None:
    """Check names and shapes; A_log may be padded, and it and dt_bias shaped otherwise.

    Raises ValueError that lists what is missing, what is not the model's, and what has another shape.
    """
    expected = tensor_shapes(settings)
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        if not _fits(name, tensors[name].shape, expected[name]):
            problems.append(f"{name} must have shape {expected[name]}, got {tensors[name].shape}")
    if problems:
        raise ValueError("tensors do not fit the settings: " + "; ".join(sorted(problems)))


def _feed_forward(x, w: Tensors, settings: Settings, i: int) -> tuple[np.ndarray, Routing | None]:
    if settings.feed_forward[i] == "moe":
        return moe_layer(x, _within(w, "block_sparse_moe."), settings.moe)
    return mlp(x, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))), None


def _within(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with the prefix, under what follows it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _checked_ids(ids, vocabulary: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise ValueError(f"ids must be integers [B, T], got dtype {ids.dtype} and shape {ids.shape}")
    if np.any((ids < 0) | (ids >= vocabulary)):
        raise ValueError(f"ids must lie in 0 .. {vocabulary - 1}, got {ids.min()} .. {ids.max()}")
    return ids


def _fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name.endswith("A_log"):
        return np.prod(shape) >= np.prod(expected)
    return np.prod(shape) == np.prod(expected) if name.endswith("dt_bias") else shape == expected


def _attention(kda_layers, full_layers, layers: int) -> tuple[str, ...]:
    """Return the kind of every layer: the lists count from 1 (Kimi), or all from 0 (GLM 5.3 Flash)."""
    listed = sorted([*kda_layers, *full_layers])
    first = listed[0] if listed else 1
    if first not in (0, 1) or listed != list(range(first, first + layers)):
        raise ValueError(
            f"kda_layers and full_attn_layers must name each of {layers} layers once, from 1 or from 0, got {listed}"
        )
    return tuple("kda" if i + first in set(kda_layers) else "mla" for i in range(layers))


def _settings(config: Mapping, linear: Mapping) -> Settings:
    layers, first_moe, every = (config[key] for key in ("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq"))
    return Settings(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        dense_width=config["intermediate_size"],
        attention=_attention(linear["kda_layers"], linear["full_attn_layers"], layers),
        feed_forward=tuple("moe" if i >= first_moe and i % every == 0 else "mlp" for i in range(layers)),
        kda=_kda_settings(config, linear),
        mla=_mla_settings(config),
        moe=_moe_settings(config),
        eps=config["rms_norm_eps"],
    )


def _kda_settings(config: Mapping, linear: Mapping) -> KdaSettings:
    return KdaSettings(
        heads=linear["num_heads"],
        head_dim=linear["head_dim"],
        taps=linear["short_conv_kernel_size"],
        eps=config["rms_norm_eps"],
        lower_bound=linear.get("gate_lower_bound"),
        full_rank_decay=linear.get("use_full_rank_forget", False),
        decay_per_head=linear.get("gate", "channel") == "head",
        full_rank_gate=linear.get("use_full_rank_gate", False),
    )


def _mla_settings(config: Mapping) -> MlaSettings:
    return MlaSettings(
        heads=config["num_attention_heads"],
        latent=config["kv_lora_rank"],
        nope=config["qk_nope_head_dim"],
        rope=config["qk_rope_head_dim"],
        value=config["v_head_dim"],
        latent_eps=config.get("kv_a_layernorm_eps", 1e-6),
        q_latent=config.get("q_lora_rank"),
    )


def _moe_settings(config: Mapping) -> MoeSettings:
    return MoeSettings(
        experts=config["num_experts"],
        top_k=config["num_experts_per_token"],
        width=config["moe_intermediate_size"],
        shared=config["num_shared_experts"],
        groups=config["num_expert_group"],
        top_groups=config["topk_group"],
        renormalise=config["moe_renormalize"],
        scaling=config["routed_scaling_factor"],
        biased_weights=config.get("router_weight_uses_score_correction_bias", False),
    )


def _check_config(config: Mapping) -> None:
    groups, kept = config["num_expert_group"], config["topk_group"]
    experts, top_k = config["num_experts"], config["num_experts_per_token"]
    if experts % groups or not 1 <= kept <= groups or not 1 <= top_k <= kept * experts // groups:
        raise ValueError(
            f"num_experts_per_token must fit into topk_group of num_expert_group equal groups, got {top_k} of "
            f"{experts} experts in {kept} of {groups} groups"
        )
    only = {"hidden_act": "silu", "mla_use_nope": True, "tie_word_embeddings": False}
    only["moe_router_activation_func"] = "sigmoid"
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} must be {value!r}, got {config[key]!r}")


def _kda_shapes(settings: KdaSettings, D: int) -> Shapes:
    H, K, HK = settings.heads, settings.head_dim, settings.heads * settings.head_dim
    shapes = {f"{name}_proj.weight": (HK, D) for name in "qkv"}
    shapes |= {f"{name}_conv1d.weight": (HK, 1, settings.taps) for name in "qkv"}
    shapes |= {"A_log": (1, 1, H, 1), "dt_bias": (settings.decays,), "b_proj.weight": (H, D)}
    direct = settings.full_rank_decay or settings.decay_per_head
    for name, full, rows in (("f", direct, settings.decays), ("g", settings.full_rank_gate, HK)):
        low = {f"{name}_a_proj.weight": (K, D), f"{name}_b_proj.weight": (HK, K)}
        shapes |= {f"{name}_proj.weight": (rows, D)} if full else low
    return shapes | {"o_norm.weight": (K,), "o_proj.weight": (D, HK)}


def _mla_shapes(settings: MlaSettings, D: int) -> Shapes:
    H, R, Q = settings.heads, settings.latent, settings.q_latent
    queries = H * (settings.nope + settings.rope)
    low = {"q_a_proj.weight": (Q, D), "q_a_layernorm.weight": (Q,), "q_b_proj.weight": (queries, Q)}
    return ({"q_proj.weight": (queries, D)} if Q is None else low) | {
        "kv_a_proj_with_mqa.weight": (R + settings.rope, D),
        "kv_a_layernorm.weight": (R,),
        "kv_b_proj.weight": (H * (settings.nope + settings.value), R),
        "o_proj.weight": (D, H * settings.value),
    }


def _moe_shapes(settings: MoeSettings, D: int) -> Shapes:
    shapes = {"gate.weight": (settings.experts, D), "gate.e_score_correction_bias": (settings.experts,)}
    sizes = {"w1": (settings.width, D), "w3": (settings.width, D), "w2": (D, settings.width)}
    for e in range(settings.experts):
        shapes |= {f"experts.{e}.{name}.weight": shape for name, shape in sizes.items()}
    shared = _mlp_shapes(D, settings.shared * settings.width) if settings.shared else {}
    return shapes | _prefixed("shared_experts.", shared)


def _mlp_shapes(D: int, width: int) -> Shapes:
    return {"gate_proj.weight": (width, D), "up_proj.weight": (width, D), "down_proj.weight": (D, width)}


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}
