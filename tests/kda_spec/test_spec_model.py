"""Kimi Linear as a whole: every way to run a text gives the same logits; what cannot be run is refused by name."""

from dataclasses import replace

import numpy as np
import pytest

from kda_spec import empty_cache, forward, settings_of, tensor_shapes
from kda_spec.layers import mlp, rms_norm

# Several matrix products in float64, the order of whose sums depends on the number of rows.
SAME = 1e-12

RELEASED = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [i for i in range(1, 27) if i % 4],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(61, size=(3, 11))


def close(actual, expected) -> bool:
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) <= SAME * np.linalg.norm(expected)


def in_pieces(tiny, ids, cuts, **forms):
    """Run pieces of the text one behind the other; returns the logits of all and the last cache."""
    tensors, cache, parts = tiny.tensors(tiny.settings), None, []
    for piece in np.split(ids, cuts, axis=1):
        out = forward(piece, tensors, tiny.settings, cache, **forms)
        parts.append(out.logits)
        cache = out.cache
    return np.concatenate(parts, axis=1), cache


def variant(tiny, linear, **change):
    """Return the tiny model's settings with other entries in config.json, and other ones in linear_attn_config."""
    return settings_of(tiny.config | change | {"linear_attn_config": tiny.config["linear_attn_config"] | linear})


def arrays_of(cache):
    return [array for state in cache for array in vars(state).values()]


def test_the_released_configuration_has_the_released_tensors():
    shapes = tensor_shapes(settings_of(RELEASED))
    assert len(shapes) == 20_493
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 49_122_681_728


def test_the_last_layer_of_the_released_model_is_mla():
    attention = settings_of(RELEASED).attention
    assert attention[:4] == ("kda", "kda", "kda", "mla") and attention[-3:] == ("kda", "kda", "mla")
    assert attention.count("kda") == 20


def test_the_model_is_its_blocks_written_out(tiny, ids):
    settings = replace(tiny.settings, attention=("mla",), feed_forward=("mlp",))
    w = tiny.tensors(settings)
    out = forward(ids[:, :1], w, settings)
    x = w["model.embed_tokens.weight"][ids[:, 0]]
    normed = rms_norm(x, w["model.layers.0.input_layernorm.weight"], 1e-5)
    latent = normed @ w["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].T[:, :10]
    latent = rms_norm(latent, w["model.layers.0.self_attn.kv_a_layernorm.weight"], 1e-6)
    values = (latent @ w["model.layers.0.self_attn.kv_b_proj.weight"].T).reshape(3, 3, 11)[..., 6:]
    x = x + values.reshape(3, 15) @ w["model.layers.0.self_attn.o_proj.weight"].T  # one token attends to itself alone
    normed = rms_norm(x, w["model.layers.0.post_attention_layernorm.weight"], 1e-5)
    x = x + mlp(normed, *(w[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    assert close(out.hidden[1][:, 0], x)
    assert close(out.logits[:, 0], rms_norm(x, w["model.norm.weight"], 1e-5) @ w["lm_head.weight"].T)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize(
    "cuts", [range(1, 11), (3,), (2, 8), (0, 5, 5)], ids=["tokens", "two", "three", "empty pieces"]
)
def test_a_text_in_pieces_has_the_logits_of_the_whole(cuts, absorbed, tiny, ids):
    whole, end = in_pieces(tiny, ids, ())
    logits, cache = in_pieces(tiny, ids, list(cuts), absorbed=absorbed)
    assert close(logits, whole)
    assert all(close(a, b) for a, b in zip(arrays_of(cache), arrays_of(end), strict=True))


def test_absorbed_mla_makes_the_same_model(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    expanded, absorbed = (forward(ids, tensors, tiny.settings, absorbed=form) for form in (False, True))
    assert close(absorbed.logits, expanded.logits)


def test_a_text_does_not_see_its_neighbours(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    together = forward(ids, tensors, tiny.settings).logits
    alone = np.concatenate([forward(row[None], tensors, tiny.settings).logits for row in ids])
    assert close(together, alone)


def test_what_follows_a_text_does_not_change_its_logits(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    padded = np.concatenate([ids, np.full((3, 6), 60)], axis=1)
    assert close(forward(padded, tensors, tiny.settings).logits[:, :11], forward(ids, tensors, tiny.settings).logits)


def test_a_cache_can_be_continued_twice(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    start = forward(ids[:, :5], tensors, tiny.settings).cache
    kept = [array.copy() for array in arrays_of(start)]
    first, second = (forward(ids[:, cut], tensors, tiny.settings, start).logits for cut in (slice(5, 8), slice(8, 11)))
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(start), kept, strict=True))
    assert close(first, in_pieces(tiny, ids[:, :8], ())[0][:, 5:])
    assert close(second, in_pieces(tiny, np.delete(ids, slice(5, 8), axis=1), ())[0][:, 5:])


def test_no_token_passes_the_cache_through(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    start = forward(ids, tensors, tiny.settings).cache
    out = forward(ids[:, :0], tensors, tiny.settings, start)
    assert out.logits.shape == (3, 0, 61)
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(start), arrays_of(out.cache), strict=True))


def test_every_choice_of_experts_is_reported(tiny, ids):
    out = forward(ids, tiny.tensors(tiny.settings), tiny.settings)
    assert [routing is None for routing in out.routings] == [kind == "mlp" for kind in tiny.settings.feed_forward]
    assert out.routings[1].experts.shape == (3, 11, 3) and np.all(out.routings[1].margin > 0)


def test_float32_loses_what_float32_has_not(tiny, ids, cases):
    tensors = tiny.tensors(tiny.settings)
    narrow = {name: x.astype(np.float32) for name, x in tensors.items()}
    out = forward(ids, narrow, tiny.settings)
    assert {x.dtype for x in (out.logits, *out.hidden, *arrays_of(out.cache))} == {np.dtype(np.float32)}
    assert 1e-8 < cases.relative(out.logits, forward(ids, tensors, tiny.settings).logits) < 1e-5


def test_lists_that_count_from_0_name_the_same_layers(tiny):
    linear = tiny.config["linear_attn_config"]
    shifted = linear | {name: [i - 1 for i in linear[name]] for name in ("kda_layers", "full_attn_layers")}
    assert settings_of(tiny.config | {"linear_attn_config": shifted}) == tiny.settings


def test_forms_of_the_family_are_read(tiny):
    linear = {"gate_lower_bound": -5.0, "use_full_rank_gate": True, "use_full_rank_forget": True}
    change = {"q_lora_rank": 7, "kv_a_layernorm_eps": 1e-5, "router_weight_uses_score_correction_bias": True}
    settings = variant(tiny, linear, **change)
    forms = {"lower_bound": -5.0, "full_rank_gate": True, "full_rank_decay": True}
    assert settings.kda == replace(tiny.settings.kda, **forms)
    assert settings.mla == replace(tiny.settings.mla, q_latent=7, latent_eps=1e-5)
    assert settings.moe == replace(tiny.settings.moe, biased_weights=True)


FORMS = {
    "full-rank output gate": ({"use_full_rank_gate": True}, {}, {"model.layers.0.self_attn.g_proj.weight": (16, 24)}),
    "full-rank forget gate": ({"use_full_rank_forget": True}, {}, {"model.layers.0.self_attn.f_proj.weight": (16, 24)}),
    "one decay per head": (
        {"gate": "head"},
        {},
        {"model.layers.0.self_attn.f_proj.weight": (2, 24), "model.layers.0.self_attn.dt_bias": (2,)},
    ),
    "queries through a latent": ({}, {"q_lora_rank": 7}, {"model.layers.2.self_attn.q_b_proj.weight": (30, 7)}),
    "two shared experts": (
        {},
        {"num_shared_experts": 2},
        {"model.layers.1.block_sparse_moe.shared_experts.down_proj.weight": (24, 24)},
    ),
    "no shared expert": ({}, {"num_shared_experts": 0}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_from_tensors_of_its_own(form, tiny, ids):
    linear, change, expected = FORMS[form]
    settings = variant(tiny, linear, **change)
    shapes = tensor_shapes(settings)
    assert expected.items() <= shapes.items() and shapes != tensor_shapes(tiny.settings)
    out = forward(ids, tiny.tensors(settings), settings)
    pieces = forward(
        ids[:, 6:], tiny.tensors(settings), settings, forward(ids[:, :6], tiny.tensors(settings), settings).cache
    )
    assert close(pieces.logits, out.logits[:, 6:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"mla_use_nope": False}, "mla_use_nope must be True, got False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False, got True"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func must be 'sigmoid', got 'softmax'"),
        ({"num_experts_per_token": 5, "num_expert_group": 2}, "got 5 of 8 experts in 1 of 2 groups"),
        ({"num_expert_group": 3}, "num_expert_group equal groups, got 3 of 8 experts in 1 of 3 groups"),
        ({"num_hidden_layers": 6}, r"must name each of 6 layers once, from 1 or from 0, got \[1, 2, 3, 4, 5\]"),
    ],
)
def test_a_configuration_that_is_no_kimi_linear_is_refused(change, message, tiny):
    with pytest.raises(ValueError, match=message):
        settings_of(tiny.config | change)


@pytest.mark.parametrize("key", ["hidden_size", "num_experts", "linear_attn_config", "routed_scaling_factor"])
def test_a_missing_key_is_named(key, tiny):
    with pytest.raises(ValueError, match=f"config must have the key '{key}'"):
        settings_of({name: value for name, value in tiny.config.items() if name != key})


def test_all_tensors_that_do_not_fit_are_listed(tiny, ids):
    tensors = tiny.tensors(tiny.settings)
    del tensors["model.norm.weight"]
    tensors |= {"model.extra": np.zeros(3), "lm_head.weight": np.zeros((61, 23))}
    expected = "; ".join(
        [
            r"lm_head.weight must have shape \(61, 24\), got \(61, 23\)",
            "missing model.norm.weight",
            "unexpected model.extra",
        ]
    )
    with pytest.raises(ValueError, match=expected):
        forward(ids, tensors, tiny.settings)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 61]], "ids must lie in 0 .. 60, got 0 .. 61"),
        ([[-1, 3]], "ids must lie in 0 .. 60, got -1 .. 3"),
        ([1, 2], r"ids must be integers \[B, T\], got dtype int64 and shape \(2,\)"),
        ([[1.0]], "got dtype float64"),
    ],
)
def test_ids_outside_of_the_vocabulary_are_refused(ids, message, tiny):
    with pytest.raises(ValueError, match=message):
        forward(ids, tiny.tensors(tiny.settings), tiny.settings)


def test_an_empty_cache_remembers_nothing(tiny):
    cache = empty_cache(tiny.settings, B=2)
    assert all(np.all(array == 0) and len(array) == 2 for array in arrays_of(cache))
    assert [
        state.latent.shape[1] for state, kind in zip(cache, tiny.settings.attention, strict=True) if kind == "mla"
    ] == [0, 0]
