"""Read what a model is from config.json, and write it back.

The keys are those of the released Kimi-Linear-48B-A3B. Kimi K3, Ling-3.0 and GLM-5.3 differ in the KDA layer by a
lower bound of the gate, gates of full rank and lists that count layers from 0: all of it is configuration. What the
model here cannot do (rotary positions, another activation, ...) is refused, never ignored.
"""

import json
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

KDA, MLA = "kda", "mla"
GATES = ("channel", "head")
DTYPES = ("float64", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A config.json that is not there, is no configuration, or asks for what is not supported."""


def _of(key: str, **keywords):
    """Declare a field that stands under `key` in config.json: a dot leads into an object."""
    return field(metadata={"key": key}, **keywords)


@dataclass(frozen=True)
class KimiConfig:
    """Describe a model: sizes, kinds of layers and options."""

    layers: tuple[str, ...]
    """'kda' or 'mla', one per layer."""
    hidden_size: int = _of("hidden_size")
    vocab_size: int = _of("vocab_size")
    kda_heads: int = _of("linear_attn_config.num_heads")
    kda_head_dim: int = _of("linear_attn_config.head_dim")
    """K = V of a KDA head."""
    heads: int = _of("num_attention_heads")
    """Heads of an MLA layer."""
    kv_lora_rank: int = _of("kv_lora_rank")
    qk_nope_head_dim: int = _of("qk_nope_head_dim")
    qk_rope_head_dim: int = _of("qk_rope_head_dim")
    """Channels of the key that all heads share; nothing is rotated."""
    v_head_dim: int = _of("v_head_dim")
    intermediate_size: int = _of("intermediate_size")
    moe_intermediate_size: int = _of("moe_intermediate_size")
    experts: int = _of("num_experts")
    experts_per_token: int = _of("num_experts_per_token")
    q_lora_rank: int | None = _of("q_lora_rank", default=None)
    """Channels of the latent that an MLA layer's queries come through; None for none."""
    shared_experts: int = _of("num_shared_experts", default=1)
    dense_layers: int = _of("first_k_dense_replace", default=1)
    """How many layers at the beginning have one MLP instead of experts."""
    expert_groups: int = _of("num_expert_group", default=1)
    top_groups: int = _of("topk_group", default=1)
    renormalize: bool = _of("moe_renormalize", default=True)
    routed_scaling_factor: float = _of("routed_scaling_factor", default=1.0)
    conv_size: int = _of("linear_attn_config.short_conv_kernel_size", default=4)
    gate: str = _of("linear_attn_config.gate", default="channel")
    """A decay per 'channel' (KDA) or per 'head' (Gated DeltaNet)."""
    lower_bound: float | None = _of("linear_attn_config.gate_lower_bound", default=None)
    """None for g = -exp(A_log) softplus(f + dt_bias), else g = lower_bound sigmoid(exp(A_log) (f + dt_bias))."""
    full_rank_gate: bool = _of("linear_attn_config.use_full_rank_gate", default=False)
    """Whether the output gate is one matrix, g_proj, instead of the product of two."""
    full_rank_forget: bool = _of("linear_attn_config.use_full_rank_forget", default=False)
    """Whether the forget gate is one matrix, f_proj; always so for a gate per head."""
    rms_norm_eps: float = _of("rms_norm_eps", default=1e-5)
    latent_norm_eps: float = _of("kv_a_layernorm_eps", default=1e-6)
    """Epsilon of the norms of MLA's latents: the released code leaves it at 1e-6, some engines take rms_norm_eps."""
    biased_router_weights: bool = _of("router_weight_uses_score_correction_bias", default=False)
    """Whether experts are weighted by score plus bias, as the released remote code does by an aliasing slip."""
    initializer_range: float = _of("initializer_range", default=0.02)
    max_length: int = _of("model_max_length", default=1048576)
    bos_id: int | None = _of("bos_token_id", default=None)
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = _of("pad_token_id", default=None)
    dtype: str = _of("dtype", default="bfloat16")
    first_layer: int = 1
    """What the lists of layers in config.json count from: 1 as released, 0 as GLM-5.3."""

    def __post_init__(self):
        check(self)

    @property
    def qk_head_dim(self) -> int:
        """Return the channels of a query of an MLA layer."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Return the channels of a token in the cache of an MLA layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def kda_dim(self) -> int:
        """Return H K, the channels of q, k and v each of a KDA layer."""
        return self.kda_heads * self.kda_head_dim

    @property
    def forget_dim(self) -> int:
        """Return how many decays a token has: H K, or H for a gate per head."""
        return self.kda_dim if self.gate == "channel" else self.kda_heads

    def count(self, kind: str) -> int:
        """Return how many layers are of a kind."""
        return self.layers.count(kind)

    def with_layers(self, layers: tuple[str, ...]) -> "KimiConfig":
        """Return the same model with other layers."""
        return replace(self, layers=tuple(layers))

    @classmethod
    def read(cls, folder: str | Path) -> "KimiConfig":
        """Read FOLDER/config.json; ConfigError names the file and what is wrong with it."""
        path = Path(folder) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: expected a checkpoint's config.json, got {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: expected JSON, got {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
        try:
            return cls.from_json(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, data: dict) -> "KimiConfig":
        """Return the configuration that the object of a config.json describes; ConfigError where there is none."""
        data = _as_released(data)
        _refuse_unsupported(data)
        values, data = {}, {"dtype": data.get("torch_dtype")} | data  # its name until transformers 4.56
        for each in fields(cls):
            key = each.metadata.get("key")
            if key and (found := _found(data, key)) is not None:
                values[each.name] = _typed(key, found, each.type)
        first, layers = _layers(data)
        return _made(cls, values | _ling(data) | {"layers": layers, "first_layer": first, "stop_ids": _stop_ids(data)})

    def to_json(self) -> dict:
        """Return the object of a config.json, as `from_json` takes it, with the keys of the released model."""
        data: dict = dict(_FIXED)
        for each in fields(self):
            if key := each.metadata.get("key"):
                *path, last = key.split(".")
                at = data
                for name in path:
                    at = at.setdefault(name, {})
                at[last] = getattr(self, each.name)
        lists = data["linear_attn_config"]
        for name, kind in (("kda_layers", KDA), ("full_attn_layers", MLA)):
            lists[name] = [i + self.first_layer for i, layer in enumerate(self.layers) if layer == kind]
        stop = list(self.stop_ids)
        return data | {
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.heads,
            "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        }


_FIXED = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "hidden_act": "silu",
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_grouped_topk": True,
}


def check(config: KimiConfig) -> None:
    """Raise ConfigError for the first field that no model can have."""
    for name in _POSITIVE:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not config.layers or set(config.layers) - {KDA, MLA}:
        raise ConfigError(f"layers must be one or more of 'kda' and 'mla', got {config.layers}")
    if config.experts_per_token > config.experts:
        raise ConfigError(
            f"experts_per_token must be at most experts = {config.experts}, got {config.experts_per_token}"
        )
    if config.experts % config.expert_groups or not 1 <= config.top_groups <= config.expert_groups:
        raise ConfigError(
            f"expert_groups must divide experts = {config.experts} and top_groups be at most that, "
            f"got {config.expert_groups} and {config.top_groups}"
        )
    if config.experts_per_token > config.experts // config.expert_groups * config.top_groups:
        raise ConfigError(f"top_groups must hold experts_per_token = {config.experts_per_token} experts")
    if config.q_lora_rank is not None and config.q_lora_rank < 1:
        raise ConfigError(f"q_lora_rank must be at least 1, got {config.q_lora_rank}")
    if config.lower_bound is not None and not config.lower_bound < 0:
        raise ConfigError(f"lower_bound must be negative, got {config.lower_bound}")
    if config.gate not in GATES:
        raise ConfigError(f"gate must be one of {', '.join(GATES)}, got {config.gate!r}")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}")
    if min(config.shared_experts, config.dense_layers, config.qk_rope_head_dim) < 0:
        raise ConfigError("shared_experts, dense_layers and qk_rope_head_dim must be at least 0")


_POSITIVE = (
    "hidden_size", "vocab_size", "kda_heads", "kda_head_dim", "heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim",
    "intermediate_size", "moe_intermediate_size", "experts", "experts_per_token", "expert_groups", "conv_size",
    "max_length",
)  # fmt: skip


def _found(data: dict, key: str):
    for name in key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _typed(key: str, value, wanted: type):
    """Return a value as its field's type: numbers may come as int for float, nothing else is converted."""
    kind = {int | None: int, float | None: float}.get(wanted, wanted)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be of type {kind.__name__}, got {value!r}")
    return value


def _made(cls, values: dict) -> KimiConfig:
    keyed = {each.name: each.metadata["key"] for each in fields(cls) if each.metadata and each.default is MISSING}
    if missing := [key for name, key in keyed.items() if name not in values]:
        raise ConfigError(f"missing keys: {', '.join(missing)}")
    return cls(**values)


def _as_released(data: dict) -> dict:
    """Return the keys of the released file for those that transformers writes of a model that it has made itself."""
    kinds = data.get("layer_types")
    if "linear_attn_config" in data or not isinstance(kinds, list):
        return data
    names = {"kda_layers": "linear_attention", "full_attn_layers": "full_attention"}
    lists = {name: [i for i, kind in enumerate(kinds, 1) if kind == wanted] for name, wanted in names.items()}
    sizes = {"num_heads": "num_heads", "head_dim": "head_dim", "short_conv_kernel_size": "conv_kernel_dim"}
    sizes = {name: data.get(f"linear_{old}") for name, old in sizes.items()}
    ffn = data.get("mlp_layer_types") or []
    dense = ffn.index("sparse") if "sparse" in ffn else len(ffn)
    if "dense" in ffn[dense:]:
        raise ConfigError(f"mlp_layer_types must begin with the dense layers, got {ffn}")
    return data | {"linear_attn_config": lists | sizes} | ({"first_k_dense_replace": dense} if ffn else {})


def _layers(data: dict) -> tuple[int, tuple[str, ...]]:
    """Return what the lists count from, and the kind of each layer: the lists are a partition from 1 or from 0."""
    count, lists = data.get("num_hidden_layers"), data.get("linear_attn_config")
    lists = lists if isinstance(lists, dict) else {}
    kda, mla = lists.get("kda_layers"), lists.get("full_attn_layers")
    whole = all(isinstance(x, list) and all(type(i) is int for i in x) for x in (kda, mla))
    if type(count) is not int or count < 1 or not whole:
        raise ConfigError(
            "expected num_hidden_layers and linear_attn_config with lists kda_layers and full_attn_layers of numbers"
        )
    for first in (1, 0):
        if sorted(kda + mla) == list(range(first, first + count)):
            return first, tuple(KDA if i + first in kda else MLA for i in range(count))
    raise ConfigError(
        f"kda_layers and full_attn_layers must name each of {count} layers once, counted from 1 or from 0, "
        f"got {kda} and {mla}"
    )


def _ling(data: dict) -> dict:
    """Return what Ling-3.0 says about its KDA layers under keys of its own."""
    values = {}
    if data.get("no_kda_lora"):
        values |= {"full_rank_gate": True, "full_rank_forget": True}
    if data.get("kda_safe_gate") and data.get("kda_lower_bound") is not None:
        values["lower_bound"] = _typed("kda_lower_bound", data["kda_lower_bound"], float)
    return values


def _stop_ids(data: dict) -> tuple[int, ...]:
    ids = data.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int for i in ids):
        raise ConfigError(f"eos_token_id must be a number or a list of numbers, got {data['eos_token_id']!r}")
    return tuple(ids)


def _refuse_unsupported(data: dict) -> None:
    """Raise ConfigError for what would change the model and is not implemented."""
    for key, wanted in _FIXED.items():
        if key in _ANY or key not in data or data[key] == wanted:
            continue
        raise ConfigError(f"{key} = {data[key]!r} is not supported: expected {wanted!r}")
    heads = data.get("num_attention_heads")
    if data.get("num_key_value_heads", heads) not in (heads, None):
        raise ConfigError(f"num_key_value_heads must be num_attention_heads = {heads}: MLA's heads share one latent")


_ANY = {"architectures", "model_type", "use_cache", "use_grouped_topk"}
