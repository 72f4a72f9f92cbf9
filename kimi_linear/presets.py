"""The table of presets: whole configurations by name, and how a model becomes one of the paper's baselines."""

from dataclasses import replace

from kimi_linear.config import KDA, MLA, ConfigError, KimiConfig


def pattern(layers: int, kda: int = 3, mla: int = 1) -> tuple[str, ...]:
    """Return kinds of layers: `kda` KDA layers, then `mla` MLA layers, again and again; the last is MLA where any is.

    The released model ends with an MLA layer though 27 is no multiple of 4. ConfigError for a ratio of nothing.
    """
    if layers < 1 or kda < 0 or mla < 0 or kda + mla < 1:
        raise ConfigError(f"a ratio needs layers of some kind, got {layers} layers at {kda}:{mla}")
    kinds = [KDA if i % (kda + mla) < kda else MLA for i in range(layers)]
    return (*kinds[:-1], MLA if mla else KDA)


RELEASED = KimiConfig(
    layers=pattern(27),
    hidden_size=2304,
    vocab_size=163840,
    kda_heads=32,
    kda_head_dim=128,
    heads=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=9216,
    moe_intermediate_size=1024,
    experts=256,
    experts_per_token=8,
    routed_scaling_factor=2.446,
    bos_id=163584,
    stop_ids=(163586,),
    pad_id=163839,
)

TINY = replace(
    RELEASED,
    layers=pattern(4),
    hidden_size=128,
    vocab_size=512,
    kda_heads=4,
    kda_head_dim=32,
    heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=32,
    qk_rope_head_dim=8,
    v_head_dim=32,
    intermediate_size=384,
    moe_intermediate_size=64,
    experts=8,
    experts_per_token=2,
    initializer_range=0.08,
    max_length=65536,
    bos_id=256,
    stop_ids=(258,),
    pad_id=511,
)

SMALL = replace(
    RELEASED,
    layers=pattern(16),
    hidden_size=1024,
    vocab_size=32768,
    kda_heads=8,
    heads=8,
    intermediate_size=4096,
    moe_intermediate_size=512,
    experts=32,
    experts_per_token=4,
    bos_id=32512,
    stop_ids=(32514,),
    pad_id=32767,
)

PRESETS: dict[str, KimiConfig] = {
    "kimi-linear-48b-a3b": RELEASED,
    "tiny": TINY,
    "small-1b": SMALL,
}
BASELINES = ("hybrid", "mla", "gdn-hybrid")


def preset(name: str, *, baseline: str = "hybrid", layers: int | None = None, ratio=(3, 1)) -> KimiConfig:
    """Return a preset, with other layers where asked for: `layers` of them, KDA to MLA at `ratio`.

    baseline: 'mla' has MLA layers only; 'gdn-hybrid' has one decay per head instead of one per channel (Gated
    DeltaNet) and the same layers otherwise. ConfigError for an unknown name, with the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    if baseline not in BASELINES:
        raise ConfigError(f"unknown baseline {baseline!r}; known are {', '.join(BASELINES)}")
    config = PRESETS[name]
    if layers is not None or tuple(ratio) != (3, 1):
        config = config.with_layers(pattern(len(config.layers) if layers is None else layers, *ratio))
    if baseline == "mla":
        return config.with_layers((MLA,) * len(config.layers))
    return replace(config, gate="head") if baseline == "gdn-hybrid" else config
