"""Choose the configuration of a call that names none, from what the compiler made of the candidates.

Nothing here was measured on a processor: candidates were compiled with Triton 3.7.1 and ranked by `impls.estimate` at
T = 8192, H = 64, K = V, the gate and the norms inside; beside each row stand the figures of its two kernels,

    registers / bytes spilled, microseconds by estimate     of intra | of the walk

All of C = 16 for 16 bits spill nothing, at K = V = 256 either. C = 32 spills in intra nearly everywhere, and costs
there more than it saves in the walk; it is run only where the caller asks for it, as is C = 64.
"""

from dataclasses import dataclass, replace

from impls.configs import ChunkTritonConfig, RecurrentTritonConfig
from impls.footprint import fitted
from impls.plan import narrow, tile_of
from impls.targets import Target

CHUNK = 16


@dataclass(frozen=True)
class _Row:
    """What a table says of one C and BK: tiles, warps, contiguity of intra; value tile, warps, stages of the walk."""

    tiles: int
    warps: int
    contiguity: int
    value_tile: int
    walk_warps: int
    stages: int


_NARROW = {
    ("sm_80", 16): {
        16: _Row(1, 1, 2, 16, 1, 3),
        32: _Row(1, 1, 2, 32, 2, 3),
        64: _Row(1, 2, 1, 64, 4, 3),  # 154 / 0, 296 | 164 / 0, 401
        128: _Row(1, 2, 2, 128, 8, 3),  # 247 / 0, 514 | 248 / 0, 705; value tile 32: 204 / 0, 1232; 64: spills 48
        256: _Row(1, 8, 1, 16, 4, 2),  # 156 / 0, 2263 | 185 / 0, 3694; intra with 4 warps 1246, 32 spilled
    },
    ("sm_90", 16): {
        16: _Row(1, 1, 2, 16, 1, 3),  # 112 / 0, 52 | 80 / 0, 253
        32: _Row(1, 1, 2, 32, 2, 3),  # 168 / 0, 84 | 113 / 0, 270
        64: _Row(1, 1, 2, 64, 4, 3),  # 232 / 0, 129 | 120 / 0, 266; intra with 2 warps 195
        128: _Row(1, 2, 2, 64, 4, 3),  # 191 / 0, 351 | 191 / 0, 321; value tile 32: 473, 128: 532
        256: _Row(1, 4, 2, 64, 8, 3),  # 195 / 0, 769 | 246 / 0, 1417; value tile 32 with 4 warps 1461, 56 spilled
    },
    # Blackwell: from 64 value channels on products go through tensor memory, and a chunk of the walk waits for four
    ("sm_100", 16): {
        16: _Row(1, 1, 2, 16, 1, 3),
        32: _Row(1, 1, 2, 32, 2, 3),
        64: _Row(1, 1, 2, 32, 2, 3),  # 250 / 0, 110 | 151 / 0, 350; value tile 64: 726
        128: _Row(1, 2, 2, 32, 4, 3),  # 192 / 0, 293 | 203 / 0, 423; value tile 64: 900
        256: _Row(1, 4, 2, 64, 8, 3),  # 191 / 0, 626 | 228 / 0, 2340; value tile 32 with 4 warps 1386, 168 spilled
    },
    ("gfx942", 16): {
        16: _Row(1, 1, 1, 16, 1, 2),  # 138 / 0, 121 | 94 / 0, 413
        32: _Row(1, 1, 2, 16, 1, 2),  # 219 / 0, 198 | 108 / 0, 542
        64: _Row(1, 1, 1, 16, 1, 2),  # 276 / 0, 345 | 168 / 0, 530; value tile 32: 762
        128: _Row(1, 2, 1, 16, 1, 2),  # 276 / 0, 910 | 239 / 0, 670; intra with 1 warp spills 372; value tile 32: 949
        256: _Row(1, 2, 1, 64, 8, 2),  # 504 / 0, 1918 | 222 / 0, 1707; intra with 4 warps spills 8
    },
    ("sm_80", 32): {
        64: _Row(2, 2, 2, 32, 4, 3),  # 255 / 48, 469 | 161 / 0, 264
        128: _Row(2, 2, 2, 32, 4, 2),  # 255 / 584, 728 | 202 / 0, 657; intra with 4 warps spills 32, 1221
        256: _Row(2, 8, 1, 32, 4, 2),  # 255 / 280, 3013 | 255 / 80, 1488
    },
    ("sm_90", 32): {
        64: _Row(2, 2, 2, 64, 4, 3),  # 255 / 32, 281 | 139 / 0, 165
        128: _Row(2, 2, 2, 64, 4, 3),  # 255 / 296, 452 | 211 / 0, 198; intra with 4 warps spills 96, 719
        256: _Row(2, 8, 1, 64, 8, 3),  # 255 / 200, 1898 | 255 / 24, 647
    },
    ("sm_100", 32): {
        64: _Row(2, 2, 2, 32, 4, 3),  # 255 / 112, 258 | 139 / 0, 170
        128: _Row(2, 2, 2, 32, 4, 3),  # 255 / 328, 357 | 184 / 0, 226
        256: _Row(2, 8, 1, 64, 8, 3),  # 255 / 192, 1524 | 252 / 0, 955
    },
    ("gfx942", 32): {
        64: _Row(1, 4, 1, 32, 4, 2),  # 252 / 0, 490 | 186 / 0, 608
        128: _Row(1, 4, 1, 32, 4, 2),  # 290 / 0, 1269 | 217 / 0, 805
        256: _Row(1, 4, 1, 16, 4, 2),  # 450 / 0, 1658 | -
    },
    ("sm_80", 64): {
        64: _Row(2, 4, 1, 32, 4, 2),  # 255 / 544, 1123 | -
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 616, 2239 | -
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("sm_90", 64): {
        64: _Row(1, 8, 1, 64, 4, 2),  # 255 / 56, 517 | 207 / 0, 154
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 704, 1294 | 235 / 0, 194
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("sm_100", 64): {
        64: _Row(2, 4, 1, 32, 4, 2),  # 255 / 456, 607 | -
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 632, 1166 | -
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("gfx942", 64): {
        64: _Row(1, 8, 1, 64, 4, 2),  # 256 / 532, 1502 | 289 / 0, 469
        128: _Row(1, 8, 1, 32, 4, 2),  # 256 / 952, 1971 | 361 / 0, 604
        256: _Row(1, 8, 1, 16, 4, 2),
    },
}
"""(family, C) -> BK -> row, for inputs of 16 bits."""

_WIDE = {
    "cuda": {
        64: _Row(1, 2, 2, 16, 4, 2),  # sm_90: 166 / 0 | 246 / 0, 1099
        128: _Row(1, 4, 2, 16, 8, 2),  # sm_90: 167 / 0 | 234 / 0, 5237; value tile 32 spills 784
        256: _Row(1, 8, 2, 16, 8, 2),  # sm_90: 170 / 0 | 255 / 536, 18485
    },
    "hip": {
        64: _Row(1, 2, 1, 16, 4, 2),  # 206 / 0, 317 | 124 / 0, 860
        128: _Row(1, 4, 1, 32, 4, 2),  # 304 / 0, 1675 | 196 / 0, 1345
        256: _Row(1, 4, 1, 16, 4, 2),  # 512 / 60 | 289 / 0, 8082; intra with 8 warps spills 1644
    },
}
"""backend -> BK -> row at C = 16 for float32, whose products take no matrix instructions on NVIDIA."""


_RECURRENT = {
    ("cuda", 128): RecurrentTritonConfig(value_tile=16, warps=1),  # 168 / 0, 8085; with 2 warps 9864, tile 32 10120
    ("cuda", 256): RecurrentTritonConfig(value_tile=16, warps=4),  # 112 / 0, 20810; with 1 warp 88 bytes spilled
    ("hip", 128): RecurrentTritonConfig(value_tile=16, warps=1),  # 101 / 0, 11407; with 2 warps 16260, tile 32 15417
    ("hip", 256): RecurrentTritonConfig(value_tile=16, warps=1),  # 166 / 0, 14497; with 2 warps 20503
}
"""(backend, most key channels) -> row. One warp sums over the key channels without a barrier."""


def default_chunk(
    K: int, V: int, dtype: str, target: Target, chunk_size: int | None = None, keeps: bool = False
) -> ChunkTritonConfig:
    """Return the configuration for K, V in 1..256 on a target; C is 16 unless a chunk_size is asked for.

    dtype: that of q, k, v; keeps: whether states are kept on the way. Where the row needs more shared memory than the
    target has, stages and value tile shrink.
    """
    C = chunk_size or CHUNK
    row = _nearest(_NARROW[family(target), C] if narrow(dtype) else _WIDE[_backend(target)], tile_of(K))
    config = ChunkTritonConfig(
        chunk_size=C,
        value_tile=row.value_tile,
        intra_tiles=row.tiles,
        intra_warps=row.warps,
        intra_contiguity=row.contiguity,
        walk_warps=row.walk_warps,
        walk_stages=row.stages,
    )
    return fitted(config, K, V, dtype, target, keeps)


def recomputing(config: ChunkTritonConfig) -> ChunkTritonConfig:
    """Return the configuration that computes decayed rows again in the walk, so that it spills least.

    One stage and threads that own whole columns: sm_90 255 / 0 at K = 64 and 242 / 0 at 128, sm_80 255 / 8 and 250 / 0,
    sm_100 255 / 32 and 217 / 0, gfx942 377 / 0 and 407 / 0; with the rows of the default walk up to 2,904 bytes.
    """
    return replace(config, recompute=True, value_tile=32, walk_warps=4, walk_stages=1, walk_contiguity=1)


def default_recurrent(K: int, V: int, dtype: str, target: Target) -> RecurrentTritonConfig:
    """Return the configuration for K, V in 1..256 on a target; all that is in registers is float32 for any dtype."""
    return _RECURRENT[_backend(target), 128 if K <= 128 else 256]


def _backend(target: Target) -> str:
    return "hip" if target.backend == "hip" else "cuda"


def family(target: Target) -> str:
    """Return the target whose rows are taken: the newest one whose matrix instructions the target has.

    sm_12x has neither Hopper's groups of warps nor tensor memory; the interpreter goes with Hopper.
    """
    if target.backend == "hip":
        return "gfx942"
    if target.backend == "interpret" or target.arch // 10 == 9:
        return "sm_90"
    return "sm_100" if target.arch // 10 in (10, 11) else "sm_80"


def _nearest(rows: dict[int, _Row], BK: int) -> _Row:
    """Return the row of the fewest key channels that hold BK."""
    return rows[min(size for size in rows if size >= BK)]
