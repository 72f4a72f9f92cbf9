"""Which part of a model a rank holds: some heads, some experts, some columns of every MLP, some words."""

from dataclasses import dataclass, replace

from kimi_linear.config import KDA, MLA, ConfigError, KimiConfig


@dataclass(frozen=True)
class Share:
    """One of `ranks` equal parts, counted from 0. What is not divided is whole in all of them: norms, routers, latents.

    What a rank makes of its heads, experts and columns is a summand of what the model makes of all.
    """

    rank: int = 0
    ranks: int = 1

    def __post_init__(self):
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must be from 0 to ranks - 1 = {self.ranks - 1}, got {self.rank}")

    def check(self, config: KimiConfig) -> None:
        """Raise ConfigError, with both numbers, for all that cannot be divided by the ranks."""
        if odd := [f"{name} = {count}" for name, count in _divided(config).items() if count % self.ranks]:
            raise ConfigError(f"every rank takes an equal part: {', '.join(odd)} cannot be divided by {self.ranks}")

    def of(self, config: KimiConfig) -> KimiConfig:
        """Return what this part looks like as a model, all experts aside: those are `experts` and `shared`."""
        if self.ranks == 1:
            return config
        self.check(config)
        divided = ("kda_heads", "heads", "intermediate_size", "vocab_size")
        return replace(config, **{name: max(1, getattr(config, name) // self.ranks) for name in divided})

    def experts(self, config: KimiConfig) -> range:
        """Return the experts of this part."""
        count = config.experts // self.ranks
        return range(self.rank * count, (self.rank + 1) * count)

    def shared(self, config: KimiConfig) -> int:
        """Return the columns that this part has of the MLP that the shared experts are."""
        return config.shared_experts * config.moe_intermediate_size // self.ranks


WHOLE = Share()
"""All of it."""


def _divided(config: KimiConfig) -> dict[str, int]:
    """Return what is divided of this model, by the names of its fields: what no layer has need not be divisible."""
    sparse = len(config.layers) > config.dense_layers
    has = {
        "vocab_size": (True, config.vocab_size),
        "kda_heads": (KDA in config.layers, config.kda_heads),
        "heads": (MLA in config.layers, config.heads),
        "intermediate_size": (config.dense_layers > 0, config.intermediate_size),
        "experts": (sparse, config.experts),
        "shared_experts * moe_intermediate_size": (sparse, config.shared_experts * config.moe_intermediate_size),
    }
    return {name: count for name, (there, count) in has.items() if there}
