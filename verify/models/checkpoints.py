"""What a recipe stands for: config.json, tensors and texts, the same numbers on every machine, and the folder of them.

Numbers are float64 and representable in float32, in which they are written. Streams are of about unit size. Latents of
MLA are small, or the eps of their norm would not show; routers have no scores that are nearly equal: either a choice is
clear, or it is a tie, exactly.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kda_spec.model import Settings, forward, settings_of, tensor_shapes
from verify.exact import UNIT_ROUNDOFF, Dice, round_to
from verify.models.recipes import VOCABULARY, Recipe

CLEAR = 1024 * UNIT_ROUNDOFF["float32"]
"""Smallest gap between experts that are chosen and those that are not: a thousand roundings of a score. Scores of
right models in float32 were off by at most 30."""

LATENTS = 1 / 32
"""Size of what kv_a_layernorm reads: its eps of 1e-6 is a thousandth of the mean square then."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A tiny model's config.json and tensors, float64, and the texts that it reads, one array of ids each."""

    recipe: Recipe
    config: dict
    tensors: dict[str, np.ndarray]
    texts: tuple[np.ndarray, ...]

    @cached_property
    def settings(self) -> Settings:
        """What the definition reads in config.json."""
        return settings_of(self.config)

    def digest(self) -> str:
        """Hash the configuration, every bit of every tensor, and the texts."""
        found = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, x in sorted(self.tensors.items()):
            found.update(name.encode() + x.tobytes())
        for text in self.texts:
            found.update(text.astype(np.int64).tobytes() + b"|")
        return found.hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write the released layout: config.json, two shards in float32, their index."""
        names = sorted(self.tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, own in shards.items():
            save_file({name: self.tensors[name].astype(np.float32) for name in own}, folder / shard, {"format": "pt"})
        size = sum(4 * x.size for x in self.tensors.values())
        weight_map = {name: shard for shard, own in shards.items() for name in own}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.config))


def materialise(recipe: Recipe) -> Checkpoint:
    """Make the checkpoint and the texts of a recipe: the first draw of the routers that chooses clearly."""
    config, texts = config_of(recipe), texts_of(recipe)
    settings = settings_of(config)
    fixed = {name: _tensor(recipe, name, shape) for name, shape in tensor_shapes(settings).items()}
    for attempt in count():
        tensors = {name: _router(recipe, name, x, attempt) for name, x in fixed.items()}
        if recipe.tied or _clear(texts, tensors, settings):
            return Checkpoint(recipe, config, tensors, texts)


def texts_of(recipe: Recipe, label: str = "text") -> tuple[np.ndarray, ...]:
    """Draw the texts: prompt and tail of each; other labels give other texts of the same lengths."""
    lengths = enumerate(recipe.prompts)
    return tuple(Dice(recipe.seed, label, i).integers(0, VOCABULARY, (n + recipe.tail,)) for i, n in lengths)


def config_of(r: Recipe) -> dict:
    """Return the released config.json with the sizes and forms of the recipe."""
    lists = {name: [i + r.count_from for i, x in enumerate(r.layers) if x == kind] for name, kind in _LISTS.items()}
    linear = {"num_heads": r.kda_heads, "head_dim": r.head_dim, "short_conv_kernel_size": r.taps, **lists}
    linear |= {"use_full_rank_gate": r.full_rank_gate, "use_full_rank_forget": r.full_rank_forget}
    if r.gate != "softplus":
        linear |= {"gate_lower_bound": -5.0} if r.gate == "lower_bound" else {"gate": "head"}
    return {
        **_FIXED,
        "hidden_size": r.width,
        "intermediate_size": 2 * r.width,
        "num_hidden_layers": len(r.layers),
        "linear_attn_config": linear,
        "num_attention_heads": r.mla_heads,
        "num_key_value_heads": r.mla_heads,
        "kv_lora_rank": r.latent,
        "qk_nope_head_dim": r.nope,
        "qk_rope_head_dim": r.rope,
        "v_head_dim": r.value,
        "kv_a_layernorm_eps": 1e-5 if r.plain_eps else 1e-6,
        "first_k_dense_replace": r.dense,
        "num_experts": r.experts,
        "num_experts_per_token": r.top_k,
        "num_expert_group": r.groups,
        "topk_group": r.top_groups,
        "num_shared_experts": r.shared,
        "moe_intermediate_size": r.width,
        "moe_renormalize": r.renormalise,
        "router_weight_uses_score_correction_bias": r.biased_weights,
    }


_LISTS = {"kda_layers": "k", "full_attn_layers": "m"}
_FIXED = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "q_lora_rank": None,
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "model_max_length": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _tensor(r: Recipe, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = Dice(r.seed, name).normal(shape)
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A_log":
        x = x / 2 + {"mild": -1.0, "long_memory": -5.0, "strong": 2.0}[r.decay]
    elif leaf.endswith("norm"):
        x = 1 + x / 8
    elif leaf == "e_score_correction_bias":
        x = x * {"biased": 0.5}.get(r.router, 0.0)
    elif leaf.endswith("conv1d"):
        x = x / np.sqrt(shape[-1])
    elif len(shape) == 2 and leaf != "embed_tokens":
        x = x / np.sqrt(shape[1])
    if leaf == "kv_a_proj_with_mqa":
        x[: r.latent] *= LATENTS
    return round_to(x, "float32")


def _router(r: Recipe, name: str, x: np.ndarray, attempt: int) -> np.ndarray:
    """Return a router's tensors of an attempt, with the recipe's ties: rows of zeros have a score of 1/2 exactly.

    Where some are tied, every second expert is, and the others have choices far above or far below.
    """
    some = np.arange(len(x)) % 2 == 0 if r.router == "some_tied" else np.full(len(x), r.router == "all_tied")
    if name.endswith("e_score_correction_bias") and r.router == "some_tied":
        return np.where(some, 0.0, np.where(np.arange(len(x)) % 4 == 1, 2.0, -2.0))
    if not name.endswith("block_sparse_moe.gate.weight"):
        return x
    drawn = Dice(r.seed, name, attempt).normal(x.shape) / np.sqrt(x.shape[1])
    return round_to(np.where(some[:, None], 0.0, drawn), "float32")


def _clear(texts: tuple[np.ndarray, ...], tensors: dict, settings: Settings) -> bool:
    routings = (r for text in texts for r in forward(text[None], tensors, settings).routings if r is not None)
    return all(np.all(routing.margin > CLEAR) for routing in routings)
