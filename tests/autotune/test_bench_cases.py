"""The cases, the inputs drawn for them, and their floors."""

from dataclasses import replace

import pytest
import torch

from autotune.cases import CASES, LOWER_BOUND, MIXED, draw, selected
from autotune.contest import relative_error
from autotune.floors import Probe, ceilings, floor
from autotune.outcomes import UsageError
from autotune.timing import LAUNCHED
from impls import chunk_kda, find
from impls.layer_steps import ROWS as LAYERS
from impls.peers import PEERS
from impls.peers.layers import TRANSFORMERS_LAYER
from impls.training_steps import ROWS as TRAINING
from impls.training_steps import step_of
from kda_spec import costs

BY_NAME = {case.name: case for case in CASES}
SHAPES = {
    "t8192-h64-fixed": (1, 8192, 64, None),
    "t8192-h64-mixed": (1, 8192, 64, MIXED),
    "t8192-h64-8x1024": (1, 8192, 64, (1024,) * 8),
    "t8192-h96-fixed": (1, 8192, 96, None),
    "t8192-h96-mixed": (1, 8192, 96, MIXED),
    "t8192-h96-8x1024": (1, 8192, 96, (1024,) * 8),
    "t1024-h4": (1, 1024, 4, None),
    "t65536-h16": (1, 65536, 16, None),
    "b4-t4096-h64": (4, 4096, 64, None),
}
CEILINGS = {
    "copy": {"bytes_per_second": 4e12},
    "matmul": {"bfloat16": {"flops_per_second": 8e14}, "float32": {"flops_per_second": 1e11}},
}


def test_the_default_is_every_published_shape_with_either_gate():
    expected = {f"{name}-{gate}": shape for name, shape in SHAPES.items() for gate in ("unbounded", "bounded")}
    assert {case.name: (case.B, case.T, case.H, case.lengths) for case in selected(None)} == expected
    assert all((case.K, case.V, case.forms) == (128, 128, ("chunk",)) for case in selected(None))
    assert all((case.lower_bound == LOWER_BOUND) == case.name.endswith("-bounded") for case in CASES)


def test_packed_lengths_fill_the_tokens():
    assert all(sum(case.lengths) == case.T for case in CASES if case.lengths)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ("small-*", 2),
        ("t1024-h4-bounded", 1),
        ("*-unbounded", 20),
        ("train-*", 8),
        ("layer-b1-*", 2),
        ("decode-*-unbounded", 3),
        ("small-bounded,t65536-*", 3),
        ("t8192-*,*mixed*", 14),
    ],
)
def test_cases_are_chosen_by_name(patterns, count):
    assert len(selected(patterns)) == count


@pytest.mark.parametrize("patterns", ["t9999-*", "", ",", "small-*,nothing"])
def test_a_pattern_without_a_case_is_refused(patterns):
    with pytest.raises(UsageError, match="matches none of t8192"):
        selected(patterns)


@pytest.mark.parametrize("name", ["small-unbounded", "small-bounded"])
def test_inputs_are_what_chunk_kda_takes(name):
    arguments = draw(BY_NAME[name], "cpu", "bfloat16")
    assert all(arguments[x].dtype == torch.bfloat16 for x in ("q", "k", "v", "g", "beta"))
    o, state = chunk_kda(**arguments)
    assert o.shape == (1, 256, 2, 64) and o.isfinite().all()
    assert state.shape == (1, 2, 64, 64) and state.abs().max() > 0


def test_packed_inputs_say_where_sequences_end():
    case = replace(BY_NAME["small-bounded"], lengths=(100, 0, 156))
    arguments = draw(case, "cpu", "float32")
    assert arguments["cu_seqlens"].tolist() == arguments["cu_seqlens_cpu"].tolist() == [0, 100, 100, 256]
    assert arguments["cu_seqlens"].dtype == torch.int64
    assert chunk_kda(**arguments)[1].shape == (3, 2, 64, 64)


def test_equal_seeds_draw_equal_inputs():
    case = BY_NAME["small-unbounded"]
    first, second, other = (draw(case, "cpu", "float32", seed) for seed in (0, 0, 1))
    assert torch.equal(first["g"], second["g"]) and torch.equal(first["A_log"], second["A_log"])
    assert not torch.equal(first["g"], other["g"])


def test_a_gate_starts_where_models_start():
    unbounded, bounded = (draw(BY_NAME[f"small-{gate}"], "cpu", "float32") for gate in ("unbounded", "bounded"))
    assert unbounded["lower_bound"] is None and bounded["lower_bound"] == LOWER_BOUND
    assert (unbounded["A_log"] >= 0).all() and (unbounded["A_log"] <= 2.7726).all() and not bounded["A_log"].any()
    steps = torch.nn.functional.softplus(unbounded["dt_bias"])
    assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()


def layer_bytes(case) -> int:
    """Return what a layer's step moves beside the recurrence: weights of width 4, three inputs in and out, the norm."""
    if not case.layer:
        return 0
    D = 3 * case.H * case.K
    return 2 * (4 * D + case.V + case.B * (6 * D + case.H * case.V))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_floor_is_the_larger_of_its_two_terms(case):
    found = floor(case, "bfloat16", CEILINGS)
    tokens = case.B * case.T * case.H
    inputs_and_output = 2 * tokens * (2 * case.K + 2 * case.V + case.K + 1)
    states = 4 * case.sizes.N * case.H * case.K * case.V
    found["bytes"] -= layer_bytes(case)
    if case.training:  # v and o, or q and k, are as large: inputs three times, and o or do twice
        output = 2 * tokens * case.V
        assert found["bytes"] == 3 * (inputs_and_output - output) + 2 * output
    else:
        assert found["bytes"] == inputs_and_output + (2 if case.initial else 1) * states
    found["bytes"] += layer_bytes(case)
    passes = 3 if case.training else 1
    assert found["flops"] <= passes * costs.tree_chunk_flops(case.sizes, 16, case.lengths).matmul
    assert found["ms"] == max(found["bytes_ms"], found["flops_ms"])
    assert found["bytes_ms"] == pytest.approx(found["bytes"] / 4e9)


def test_a_decode_step_reads_a_state_for_every_sequence_and_is_bound_by_bytes():
    case = BY_NAME["decode-b32-h32-unbounded"]
    small = draw(replace(case, B=2, H=2), "cpu", "float32")
    assert small["initial_state"].shape == (2, 2, 128, 128) and small["q"].shape == (2, 1, 2, 128)
    assert floor(case, "bfloat16", CEILINGS)["flops"] == 0


def test_every_row_of_a_layer_takes_what_is_drawn_and_changes_none_of_it():
    case = replace(BY_NAME["layer-b32-h32-unbounded"], B=2, H=2, K=16, V=16)
    arguments = draw(case, "cpu", "float32")
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    y, S = LAYERS[0].call(**arguments)
    assert y.shape == (2, 2, 16) and S.shape == (2, 2, 16, 16)
    for row in LAYERS[1:]:
        found = row.call(**arguments)
        assert max(relative_error(x, exact) for x, exact in zip(found, (y, S), strict=True)) < 1e-6
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_transformers_composes_the_same_layer():
    pytest.importorskip("transformers.models.kimi_linear", reason="transformers 5.16 or later")
    arguments = draw(replace(BY_NAME["layer-b32-h32-unbounded"], B=2, H=2, K=16, V=16), "cpu", "float32")
    found, expected = TRANSFORMERS_LAYER.call(**arguments), LAYERS[0].call(**arguments)
    assert max(relative_error(x, exact) for x, exact in zip(found, expected, strict=True)) < 1e-6
    with pytest.raises(ValueError, match="no lower bound"):
        TRANSFORMERS_LAYER.call(**arguments | {"lower_bound": -5.0})


TRANSFORMERS = {row.name: row for row in PEERS["transformers"] if row.form == "training"}


@pytest.mark.parametrize("name", ["chunk_triton", *TRANSFORMERS])
def test_a_training_step_returns_the_gradients_of_ours(name):
    if name in TRANSFORMERS:
        pytest.importorskip("transformers.models.kimi_linear", reason="transformers 5.16 or later")
    case = replace(BY_NAME["train-t512-h8-unbounded"], T=40, H=2, K=16, V=16)
    arguments = draw(case, "cpu", "float32")
    expected = TRAINING[0].call(**arguments)
    step = TRANSFORMERS[name].load() if name in TRANSFORMERS else step_of(find(name).call)
    found = step(**arguments)
    assert len(found) == len(expected) == len(case.results)
    assert max(relative_error(x, exact) for x, exact in zip(found, expected, strict=True)) < 1e-5
    assert not any(x.requires_grad for x in arguments.values() if isinstance(x, torch.Tensor))


def test_memory_bounds_prefill_on_a_gpu_and_arithmetic_on_a_cpu():
    case = BY_NAME["t8192-h64-fixed-bounded"]
    gpu = floor(case, "bfloat16", CEILINGS)
    cpu = floor(case, "float32", CEILINGS | {"copy": {"bytes_per_second": 3e10}})
    assert gpu["bytes_ms"] > gpu["flops_ms"] and cpu["flops_ms"] > cpu["bytes_ms"]


class Watch:
    """A stopwatch on which every call takes two milliseconds."""

    def __init__(self):
        self.calls = 0

    def settle(self):
        pass

    def milliseconds(self, call, mode):
        assert mode == LAUNCHED
        self.calls += 1
        return 2.0


def test_ceilings_are_work_over_time():
    watch = Watch()
    found = ceilings("cpu", watch, Probe(copied_bytes=4000, size=10, dtypes=("float32", "bfloat16"), rounds=3))
    assert found["copy"]["bytes_per_second"] == 8000 / 2e-3  # read and written
    assert found["matmul"].keys() == {"float32", "bfloat16"}
    assert found["matmul"]["float32"]["flops_per_second"] == 2000 / 2e-3
    assert watch.calls == 9
