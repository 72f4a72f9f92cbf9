"""Launch configurations: what may be chosen about how an implementation runs, and never about what it computes."""

from dataclasses import dataclass

CHUNK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class ChunkTorchConfig:
    """Configure chunk_torch. The results of two configurations agree within rounding, not bit for bit."""

    chunk_size: int = 32
    """C, tokens per chunk."""
    block_tokens: int = 256
    """Tokens of one sequence that are worked on at a time: a bound on the workspace, no influence on the bits."""
    heads: int = 16
    """Pairs of a sequence and a head worked on at a time: a bound on the workspace, no influence on the bits."""
    compile: bool = False
    """Run the block through torch.compile: compiling takes seconds to a minute for each shape of block."""


def invalid(config: ChunkTorchConfig) -> str | None:
    """Return None for a configuration that runs, otherwise what is wrong with it."""
    for name in ("chunk_size", "block_tokens", "heads"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            return f"{name} must be an int, got {value!r}"
    if config.chunk_size not in CHUNK_SIZES:
        return f"chunk_size must be one of {CHUNK_SIZES}, got {config.chunk_size!r}"
    if config.block_tokens < config.chunk_size or config.block_tokens % config.chunk_size:
        return f"block_tokens must be a multiple of chunk_size = {config.chunk_size}, got {config.block_tokens!r}"
    if config.heads < 1:
        return f"heads must be at least 1, got {config.heads!r}"
    if not isinstance(config.compile, bool):
        return f"compile must be True or False, got {config.compile!r}"
    return None


def chunk_torch_config(config: ChunkTorchConfig | None, chunk_size: int | None) -> ChunkTorchConfig:
    """Return the configuration to run, given what was asked for; None leaves a choice to the default.

    Raises TypeError for another kind of configuration, ValueError for an invalid or a contradictory one.
    """
    if config is None:
        C = ChunkTorchConfig.chunk_size if chunk_size is None else chunk_size
        config = ChunkTorchConfig(chunk_size=C)
    if not isinstance(config, ChunkTorchConfig):
        raise TypeError(f"config must be a ChunkTorchConfig for chunk_torch, got {config!r}")
    if chunk_size not in (None, config.chunk_size):
        raise ValueError(f"chunk_size must be config.chunk_size = {config.chunk_size}, got {chunk_size}")
    if reason := invalid(config):
        raise ValueError(reason)
    return config
