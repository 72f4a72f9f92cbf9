"""The released checkpoint, tensor by tensor: name, shape, and which part of which of our parameters it fills.

Matrices that read the same input lie in one parameter, one after the other, so that a step multiplies once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from kimi_linear.config import KDA, KimiConfig
from kimi_linear.share import WHOLE, Share

FLOAT32 = ("A_log", "dt_bias")
"""Stored in float32 whatever the model's dtype."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    into: str
    """The parameter of `KimiLinear` that it is a part of."""
    at: tuple[slice | int, ...] = ()
    """Which part of it: an index; () for all of it."""
    also: tuple[tuple[int, ...], ...] = ()
    """Other shapes in which other checkpoints store it."""
    alias: str | None = None
    """Another name that it may have."""
    padded: bool = False
    """Whether it may be one-dimensional and longer, zeros beyond its elements (A_log of Kimi K3)."""

    @property
    def elements(self) -> int:
        """Return how many numbers it holds."""
        return prod(self.shape)

    @property
    def float32(self) -> bool:
        """Tell whether it is kept in float32."""
        return self.name.rsplit(".", 1)[-1] in FLOAT32

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return all shapes in which checkpoints store it, padded ones aside."""
        return (self.shape, *self.also)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a stored tensor of this shape is this one."""
        longer = self.padded and len(shape) == 1 and shape[0] > self.elements
        return shape in self.shapes or longer


def stored(config: KimiConfig, share: Share = WHOLE) -> Iterator[Stored]:
    """Yield every tensor of the model's checkpoint, layer by layer; of a share its own, in the shapes that it has."""
    D, own = config.hidden_size, share.of(config)
    yield Stored("model.embed_tokens.weight", (own.vocab_size, D), "embed.weight")
    for i, kind in enumerate(config.layers):
        there, here = f"model.layers.{i}", f"layers.{i}"
        yield Stored(f"{there}.input_layernorm.weight", (D,), f"{here}.mixer_norm")
        mixer = _kda if kind == KDA else _mla
        yield from mixer(own, f"{there}.self_attn", f"{here}.mixer")
        yield Stored(f"{there}.post_attention_layernorm.weight", (D,), f"{here}.ffn_norm")
        if i < config.dense_layers:
            for each in _mlp(f"{there}.mlp", f"{here}.ffn", D, own.intermediate_size):  # the alias: transformers
                yield replace(each, alias=each.name.replace(".mlp.", ".block_sparse_moe."))
        else:
            yield from _experts(config, f"{there}.block_sparse_moe", f"{here}.ffn", share)
    yield Stored("model.norm.weight", (D,), "norm")
    yield Stored("lm_head.weight", (own.vocab_size, D), "head.weight")


def in_rows(names_and_rows: dict[str, int], columns: int, there: str, into: str) -> Iterator[Stored]:
    """Yield matrices [rows, columns] that lie one after the other in one parameter."""
    first = 0
    for name, rows in names_and_rows.items():
        yield Stored(f"{there}.{name}.weight", (rows, columns), into, (slice(first, first + rows),))
        first += rows


def kda_projections(config: KimiConfig) -> dict[str, int]:
    """Return the matrices of a KDA layer that read its input, in the order in which they lie, with their rows."""
    full = config.full_rank_forget or config.gate == "head"
    forget = {"f_proj": config.forget_dim} if full else {"f_a_proj": config.kda_head_dim}
    gate = {"g_proj": config.kda_dim} if config.full_rank_gate else {"g_a_proj": config.kda_head_dim}
    return (
        {name: config.kda_dim for name in ("q_proj", "k_proj", "v_proj")} | forget | gate | {"b_proj": config.kda_heads}
    )


def mla_projections(config: KimiConfig) -> dict[str, int]:
    """Return the matrices of an MLA layer that read its input, in the order in which they lie, with their rows."""
    whole, rank = config.heads * config.qk_head_dim, config.q_lora_rank
    queries = {"q_proj": whole} if rank is None else {"q_a_proj": rank}
    return queries | {"kv_a_proj_with_mqa": config.latent_dim}


def _kda(config: KimiConfig, there: str, here: str) -> Iterator[Stored]:
    D, H, K, P = config.hidden_size, config.kda_heads, config.kda_head_dim, config.kda_dim
    projections = kda_projections(config)
    yield from in_rows(projections, D, there, f"{here}.in_proj")
    for i, name in enumerate(("q_conv1d", "k_conv1d", "v_conv1d")):
        shape, part = (P, 1, config.conv_size), slice(i * P, (i + 1) * P)
        yield Stored(f"{there}.{name}.weight", shape, f"{here}.conv", (part,), also=((P, config.conv_size),))
    yield Stored(f"{there}.A_log", (1, 1, H, 1), f"{here}.A_log", also=((H,), (H, 1)), padded=True)
    F = config.forget_dim
    yield Stored(f"{there}.dt_bias", (F,), f"{here}.dt_bias", also=((H, F // H),))
    if "f_a_proj" in projections:
        yield Stored(f"{there}.f_b_proj.weight", (F, K), f"{here}.f_b")
    if "g_a_proj" in projections:
        yield Stored(f"{there}.g_b_proj.weight", (P, K), f"{here}.g_b")
    yield Stored(f"{there}.o_norm.weight", (K,), f"{here}.o_norm")
    yield Stored(f"{there}.o_proj.weight", (D, P), f"{here}.out_proj.weight")


def _mla(config: KimiConfig, there: str, here: str) -> Iterator[Stored]:
    D, H, R = config.hidden_size, config.heads, config.kv_lora_rank
    yield from in_rows(mla_projections(config), D, there, f"{here}.in_proj")
    if Q := config.q_lora_rank:
        yield Stored(f"{there}.q_a_layernorm.weight", (Q,), f"{here}.q_norm")
        yield Stored(f"{there}.q_b_proj.weight", (H * config.qk_head_dim, Q), f"{here}.q_b")
    yield Stored(f"{there}.kv_a_layernorm.weight", (R,), f"{here}.latent_norm")
    expanded = config.qk_nope_head_dim + config.v_head_dim
    yield Stored(f"{there}.kv_b_proj.weight", (H * expanded, R), f"{here}.kv_b")
    yield Stored(f"{there}.o_proj.weight", (D, H * config.v_head_dim), f"{here}.out_proj.weight")


def _mlp(there: str, here: str, D: int, I: int) -> Iterator[Stored]:
    yield from in_rows({"gate_proj": I, "up_proj": I}, D, there, f"{here}.gate_up")
    yield Stored(f"{there}.down_proj.weight", (D, I), f"{here}.down")


def _experts(config: KimiConfig, there: str, here: str, share: Share) -> Iterator[Stored]:
    D, I, E = config.hidden_size, config.moe_intermediate_size, config.experts
    yield Stored(f"{there}.gate.weight", (E, D), f"{here}.router")
    yield Stored(f"{there}.gate.e_score_correction_bias", (E,), f"{here}.router_bias")
    for e, number in enumerate(share.experts(config)):
        expert = f"{there}.experts.{number}"
        yield Stored(f"{expert}.w1.weight", (I, D), f"{here}.gate_up", (e, slice(0, I)))
        yield Stored(f"{expert}.w3.weight", (I, D), f"{here}.gate_up", (e, slice(I, 2 * I)))
        yield Stored(f"{expert}.w2.weight", (D, I), f"{here}.down", (e,))
    if config.shared_experts:
        yield from _mlp(f"{there}.shared_experts", f"{here}.shared", D, share.shared(config))
