"""Every call that names no configuration gets one that is valid, fits its target, and keeps to the C asked for."""

import pytest

from impls.configs import ChunkTritonConfig, RecurrentTritonConfig, invalid
from impls.defaults import default_chunk, default_recurrent, family
from impls.footprint import misfit
from impls.targets import TARGETS, Target, named

DIMS = (1, 16, 17, 40, 64, 100, 128, 129, 256)
DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 16, 32, 64])
def test_every_default_is_valid_fits_and_has_the_chunk_size(target, dtype, chunk_size):
    for K in DIMS:
        for V in DIMS:
            config = default_chunk(K, V, dtype, target, chunk_size=chunk_size)
            assert config.chunk_size == (chunk_size or 16)
            assert config.chunk_size // config.intra_tiles >= 16, "a tile of 8 rows is none of a matrix instruction"
            assert invalid(config) is None
            told = misfit(config, K, V, dtype, target)
            # 64 rows of 256 key channels in float32 fit no processor of 99 KiB: then the C that fits is named
            assert told is None or (dtype == "float32" and (chunk_size or 16) > 16 and "; chunk_size = " in told)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_default_of_the_recurrence_is_valid(target, dtype):
    for K in DIMS:
        config = default_recurrent(K, K, dtype, target)
        assert isinstance(config, RecurrentTritonConfig)
        assert invalid(config) is None and misfit(config, K, K, dtype, target) is None


def test_defaults_leave_segments_to_the_rule_and_store_the_rows():
    for target in TARGETS.values():
        config = default_chunk(128, 128, "bfloat16", target)
        assert isinstance(config, ChunkTritonConfig)
        assert config.segments == 0 and not config.recompute


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [
        ("cuda", 75, "sm_80"), ("cuda", 80, "sm_80"), ("cuda", 89, "sm_80"), ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_100"), ("cuda", 103, "sm_100"), ("cuda", 120, "sm_80"), ("hip", "gfx90a", "gfx942"),
        ("hip", "gfx950", "gfx942"), ("interpret", 0, "sm_90"),
    ],
)  # fmt: skip
def test_a_processor_that_has_no_rows_takes_those_of_its_kind(backend, arch, expected):
    assert family(Target("any", backend, arch, 32, 99 * 1024, 100)) == expected


def test_a_processor_with_less_shared_memory_gets_less():
    large, small = (default_chunk(256, 256, "bfloat16", named(x), chunk_size=64) for x in ("sm_80", "sm_89"))
    assert (small.value_tile, small.walk_stages) < (large.value_tile, large.walk_stages)
