"""Bound the shared memory of every launch from its configuration alone, before anything is compiled.

The compiler stages what the walk loads for its products, `stages` deep (one less where single warps multiply), and adds
room to exchange operands between warps: the state in the inputs' format, a tile of values, a tile in float32.

How tight: of 375 launches compiled with Triton 3.7.1 (sm_80, sm_90, sm_100, gfx942; C 16 to 64; K = V 16 to 256; value
tiles 16 to 128; 1 to 8 warps; 1 to 4 stages; bfloat16 and float32; states kept or not) none needs more than its bound;
the median bound of the walk is 1.11 times the need, nine in ten are at most 2.2 times. Loose are the walks of one
stage, `recompute`, and states that are kept, where how much goes through shared memory depends on the layout.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from impls.configs import ChunkTritonConfig, DplrTritonConfig, RecurrentTritonConfig
from impls.plan import ITEMSIZE, Problem, tile_of
from impls.targets import Target

Config = ChunkTritonConfig | RecurrentTritonConfig | DplrTritonConfig
FLOAT32 = 4
GROUP = 4
"""Warps that share one matrix instruction on Hopper and Blackwell; it takes 64 rows."""
GROUPED = (9, 10, 11)
"""Major versions of the architectures that have it."""
EXCHANGE = 512
"""Bytes per warp to turn a product's layout into that of the tile that is stored."""
BARRIERS = 64
"""Bytes of the barriers that products in tensor memory wait at; 16 were seen."""


def shared_memory(config: Config, problem: Problem, target: Target) -> dict[str, int]:
    """Return the bytes of one program of every kernel that the configuration may launch: never less than it needs."""
    if isinstance(config, RecurrentTritonConfig):
        return {"recurrent": _recurrent(config, problem)}
    if isinstance(config, DplrTritonConfig):
        return {"intra": _dplr_intra(config, problem, target), "walk": _dplr_walk(config, problem, target)}
    if config.saves:
        return {"within": _intra(config, problem, target), "replay": _replay(config, problem)}
    found = {"intra": _intra(config, problem, target), "walk": _walk(config, problem, target, summary=False)}
    if config.segments == 1:
        return found
    return found | {"summary": _walk(config, problem, target, summary=True), "combine": _combine(problem)}


def _intra(config: ChunkTritonConfig, problem: Problem, target: Target) -> int:
    """Exchange a float32 tile between warps, or the three matrices of a step of the inverse; with two, the early k.

    Products of float32 read both operands from shared memory on NVIDIA, which has no matrix instructions for them.
    """
    M, BK, item = config.chunk_size // config.intra_tiles, problem.BK, ITEMSIZE[problem.dtype]
    exchanged = EXCHANGE // 4 * config.intra_warps
    rows = M * BK * FLOAT32
    if item == FLOAT32 and target.nvidia:
        rows = 2 * rows + exchanged
    tile = max(rows, 3 * M * M * FLOAT32)
    early = M * BK * item + M * M * FLOAT32 + exchanged
    return tile if config.intra_tiles == 1 else tile + early


@dataclass(frozen=True)
class _Tiles:
    """Bytes of what one program of the walk holds for one chunk."""

    row: int
    """q before, k before or k after."""
    square: int
    """A or X."""
    state: int
    """The state in the inputs' format."""
    values: int
    loaded: int
    """All that is loaded for products."""


def _walk(config: ChunkTritonConfig, problem: Problem, target: Target, summary: bool) -> int:
    C, BK, item = config.chunk_size, problem.BK, ITEMSIZE[problem.dtype]
    BV = min(config.value_tile, tile_of(problem.V))
    row, square = C * BK * item, C * C * item
    loaded = row * (2 if summary else 3) + square * (1 if summary else 2)
    tiles = _Tiles(row, square, BV * BK * item, BV * C * item, loaded)
    grouped = _grouping(target) and item < FLOAT32 and BV >= 64 and config.walk_warps % GROUP == 0
    state = BV * BK * FLOAT32
    if config.recompute:
        ahead = config.walk_stages if item == FLOAT32 and target.nvidia else 1  # raw rows of float32 are staged as well
        staged = (config.walk_stages + 1) * 2 * square + ahead * 3 * row + 2 * C * BK * FLOAT32
        return max(staged + tiles.state + 2 * tiles.values, state)
    needed = _grouped(tiles, config, BV) if grouped else _single(tiles, config, item, target)
    # the state is loaded and stored in another layout than that of the products
    exchanged = summary or not target.nvidia or (config.walk_warps >= GROUP and not grouped)
    # a state that is kept is stored from within the loop: on NVIDIA up to all of it at a time, where V comes first, on
    # AMD never more than a quarter of it in either layout, in all that was compiled
    kept = (state if target.nvidia else state // 4) if problem.keeps and not summary else 0
    return (max(needed, state) if exchanged else needed) + kept


def _replay(config: ChunkTritonConfig, problem: Problem) -> int:
    """Stage all that is loaded for products and the state twice, and exchange four tiles of values, in one format.

    That is float32 for float16, which has no room for what the backward sums up. Of 120 launches that were compiled
    none needs more; the median bound is 2.3 times the need.
    """
    C, BK, item = config.chunk_size, problem.BK, FLOAT32 if problem.dtype == "float16" else ITEMSIZE[problem.dtype]
    BV = min(config.value_tile, tile_of(problem.V))
    loaded, values = (3 * C * BK + 2 * C * C) * item, C * BV * item
    return config.walk_stages * loaded + 2 * BV * BK * item + 4 * values + EXCHANGE * config.walk_warps


def _dplr_intra(config: DplrTritonConfig, problem: Problem, target: Target) -> int:
    """Exchange rows in float32, or what four squares are split of; products of float32 read both operands."""
    C, BK = config.chunk_size, problem.BK
    rows = C * BK * FLOAT32 * (2 if ITEMSIZE[problem.dtype] == FLOAT32 and target.nvidia else 1)
    return max(rows, 4 * C * C * FLOAT32) + EXCHANGE * config.intra_warps


def _dplr_walk(config: DplrTritonConfig, problem: Problem, target: Target) -> int:
    """Stage four matrices of rows and four squares; values, and the state where warps share no rows, are exchanged."""
    C, BK, item, warps = config.chunk_size, problem.BK, ITEMSIZE[problem.dtype], config.walk_warps
    BV = min(config.value_tile, tile_of(problem.V))
    loaded, values, state = 4 * C * (BK + C) * item, BV * C * item, BV * BK * item
    if _grouping(target) and item < FLOAT32 and BV >= 64 and warps % GROUP == 0:
        return config.walk_stages * loaded + values + (state if 16 * warps > BV else 0) + EXCHANGE + BARRIERS
    needed = max(1, config.walk_stages - 1) * loaded + state + 2 * values + EXCHANGE
    return max(needed, BV * BK * FLOAT32) if not target.nvidia or warps >= GROUP else needed


def _grouping(target: Target) -> bool:
    return target.backend == "interpret" or (target.nvidia and target.arch // 10 in GROUPED)


def _grouped(tiles: _Tiles, config: ChunkTritonConfig, BV: int) -> int:
    """Bound products whose operands are read from shared memory by four warps together, as deep as there are stages."""
    stages, warps = config.walk_stages, config.walk_warps
    state = tiles.state if 16 * warps > BV else 0  # two groups side by side share the rows of one state
    staged = stages * tiles.loaded
    return max(staged + EXCHANGE * warps + state, min(4 * tiles.values, 16384)) + BARRIERS


def _single(tiles: _Tiles, config: ChunkTritonConfig, item: int, target: Target) -> int:
    """Bound products of single warps: loads run one stage less ahead, the state is exchanged between warps."""
    stages, warps, wide = config.walk_stages, config.walk_warps, item // 2
    piped = (stages - 1) * tiles.loaded + max(tiles.state + wide * tiles.values, EXCHANGE * warps)
    rows = 2 * wide - 1 if target.nvidia else wide
    once = tiles.state + rows * tiles.row + tiles.square + 2 * tiles.values + EXCHANGE // 2 * warps
    return max(piped, once)


def _combine(problem: Problem) -> int:
    piece = min(32, problem.BK)
    return (piece * problem.BK + 2 * 16 * piece) * FLOAT32


def _recurrent(config: RecurrentTritonConfig, problem: Problem) -> int:
    """Exchange the sums over key channels between warps."""
    return min(config.value_tile, tile_of(problem.V)) * config.warps * FLOAT32


def misfit(config: Config, K: int, V: int, dtype: str, target: Target, keeps: bool = False) -> str | None:
    """Return None where every kernel fits the target's shared memory, else what is too large and what would fit.

    dtype: that of q, k, v; keeps: whether states are kept on the way. Named are fewer stages where they are enough,
    else a smaller value tile, else a smaller C.
    """
    problem = _sizes(K, V, dtype, keeps)
    kernel, needed = _largest(config, problem, target)
    if needed <= target.shared_memory:
        return None
    smaller = next((x for x in _smaller(config) if _largest(x, problem, target)[1] <= target.shared_memory), None)
    fits = f"; {_difference(config, smaller)} would fit" if smaller else ""
    return (
        f"{kernel} needs {needed} bytes of shared memory for K = {K}, V = {V} in {dtype}, "
        f"{target.name} has {target.shared_memory}{fits}"
    )


def unfit(config: Config, K: int, V: int, dtype: str, target: Target, keeps: bool = False) -> str | None:
    """Return None for what the target can launch, else why not: a cap that its compiler does not take, or `misfit`."""
    capped = [name for name, x in asdict(config).items() if name.endswith("registers") and x]
    if capped and target.backend == "hip":
        return f"{capped[0]} must be 0 on {target.name}, whose compiler takes no cap, got {config}"
    return misfit(config, K, V, dtype, target, keeps)


def fitted(config: Config, K: int, V: int, dtype: str, target: Target, keeps: bool = False) -> Config:
    """Return the configuration, or the nearest one of its C that fits; unchanged where none does: see `misfit`."""
    problem = _sizes(K, V, dtype, keeps)
    same = (x for x in _smaller(config) if x.chunk_size == config.chunk_size)
    return next((x for x in same if _largest(x, problem, target)[1] <= target.shared_memory), config)


def _sizes(K: int, V: int, dtype: str, keeps: bool) -> Problem:
    return Problem(B=1, T=1, N=1, H=1, HV=1, K=K, V=V, dtype=dtype, keeps=keeps)


def _largest(config, problem: Problem, target: Target) -> tuple[str, int]:
    return max(shared_memory(config, problem, target).items(), key=lambda item: item[1])


def _smaller(config: Config) -> Iterator[ChunkTritonConfig | DplrTritonConfig]:
    """Yield smaller configurations: fewer stages first, then a smaller value tile as well, then a smaller chunk."""
    if isinstance(config, RecurrentTritonConfig):
        return
    tiled = isinstance(config, ChunkTritonConfig)
    for C in _halved(config.chunk_size):
        for value_tile in _halved(config.value_tile):
            for stages in range(config.walk_stages, 0, -1):
                tiles = {"intra_tiles": min(config.intra_tiles, C // 16)} if tiled else {}
                yield replace(config, chunk_size=C, value_tile=value_tile, walk_stages=stages, **tiles)


def _halved(size: int) -> Iterator[int]:
    while size >= 16:
        yield size
        size //= 2


def _difference(config, other) -> str:
    """Say which fields differ, with the values of the other one."""
    names = (field.name for field in fields(config))
    return ", ".join(f"{x} = {getattr(other, x)}" for x in names if getattr(config, x) != getattr(other, x))
