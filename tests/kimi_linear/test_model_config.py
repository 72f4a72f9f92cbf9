"""config.json: the released one and its relatives are read, what the model cannot do is refused, by name."""

import json
from dataclasses import replace

import pytest

from kimi_linear import ConfigError, KimiConfig, preset
from kimi_linear.layout import stored
from kimi_linear.presets import PRESETS, pattern

RELEASED = {
    "architectures": ["KimiLinearForCausalLM"], "bos_token_id": 163584, "dtype": "bfloat16", "eos_token_id": 163586,
    "first_k_dense_replace": 1, "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "kv_lora_rank": 512, "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32, "short_conv_kernel_size": 4},
    "mla_use_nope": True, "model_max_length": 1048576, "model_type": "kimi_linear", "moe_intermediate_size": 1024,
    "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid", "num_attention_heads": 32,
    "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27,
    "num_key_value_heads": 32, "num_nextn_predict_layers": 0, "num_shared_experts": 1, "pad_token_id": 163839,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "routed_scaling_factor": 2.446, "tie_word_embeddings": False, "topk_group": 1,
    "use_cache": True, "use_grouped_topk": True, "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip


def changed(**changes) -> dict:
    lists = RELEASED["linear_attn_config"] | changes.pop("linear_attn_config", {})
    return RELEASED | {"linear_attn_config": lists} | changes


def test_the_released_file_is_the_preset():
    assert KimiConfig.from_json(RELEASED) == PRESETS["kimi-linear-48b-a3b"]


def test_the_released_file_has_the_released_tensors():
    tensors = list(stored(KimiConfig.from_json(RELEASED)))
    elements = sum(each.elements for each in tensors)
    assert len({each.name for each in tensors}) == 20_493
    assert elements == 49_122_681_728
    assert 2 * elements + sum(2 * each.elements for each in tensors if each.float32) == 98_245_528_576


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("baseline", ["hybrid", "mla", "gdn-hybrid"])
def test_what_is_written_is_read_back(name, baseline):
    config = preset(name, baseline=baseline)
    assert KimiConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_lists_may_count_from_0():
    linear = RELEASED["linear_attn_config"]
    from_0 = {name: [i - 1 for i in linear[name]] for name in ("kda_layers", "full_attn_layers")}
    config = KimiConfig.from_json(changed(linear_attn_config=from_0))
    assert config == replace(PRESETS["kimi-linear-48b-a3b"], first_layer=0)
    assert KimiConfig.from_json(config.to_json()) == config


RELATIVES = {
    "K3": (
        {"linear_attn_config": {"gate_lower_bound": -5.0, "use_full_rank_gate": True}},
        {"lower_bound": -5.0, "full_rank_gate": True},
    ),
    "Ling-3.0": (
        {"no_kda_lora": True, "kda_safe_gate": True, "kda_lower_bound": -5},
        {"lower_bound": -5.0, "full_rank_gate": True, "full_rank_forget": True},
    ),
    "GLM-5.3": ({"linear_attn_config": {"gate_lower_bound": -5.0}}, {"lower_bound": -5.0}),
    "no safe gate": ({"kda_safe_gate": False, "kda_lower_bound": -5}, {}),
    "eps of engines": ({"kv_a_layernorm_eps": 1e-5}, {"latent_norm_eps": 1e-5}),
    "remote code's router": (
        {"router_weight_uses_score_correction_bias": True},
        {"biased_router_weights": True},
    ),
    "query latents": ({"q_lora_rank": 1536}, {"q_lora_rank": 1536}),
    "several stops": ({"eos_token_id": [163585, 163586]}, {"stop_ids": (163585, 163586)}),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_differ_in_configuration(name):
    keys, fields = RELATIVES[name]
    assert KimiConfig.from_json(changed(**keys)) == replace(PRESETS["kimi-linear-48b-a3b"], **fields)


REFUSED = {
    "rotary positions": ({"mla_use_nope": False}, "mla_use_nope = False"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "query latents": ({"q_lora_rank": 0}, "q_lora_rank must be at least 1"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "grouped keys": ({"num_key_value_heads": 8}, "num_key_value_heads"),
    "a layer twice": ({"linear_attn_config": {"full_attn_layers": [3, 4]}}, "name each of 27 layers once"),
    "no lists": ({"linear_attn_config": {"kda_layers": None}}, "kda_layers"),
    "experts": ({"num_experts_per_token": 300}, "experts_per_token must be at most"),
    "groups": ({"num_expert_group": 7}, "expert_groups must divide"),
    "few groups": ({"num_expert_group": 64, "topk_group": 1}, "top_groups must hold"),
    "bound": ({"linear_attn_config": {"gate_lower_bound": 5.0}}, "lower_bound must be negative"),
    "type": ({"hidden_size": "2304"}, "hidden_size must be of type int"),
    "flag as number": ({"moe_renormalize": 1}, "moe_renormalize must be of type bool"),
    "zero": ({"vocab_size": 0}, "vocab_size must be at least 1"),
    "eos": ({"eos_token_id": "x"}, "eos_token_id"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_be_is_refused(name):
    keys, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        KimiConfig.from_json(changed(**keys))


def test_the_dtype_may_have_its_old_name():
    old = {key: value for key, value in RELEASED.items() if key != "dtype"} | {"torch_dtype": "float16"}
    assert KimiConfig.from_json(old).dtype == "float16"


def as_transformers_writes_it(**changes) -> dict:
    linear = RELEASED["linear_attn_config"]
    kinds = ["linear_attention" if i in linear["kda_layers"] else "full_attention" for i in range(1, 28)]
    own = {"layer_types": kinds, "mlp_layer_types": ["dense"] + ["sparse"] * 26, "linear_num_heads": 32}
    own |= {"linear_head_dim": 128, "linear_conv_kernel_dim": 4}
    return (
        {key: x for key, x in RELEASED.items() if key not in ("linear_attn_config", "first_k_dense_replace")}
        | own
        | changes
    )


def test_the_keys_of_transformers_are_read():
    assert KimiConfig.from_json(as_transformers_writes_it()) == PRESETS["kimi-linear-48b-a3b"]
    dense = KimiConfig.from_json(as_transformers_writes_it(mlp_layer_types=["dense"] * 27))
    assert dense.dense_layers == 27


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 25}, "must begin with the dense layers"),
        ({"layer_types": ["sliding_attention"] * 27}, "name each of 27 layers once"),
        ({"linear_head_dim": None}, "missing keys: linear_attn_config.head_dim"),
    ],
)
def test_keys_of_transformers_that_fit_no_model_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        KimiConfig.from_json(as_transformers_writes_it(**changes))


def test_missing_keys_are_named_together():
    data = {key: value for key, value in RELEASED.items() if key not in ("hidden_size", "num_experts")}
    with pytest.raises(ConfigError, match="missing keys: hidden_size, num_experts"):
        KimiConfig.from_json(data)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("{", "expected JSON"), ("[]", "JSON object"), ("{}", "num_hidden")]
)
def test_a_folder_without_a_configuration_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        KimiConfig.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("layers", "ratio", "kinds"),
    [
        (27, (3, 1), "KKKMKKKMKKKMKKKMKKKMKKKMKKM"),
        (8, (3, 1), "KKKMKKKM"),
        (5, (1, 1), "KMKMM"),
        (4, (0, 1), "MMMM"),
        (4, (1, 0), "KKKK"),
        (9, (7, 1), "KKKKKKKMM"),
    ],
)
def test_a_ratio_ends_with_mla(layers, ratio, kinds):
    assert "".join("K" if kind == "kda" else "M" for kind in pattern(layers, *ratio)) == kinds


@pytest.mark.parametrize(
    "asked", [{"name": "huge"}, {"name": "tiny", "baseline": "x"}, {"name": "tiny", "ratio": (0, 0)}]
)
def test_unknown_presets_name_the_known(asked):
    with pytest.raises(ConfigError):
        preset(**asked)
