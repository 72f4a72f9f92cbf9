"""What can be tuned: points, restrictions that say what they remove, and the command that prints them."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

from autotune.__main__ import main
from autotune.arguments import implementation_of, problem_of
from autotune.outcomes import USAGE, UsageError
from autotune.space import Restriction, Setting, Space, space_of
from impls.configs import SHARED, TUNABLES, ChunkTorchConfig, ChunkTritonConfig, invalid
from impls.footprint import misfit
from impls.table import NAMED
from impls.targets import TARGETS

PROBLEM = problem_of("T=4096,H=16,K=128,V=128", "bfloat16")
CPU, HOPPER = Setting(PROBLEM), Setting(PROBLEM, TARGETS["sm_90"])


def setting(row) -> Setting:
    return CPU if "cpu" in row.devices else HOPPER


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_every_implementation_declares_fields_of_its_configuration_with_several_values(row):
    for part in TUNABLES[row.config].values():
        for name, values in part.items():
            assert (
                hasattr(row.config(), name) and len(set(values)) == len(values) > 1 and list(values) == sorted(values)
            )


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_the_default_is_a_point(row):
    space = space_of(row, setting(row))
    default = replace(row.config(), walk_stages=3) if row.config is ChunkTritonConfig else row.config()
    assert space.admits(default)


def test_counts_add_up_to_the_points_that_are_left():
    space = space_of(implementation_of("chunk_torch"), CPU)
    points, count = list(space.points()), space.counted()
    assert count.left == len(points) == len(set(points)) == count.points - sum(count.removed.values())
    assert all(space.admits(point) and invalid(point) is None for point in points)


def test_counting_part_by_part_is_counting_the_product():
    space = Space(
        "made up",
        ChunkTritonConfig,
        {SHARED: {"chunk_size": (16, 32)}, "intra": {"intra_warps": (1, 2, 4)}, "walk": {"walk_stages": (1, 2, 3)}},
        (
            Restriction("odd", lambda config: config.walk_stages == 3, "walk"),
            Restriction("few", lambda config: config.chunk_size == 32 and config.intra_warps == 1, "intra"),
        ),
    )
    every = [
        ChunkTritonConfig(16 * c, intra_warps=w, walk_stages=s)
        for c, w, s in itertools.product((1, 2), (1, 2, 4), (1, 2, 3))
    ]
    left = [x for x in every if x.walk_stages < 3 and not (x.chunk_size == 32 and x.intra_warps == 1)]
    count = space.counted()
    assert set(space.points()) == set(left) and count.left == len(left) == 10
    assert count.removed == {"few": 3, "odd": 5} and count.parts == {SHARED: 2, "intra": 5, "walk": 4}


def test_no_point_of_a_target_outgrows_its_shared_memory():
    space = space_of(
        implementation_of("chunk_triton"), Setting(PROBLEM, TARGETS["sm_120"]), {"intra_registers": 0, "segments": 1}
    )
    for point in itertools.islice(space.points(), 0, None, 997):
        assert misfit(point, 128, 128, "bfloat16", TARGETS["sm_120"]) is None


def test_amd_is_asked_for_no_cap_on_registers():
    space = space_of(implementation_of("recurrent_triton"), Setting(PROBLEM, TARGETS["gfx942"]))
    assert {point.registers for point in space.points()} == {0}


def test_what_is_denied_is_no_point_and_says_why():
    denied = ChunkTritonConfig(recompute=True, value_tile=64, walk_stages=2)
    hopper, blackwell = (
        space_of(implementation_of("chunk_triton"), Setting(PROBLEM, TARGETS[x])) for x in ("sm_90", "sm_100")
    )
    reasons = [r.name for r in blackwell.restrictions if r.removes(denied)]
    assert hopper.admits(denied) and not blackwell.admits(denied)
    assert len(reasons) == 1 and "pipeliner" in reasons[0]


def test_a_fixed_field_is_no_longer_searched():
    space = space_of(implementation_of("chunk_torch"), CPU, {"compile": True})
    assert all(point.compile for point in space.points())
    assert space.fingerprint != space_of(implementation_of("chunk_torch"), CPU).fingerprint


def test_a_batch_is_no_reason_for_shorter_blocks():
    batch = Setting(replace(PROBLEM, B=16, N=16, T=512, packed=False))
    space = space_of(implementation_of("chunk_torch"), batch)
    assert space.admits(ChunkTorchConfig()) and max(point.block_tokens for point in space.points()) == 512


def test_blocks_that_hold_everything_are_tried_once():
    for text, heads, tokens in (("T=64,H=2", 4, 64), ("T=4096,H=16", 16, 512), ("T=100,H=3,N=2", 8, 128)):
        points = list(space_of(implementation_of("chunk_torch"), Setting(problem_of(text, "float32"))).points())
        assert max(point.heads for point in points) == heads
        assert max(point.block_tokens for point in points if point.chunk_size <= 32) == tokens


@pytest.mark.parametrize("fixed", [{"chunksize": 16}, {"chunk_size": 17}])
def test_a_fixed_field_must_exist_and_be_valid(fixed):
    with pytest.raises(UsageError, match="--fix"):
        space_of(implementation_of("chunk_torch"), CPU, fixed)


def test_the_command_prints_fields_counts_and_reasons(capsys):
    assert main(["space", "chunk_torch", "--shape", "T=4096,H=16"]) == 0
    printed = capsys.readouterr().out
    assert "block_tokens" in printed and "impls.configs.invalid" in printed and "2,880 points" in printed


def test_the_command_prints_json_for_machines(capsys):
    assert main(["space", "recurrent_triton", "--target", "sm_80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left"] == found["points"] - sum(found["removed"].values()) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["chunk_torch", "--shape", "T=x"],
        ["chunk_torch", "--target", "sm_90"],
        ["chunk_triton", "--target", "cpu"],
        ["chunk_triton", "--target", "sm_1"],
    ],
)
def test_usage_is_exit_code_2_and_one_line(arguments, capsys):
    assert main(["space", *arguments]) == USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_config_of_another_value_is_no_point():
    assert not space_of(implementation_of("chunk_torch"), CPU).admits(ChunkTorchConfig(heads=7))
    assert asdict(ChunkTorchConfig())["heads"] in TUNABLES[ChunkTorchConfig][SHARED]["heads"]
