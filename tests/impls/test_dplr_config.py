"""General DPLR is configured, tuned and judged like the implementations whose yardstick it is."""

import json

import pytest
import torch

from impls import dplr_triton, kda, traffic, tuned
from impls.configs import ChunkTorchConfig, DplrTorchConfig, DplrTritonConfig
from impls.defaults import default_dplr
from impls.dplr_ops import dplr
from impls.footprint import shared_memory, unfit
from impls.plan import Problem
from impls.targets import TARGETS
from kda_spec.costs import dplr_chunk_flops
from kda_spec.types import Sizes
from verify.__main__ import main
from verify.session import PASS


def drawn(T=50, H=2, K=16, V=20):
    generator = torch.Generator().manual_seed(0)
    q, k, a, b = (torch.nn.functional.normalize(torch.randn(1, T, H, K, generator=generator), dim=-1) for _ in range(4))
    g = -torch.exp(torch.randn(1, T, H, K, generator=generator) - 2)
    return q, k, torch.randn(1, T, H, V, generator=generator), 0.7 * a, 0.7 * b, g


def same(found, expected) -> bool:
    return all(map(torch.equal, found, expected))


def close(found, expected) -> bool:
    return all((x - y).norm() <= 5e-7 * y.norm() for x, y in zip(found, expected, strict=True))


def run(**asked):
    return dplr(*drawn(), output_final_state=True, **asked)


def test_a_configuration_is_the_chunk_size_that_it_names_and_blocks_change_no_bit():
    for name, kind in (("dplr_torch", DplrTorchConfig), ("dplr_triton", DplrTritonConfig)):
        assert same(run(implementation=name, config=kind(chunk_size=32)), run(implementation=name, chunk_size=32))
        assert not same(run(implementation=name, chunk_size=32), run(implementation=name))
    assert same(run(config=DplrTorchConfig(block_tokens=16)), run())


@pytest.mark.parametrize("config", [{"value_tile": 16}, {"intra_warps": 1, "walk_stages": 1, "walk_contiguity": 1}])
def test_launches_differ_by_rounding_at_most(config):
    assert close(run(implementation="dplr_triton", config=DplrTritonConfig(**config)), run())


REFUSED = {
    "another kind": ({"config": ChunkTorchConfig()}, TypeError, "config must be a DplrTorchConfig for dplr_torch"),
    "of the other form": ({"config": DplrTritonConfig()}, TypeError, "must be a DplrTorchConfig"),
    "another C": ({"config": DplrTorchConfig(), "chunk_size": 32}, ValueError, "config.chunk_size = 16, got 32"),
    "no such C": ({"config": DplrTorchConfig(chunk_size=8)}, ValueError, "chunk_size must be one of 16, 32, 64"),
    "blocks": ({"config": DplrTorchConfig(block_tokens=24)}, ValueError, "a multiple of chunk_size = 16, got 24"),
    "warps": (
        {"config": DplrTritonConfig(walk_warps=3), "implementation": "dplr_triton"},
        ValueError,
        "walk_warps must be one of 1, 2, 4, 8, 16, got 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(case):
    asked, error, message = case
    with pytest.raises(error, match=message):
        run(**asked)


def test_what_does_not_fit_is_named_with_what_would():
    wide = DplrTritonConfig(chunk_size=64, value_tile=128, walk_stages=4)
    reason = unfit(wide, 128, 128, "bfloat16", TARGETS["sm_90"])
    assert "walk needs" in reason and "walk_stages = 2 would fit" in reason
    fitting = default_dplr(128, 128, "bfloat16", TARGETS["sm_90"], 64)
    assert fitting.walk_stages < 3 and unfit(fitting, 128, 128, "bfloat16", TARGETS["sm_90"]) is None


# target, dtype, C, value tile, warps, stages: bytes that Triton 3.7.1 reported for the walk at K = V = 128
MEASURED = [
    ("sm_90", "bfloat16", 64, 64, 4, 2, 205312),
    ("sm_90", "bfloat16", 64, 32, 4, 2, 110592),
    ("sm_90", "bfloat16", 64, 64, 8, 2, 221184),
    ("sm_90", "bfloat16", 64, 64, 4, 1, 90112),
    ("sm_90", "bfloat16", 64, 128, 8, 1, 98304),
    ("sm_90", "bfloat16", 32, 64, 4, 3, 127488),
    ("sm_90", "bfloat16", 32, 32, 2, 3, 84480),
    ("sm_90", "bfloat16", 32, 128, 8, 3, 131072),
    ("sm_90", "bfloat16", 16, 128, 4, 3, 59904),
    ("sm_90", "bfloat16", 16, 128, 8, 4, 70656),
    ("sm_90", "float32", 16, 32, 4, 2, 53248),
    ("sm_80", "bfloat16", 16, 32, 2, 2, 19968),
    ("sm_80", "bfloat16", 32, 32, 2, 3, 84480),
    ("sm_80", "bfloat16", 64, 32, 4, 2, 110592),
    ("sm_100", "bfloat16", 32, 64, 4, 3, 86528),
    ("gfx942", "bfloat16", 16, 32, 2, 2, 26624),
    ("gfx942", "bfloat16", 32, 32, 4, 2, 49152),
]


@pytest.mark.parametrize(("target", "dtype", "C", "BV", "warps", "stages", "measured"), MEASURED)
def test_the_bound_of_shared_memory_holds_and_is_near(target, dtype, C, BV, warps, stages, measured):
    problem = Problem(B=1, T=8192, N=1, H=64, HV=64, K=128, V=128, dtype=dtype, initial=True, final=True)
    config = DplrTritonConfig(C, BV, walk_warps=warps, walk_stages=stages)
    assert measured <= shared_memory(config, problem, TARGETS[target])["walk"] <= 1.5 * measured


def test_what_launches_move_and_multiply_is_counted():
    """Every tensor once a launch; products at least those of the form, by no more than a half."""
    problem = Problem(B=1, T=2048, N=1, H=4, HV=4, K=128, V=128, dtype="bfloat16", initial=True, final=True)
    made = dplr_triton.plan(problem, DplrTritonConfig(), TARGETS["sm_90"])
    found, row, squares = traffic.total(traffic.counted(made, problem)), 2048 * 4 * 2, 2048 * 4 * 16 * 2
    between = 4 * row * 128 + 4 * squares + 2048 // 16 * 4 * 128 * 4
    assert found.moved == 5 * row * 128 + 2 * between + 2 * row * 128 + 2 * 4 * 128 * 128 * 4
    assert 1 <= found.flops / dplr_chunk_flops(Sizes(1, 2048, 4, 4, 128, 128, 1), 16).matmul < 1.5


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "named", lambda device: {"kind": "cpu", "name": "A CPU"})
    monkeypatch.setenv("KDA_CONFIG_DIR", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


def test_what_is_tuned_is_taken_where_no_other_chunk_size_is_asked_for(folder):
    expected = run(chunk_size=32), run(chunk_size=64)
    path = tuned.path_of(folder, "dplr_torch", "A CPU")
    path.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"versions": {"torch": "2.13.0"}, "sources": "0" * 16, "date": "2026-11-21T00:00:00+00:00"}
    data = {"schema": 1, "kind": "tuned", "implementation": "dplr_torch", "device": {"kind": "cpu", "name": "A CPU"},
            "provenance": provenance, "entries": [], "default": {"chunk_size": 32, "block_tokens": 64}}  # fmt: skip
    path.write_text(json.dumps(data))
    tuned.forget()
    assert same(run(), expected[0]) and same(run(chunk_size=64), expected[1])


def test_by_its_name_it_is_kda(draw):
    inputs = draw(2, 40, 2, 4, 16, 12, resets=True)
    for name in ("dplr_torch", "dplr_triton"):
        found = kda(*inputs, implementation=name, output_final_state=True, chunk_size=16)
        assert close(found, kda(*inputs, implementation="chunk_torch", output_final_state=True))


def test_a_configuration_is_judged(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"chunk_size": 32, "block_tokens": 64}))
    assert main(["dplr_torch", "--profile", "smoke", "--config", str(path)]) == PASS
    assert "dplr_torch" in capfd.readouterr().out
