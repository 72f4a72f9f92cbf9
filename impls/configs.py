"""Launch configurations: what may be chosen about how an implementation runs, and never about what it computes."""

from dataclasses import dataclass, fields

CHUNK_SIZES = (16, 32, 64, 128)
TRITON_CHUNK_SIZES = (16, 32, 64)
GROUPS = (4, 8, 16)
SHARED = "shared"
"""The part of a configuration that every kernel depends on."""
SMALLEST_TILE = 16
"""Fewest rows that a matrix instruction sums over."""


@dataclass(frozen=True)
class ChunkTorchConfig:
    """Configure chunk_torch. Two configurations agree within rounding, not bit for bit; so do their gradients."""

    chunk_size: int = 16
    """C, tokens per chunk."""
    block_tokens: int = 128
    """Tokens of a pair that are worked on at a time: a bound on the workspace, no influence on the bits. The backward
    always takes 128."""
    heads: int = 16
    """Pairs of a sequence and a head worked on at a time: a bound on the workspace, no influence on the bits."""
    group: int = 8
    """Tokens of the tree's smallest level, worked on element by element. The backward always takes 8."""
    threads: int = 0
    """Most of torch's threads that the call uses, 0 for all of them. The bound is torch's own, for the whole process:
    what other threads begin meanwhile is bounded, too. What is tuned holds for as many threads as it was tuned with."""
    compile: bool = False
    """Run blocks through torch's compiler: 9 seconds once for a shape of block, a third of the time from then on."""


@dataclass(frozen=True)
class RecurrentTorchConfig:
    """Configure recurrent_torch."""

    compile: bool = False
    """Run the step through torch's compiler: a few seconds once, half of the time of a decode step from then on."""


@dataclass(frozen=True)
class ChunkTritonConfig:
    """Configure chunk_triton. The results of two configurations agree within rounding, not bit for bit."""

    chunk_size: int = 16
    """C, tokens per chunk."""
    value_tile: int = 64
    """Value channels of the state that one program of the walk holds."""
    segments: int = 0
    """How many segments T is cut into, walked at the same time; 0: as many as `chunk_triton.segments_by_rule` says.
    With 1 a sequence's bits do not depend on how many others are computed with it, or on how many tokens follow."""
    recompute: bool = False
    """Keep only the C x C matrices between the kernels, and have the walk compute the decayed rows again."""
    intra_tiles: int = 1
    """Work on a chunk as one tile of C tokens, or as two of C / 2."""
    intra_warps: int = 2
    intra_stages: int = 1
    intra_contiguity: int = 2
    """Neighbouring channels that a thread owns of a row, at most: few make a thread own whole columns."""
    intra_registers: int = 0
    """Cap on the registers of a thread, 0 for none."""
    walk_warps: int = 4
    walk_stages: int = 3
    walk_contiguity: int = 8
    walk_registers: int = 0
    saves: bool = False
    """Where gradients are wanted, keep what the backward needs of the forward, 12 times q where K = V = 128, instead of
    computing it again: two launches fewer, the same gradients bit for bit. The outputs are those of other kernels."""


@dataclass(frozen=True)
class RecurrentTritonConfig:
    """Configure recurrent_triton."""

    value_tile: int = 32
    """Value channels of the state that one program holds."""
    warps: int = 4
    stages: int = 1
    registers: int = 0


@dataclass(frozen=True)
class DplrTorchConfig:
    """Configure dplr_torch. Two chunk sizes agree within rounding, not bit for bit."""

    chunk_size: int = 16
    """C, tokens per chunk."""
    block_tokens: int = 256
    """Tokens that are worked on at a time: a bound on the workspace, no influence on the bits."""


@dataclass(frozen=True)
class DplrTritonConfig:
    """Configure dplr_triton: the fields of chunk_triton's kernels, whose two launches it has."""

    chunk_size: int = 16
    """C, tokens per chunk."""
    value_tile: int = 64
    """Value channels of the state that one program of the walk holds."""
    intra_warps: int = 4
    intra_stages: int = 1
    intra_contiguity: int = 1
    intra_registers: int = 0
    walk_warps: int = 4
    walk_stages: int = 3
    walk_contiguity: int = 8
    walk_registers: int = 0


def invalid(config) -> str | None:
    """Return None for a configuration that can run, otherwise what is wrong with it; one predicate for all kinds."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is not field.type:
            return f"{field.name} must be of type {field.type.__name__}, got {value!r}"
    return _INVALID[type(config)](config)


def _invalid_chunk_torch(config: ChunkTorchConfig) -> str | None:
    if config.chunk_size not in CHUNK_SIZES:
        return f"chunk_size must be one of {CHUNK_SIZES}, got {config.chunk_size!r}"
    if config.block_tokens < config.chunk_size or config.block_tokens % config.chunk_size:
        return f"block_tokens must be a multiple of chunk_size = {config.chunk_size}, got {config.block_tokens!r}"
    if config.heads < 1:
        return f"heads must be at least 1, got {config.heads!r}"
    if config.group not in GROUPS:
        return f"group must be one of {GROUPS}, got {config.group!r}"
    if config.threads < 0:
        return f"threads must be at least 0, got {config.threads!r}"
    return None


def _invalid_dplr_torch(config: DplrTorchConfig) -> str | None:
    if config.chunk_size not in TRITON_CHUNK_SIZES:
        return f"chunk_size must be one of {', '.join(map(str, TRITON_CHUNK_SIZES))}, got {config.chunk_size!r}"
    if config.block_tokens < config.chunk_size or config.block_tokens % config.chunk_size:
        return f"block_tokens must be a multiple of chunk_size = {config.chunk_size}, got {config.block_tokens!r}"
    return None


def _invalid_triton(config: ChunkTritonConfig | RecurrentTritonConfig | DplrTritonConfig) -> str | None:
    for field in fields(config):
        allowed, value = _ALLOWED[field.name.removeprefix("intra_").removeprefix("walk_")], getattr(config, field.name)
        if value not in allowed:
            every = f"one of {', '.join(map(str, allowed))}"
            known = f"from {allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else every
            return f"{field.name} must be {known}, got {value!r}"
    if isinstance(config, ChunkTritonConfig) and config.chunk_size // config.intra_tiles < SMALLEST_TILE:
        return f"intra_tiles must be 1 where chunk_size is {config.chunk_size}, got {config.intra_tiles}"
    return _unsaved(config) if isinstance(config, ChunkTritonConfig) and config.saves else None


def _unsaved(config: ChunkTritonConfig) -> str | None:
    """Return None where the kernels of a forward that saves can run so: chunk by chunk as the backward does."""
    for name, allowed in (("chunk_size", (16,)), ("segments", (0, 1)), ("recompute", (False,)), ("intra_tiles", (1,))):
        if (value := getattr(config, name)) not in allowed:
            return f"{name} must be {' or '.join(map(str, allowed))} where saves is True, got {value!r}"
    return None


_ALLOWED = {
    "chunk_size": TRITON_CHUNK_SIZES,
    "value_tile": (16, 32, 64, 128, 256),
    "segments": range(0, 1025),
    "recompute": (False, True),
    "saves": (False, True),
    "tiles": (1, 2),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 6),
    "contiguity": (1, 2, 4, 8),
    "registers": (0, *range(32, 256, 8)),
}
_INVALID = {
    ChunkTorchConfig: _invalid_chunk_torch,
    RecurrentTorchConfig: lambda config: None,
    ChunkTritonConfig: _invalid_triton,
    RecurrentTritonConfig: _invalid_triton,
    DplrTorchConfig: _invalid_dplr_torch,
    DplrTritonConfig: _invalid_triton,
}

_INTRA = {
    "intra_warps": (1, 2, 4, 8),
    "intra_stages": (1, 2),
    "intra_contiguity": (1, 2, 4, 8),
    "intra_registers": (0, 128, 168, 248),
}
_WALK = {
    "walk_warps": (1, 2, 4, 8),
    "walk_stages": (1, 2, 3, 4),
    "walk_contiguity": (1, 2, 4, 8),
    "walk_registers": (0, 128, 168, 248),
}
TUNABLES: dict[type, dict[str, dict[str, tuple]]] = {
    ChunkTorchConfig: {
        SHARED: {
            "chunk_size": CHUNK_SIZES,
            "block_tokens": (32, 64, 128, 256, 512),
            "heads": (4, 8, 16, 32),
            "group": GROUPS,
            "threads": (0, 1, 2, 4, 8, 16),
            "compile": (False, True),
        }
    },
    RecurrentTorchConfig: {SHARED: {"compile": (False, True)}},
    ChunkTritonConfig: {
        SHARED: {
            "chunk_size": TRITON_CHUNK_SIZES,
            "value_tile": (16, 32, 64, 128, 256),
            "segments": (0, 1, 2, 4, 8, 16),
            "recompute": (False, True),
            "intra_tiles": (1, 2),
        },
        "intra": _INTRA,
        "walk": _WALK,
    },
    DplrTorchConfig: {
        SHARED: {"chunk_size": TRITON_CHUNK_SIZES, "block_tokens": (64, 128, 256, 512, 1024)},
    },
    DplrTritonConfig: {
        SHARED: {"chunk_size": TRITON_CHUNK_SIZES, "value_tile": (16, 32, 64, 128, 256)},
        "intra": _INTRA,
        "walk": _WALK,
    },
    RecurrentTritonConfig: {
        SHARED: {
            "value_tile": (16, 32, 64, 128),
            "warps": (1, 2, 4, 8),
            "stages": (1, 2, 3),
            "registers": (0, 128, 168),
        }
    },
}
"""kind -> part -> field -> the values worth trying, in order. A kernel's own fields are a part: given the shared ones,
its time depends on no other part's."""
