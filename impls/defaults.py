"""Choose the configuration of a call that names none, from what the compiler made of the candidates.

Nothing here was measured on a processor: candidates were compiled with Triton 3.7.1 at T = 8192, H = 64, K = V, the
gate and the norms inside. At C = 16 those that spill nothing come first, where there are any, then the quickest by
`impls.estimate`; beside most rows stand the figures of their two kernels,

    registers / bytes spilled, microseconds by estimate     of intra | of the walk

All of C = 16 for 16 bits spill nothing, at K = V = 256 either but for the walk on sm_80 (40 bytes; no row spills none).
C = 32 spills in intra on NVIDIA and costs there more than it saves in the walk, which on sm_80 and gfx942 takes even
longer; it is run only where the caller asks for it, as is C = 64.
"""

from dataclasses import dataclass, replace

from impls.configs import ChunkTritonConfig, DplrTritonConfig, RecurrentTritonConfig
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
        64: _Row(1, 2, 1, 32, 2, 3),  # 154 / 0, 296 | 165 / 0, 281; value tile 64: 343
        128: _Row(1, 2, 2, 64, 4, 3),  # 247 / 0, 514 | 247 / 0, 465; value tile 32: 399, twice the reads; 128: 558
        256: _Row(1, 8, 1, 64, 4, 3),  # 156 / 0, 2263 | 255 / 40, 1602; value tile 16: 4081, 16 spilled
    },
    ("sm_90", 16): {
        16: _Row(1, 1, 2, 16, 1, 3),  # 112 / 0, 52 | 94 / 0, 173
        32: _Row(1, 1, 2, 32, 2, 3),  # 168 / 0, 84 | 130 / 0, 188
        64: _Row(1, 1, 2, 64, 4, 3),  # 232 / 0, 129 | 140 / 0, 192; intra with 2 warps 195
        128: _Row(1, 2, 2, 64, 4, 3),  # 191 / 0, 351 | 201 / 0, 220; value tile 32: 257, 128: 441
        256: _Row(1, 4, 2, 64, 8, 3),  # 195 / 0, 769 | 253 / 0, 1085; value tile 32 with 2 warps 670, 72 spilled
    },
    # Blackwell: from 64 value channels on products go through tensor memory, and a chunk of the walk waits for four
    ("sm_100", 16): {
        16: _Row(1, 1, 2, 16, 1, 3),
        32: _Row(1, 1, 2, 32, 2, 3),
        64: _Row(1, 1, 2, 32, 2, 3),  # 250 / 0, 110 | 165 / 0, 182; value tile 64: 712
        128: _Row(1, 2, 2, 32, 2, 3),  # 192 / 0, 293 | 229 / 0, 263; value tile 64: 761
        256: _Row(1, 4, 2, 64, 8, 3),  # 191 / 0, 626 | 229 / 0, 2067; value tile 32 with 2 warps 635, 104 spilled
    },
    ("gfx942", 16): {
        16: _Row(1, 1, 1, 16, 1, 2),  # 138 / 0, 121 | 84 / 0, 306
        32: _Row(1, 1, 2, 16, 1, 2),  # 219 / 0, 198 | 114 / 0, 352
        64: _Row(1, 1, 1, 16, 1, 2),  # 276 / 0, 345 | 162 / 0, 430; value tile 32: 686
        128: _Row(1, 2, 1, 16, 1, 2),  # 276 / 0, 910 | 248 / 0, 653; intra with 1 warp spills 372; value tile 32: 915
        256: _Row(1, 2, 1, 64, 4, 1),  # 504 / 0, 1918 | 324 / 0, 1775; intra with 4 warps spills 8
    },
    ("sm_80", 32): {
        64: _Row(2, 2, 2, 32, 4, 3),  # 255 / 48, 469 | 242 / 0, 231
        128: _Row(2, 2, 2, 32, 4, 2),  # 255 / 584, 728 | 255 / 0, 627; intra with 4 warps spills 32, 1221
        256: _Row(2, 8, 1, 32, 4, 2),  # 255 / 280, 3013 | 255 / 640, 2200
    },
    ("sm_90", 32): {
        64: _Row(2, 2, 2, 64, 4, 3),  # 255 / 32, 281 | 171 / 0, 157
        128: _Row(2, 2, 2, 64, 4, 3),  # 255 / 296, 452 | 238 / 0, 133; intra with 4 warps spills 96, 719
        256: _Row(2, 8, 1, 64, 8, 3),  # 255 / 200, 1898 | 255 / 16, 647
    },
    ("sm_100", 32): {
        64: _Row(2, 2, 2, 32, 4, 3),  # 255 / 112, 258 | 240 / 0, 124
        128: _Row(2, 2, 2, 32, 4, 3),  # 255 / 328, 357 | 255 / 16, 314
        256: _Row(2, 8, 1, 64, 8, 3),  # 255 / 192, 1524 | 255 / 8, 815
    },
    ("gfx942", 32): {
        64: _Row(1, 4, 1, 32, 4, 2),  # 252 / 0, 490 | 215 / 0, 523
        128: _Row(1, 4, 1, 32, 4, 2),  # 290 / 0, 1269 | 252 / 0, 727
        256: _Row(1, 4, 1, 16, 4, 2),  # 450 / 0, 1658 | 306 / 0, 2960
    },
    ("sm_80", 64): {
        64: _Row(2, 4, 1, 32, 4, 2),  # 255 / 544, 1123 | 200 / 0, 171
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 616, 2239 | 255 / 16, 382
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("sm_90", 64): {
        64: _Row(1, 8, 1, 64, 4, 2),  # 255 / 56, 517 | 245 / 0, 96
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 704, 1294 | 255 / 8, 194
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("sm_100", 64): {
        64: _Row(2, 4, 1, 32, 4, 2),  # 255 / 456, 607 | 196 / 0, 110
        128: _Row(2, 8, 1, 32, 4, 2),  # 255 / 632, 1166 | 255 / 8, 184
        256: _Row(2, 8, 1, 32, 8, 2),
    },
    ("gfx942", 64): {
        64: _Row(1, 8, 1, 64, 4, 2),  # 256 / 532, 1502 | 317 / 0, 481
        128: _Row(1, 8, 1, 32, 4, 2),  # 256 / 952, 1971 | 438 / 0, 707
        256: _Row(1, 8, 1, 16, 4, 2),
    },
}
"""(family, C) -> BK -> row, for inputs of 16 bits."""

_WIDE = {
    "cuda": {
        64: _Row(1, 2, 2, 16, 4, 2),  # sm_90: 166 / 0 | 206 / 0, 1099
        128: _Row(1, 4, 2, 16, 8, 2),  # sm_90: 167 / 0 | 194 / 0, 5237; value tile 32 spills 784
        256: _Row(1, 8, 2, 16, 8, 2),  # sm_90: 170 / 0 | 255 / 280, 18485
    },
    "hip": {
        64: _Row(1, 2, 1, 16, 4, 2),  # 206 / 0, 317 | 122 / 0, 827
        128: _Row(1, 4, 1, 32, 4, 2),  # 304 / 0, 1675 | 255 / 0, 1383
        256: _Row(1, 4, 1, 16, 4, 2),  # 512 / 60 | 354 / 0, 11303; intra with 8 warps spills 1644
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

    Threads own whole columns. At K = 64 and 128 nothing spills on sm_80, sm_90, sm_100 and gfx942 (243 and 244
    registers on sm_90, 1217 and 1533 us by estimate); at 256 it is 272, 232, 352 and 0 bytes.
    """
    return replace(config, recompute=True, value_tile=32, walk_warps=4, walk_stages=2, walk_contiguity=1)


def default_recurrent(K: int, V: int, dtype: str, target: Target) -> RecurrentTritonConfig:
    """Return the configuration for K, V in 1..256 on a target; all that is in registers is float32 for any dtype."""
    return _RECURRENT[_backend(target), 128 if K <= 128 else 256]


def default_dplr(K: int, V: int, dtype: str, target: Target, chunk_size: int | None = None) -> DplrTritonConfig:
    """Return the configuration of dplr_triton, at C = 16 and K = V = 128 the least by estimate that spills nothing.

    Where four matrices of rows and four squares for each stage need more shared memory than there is, there are fewer
    stages: at C = 64, K = 128 in bfloat16 three take 303,616 bytes of the 232,448 of sm_90. There the walk spills
    nothing on 8 warps (245 registers), 496 bytes on 4; intra spills from C = 32 on, 536 bytes there and 1,584 at 64 on
    8 warps, so that the compiler's stage of the tuner leaves C = 16.

    Compiled at T = 8192, H = 64 in bfloat16, registers and microseconds: intra on 4 warps 196, 664 on sm_90 (2 warps
    spill 120 bytes), walk 224, 354; sm_80 193, 1063 and 246, 478; gfx942 166, 495 and 257, 1167; on sm_100 intra spills
    72 bytes, 557, and the walk takes 237, 344. Nothing was measured.
    """
    C, hopper = chunk_size or CHUNK, family(target) == "sm_90"
    tile, warps, stages = (64, 8 if C == 64 else 4, 3) if hopper else (32, 2, 2)
    config = DplrTritonConfig(C, tile, walk_warps=warps, walk_stages=stages)
    return fitted(config, K, V, dtype, target)


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
