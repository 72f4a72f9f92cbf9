"""What the Triton rows launch and allocate, and what torch is told of their ops."""

import pytest
import torch

from impls import chunk_triton, kda, plan, recurrent_triton
from impls.configs import ChunkTritonConfig
from impls.plan import ITEMSIZE, Problem
from impls.targets import named

ONCE = ["intra", "walk"]
CUT = ["intra", "summary", "combine", "walk"]
EVERYTHING = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "output_final_state": True,
    "return_intermediate_states": True,
    "state_interval": 32,
    "state_v_first": True,
}


@pytest.fixture
def launched(monkeypatch):
    """Return the names of the kernels that are launched, in order, as the JIT sees them."""
    names = []
    kernels = (chunk_triton.intra, chunk_triton.walk, chunk_triton.combine, recurrent_triton.recurrent)
    for kernel in {type(kernel) for kernel in kernels}:
        getitem = kernel.__getitem__

        def counted(self, grid, getitem=getitem):
            names.append(self.fn.__name__)
            return getitem(self, grid)

        monkeypatch.setattr(kernel, "__getitem__", counted)
    return names


@pytest.mark.parametrize(
    "name, config, kernels",
    [
        ("recurrent_triton", None, ["recurrent"]),
        ("chunk_triton", None, ["intra", "walk"]),
        ("chunk_triton", ChunkTritonConfig(recompute=True), ["intra", "walk"]),
        ("chunk_triton", ChunkTritonConfig(segments=2), ["intra", "walk", "combine", "walk"]),
        ("chunk_triton", ChunkTritonConfig(segments=2, recompute=True), ["intra", "walk", "combine", "walk"]),
    ],
)
def test_inference_takes_one_launch_or_two_and_four_with_segments(draw, draw_state, launched, name, config, kernels):
    raw = {"A_log": torch.zeros(2), "dt_bias": torch.zeros(8), "initial_state": draw_state(1, 2, 5, 4)}
    for more in ({}, {"cu_seqlens": torch.tensor([0, 33])}, raw | EVERYTHING):
        launched.clear()
        kda(*draw(1, 33, 1, 2, 4, 5), implementation=name, config=config, **more)
        assert launched == kernels


def problem(T=4096, B=2, **changes):
    sizes = {"B": B, "T": T, "N": B, "H": 4, "HV": 4, "K": 128, "V": 128, "dtype": "bfloat16"}
    return Problem(**(sizes | changes))


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEMSIZE[dtype] * torch.Size(shape).numel()


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942", "interpret"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_between_the_kernels_lie_at_most_5_tensors_of_the_size_of_q(target, C, dtype):
    asked = problem(dtype=dtype)
    planned = chunk_triton.plan(asked, ChunkTritonConfig(chunk_size=C, segments=1), named(target))
    q = nbytes(dtype, (2, 4096, 4, 128))
    assert [launch.name for launch in planned.launches] == ONCE
    assert q < sum(nbytes(*buffer) for buffer in planned.workspace.values()) <= 5 * q
    assert all(nbytes(*buffer) <= q for buffer in planned.workspace.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_packed_sequences_of_64_tokens_need_no_more_than_5_tensors_either(dtype):
    asked = problem(T=4096, B=1, N=64, packed=True, dtype=dtype)
    planned = chunk_triton.plan(asked, ChunkTritonConfig(chunk_size=16, segments=1), named("sm_90"))
    q = nbytes(dtype, (1, 4096, 4, 128))
    assert 4096 // 16 < planned.workspace["A"][1][0] <= 4096 // 16 + 64
    assert q < sum(nbytes(*buffer) for buffer in planned.workspace.values()) <= 5 * q


# Where beta |k|^2 <= 1 is certain tf32 is enough; AMD has neither, and the interpreter is asked as NVIDIA is.
PRECISIONS = [
    ("bfloat16", "once", True, "tf32"),
    ("float16", "once", True, "tf32"),
    ("bfloat16", "once", False, "tf32x3"),
    ("bfloat16", "twice", True, "tf32x3"),
    ("float16", "twice", True, "tf32x3"),
    ("bfloat16", "none", True, "tf32x3"),
    ("bfloat16", "none", False, "tf32x3"),
    ("float32", "once", True, "ieee"),
    ("float32", "twice", True, "ieee"),
    ("float32", "none", True, "ieee"),
]


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "interpret"])
@pytest.mark.parametrize("dtype, sigmoid, l2norm, on_nvidia", PRECISIONS)
def test_the_contract_picks_the_precision_of_the_inverse_and_of_combining(target, dtype, sigmoid, l2norm, on_nvidia):
    asked, precise = problem(dtype=dtype, sigmoid=sigmoid, l2norm=l2norm), target == "gfx942"
    assert plan.inverse_precision(asked, named(target)) == ("ieee" if precise else on_nvidia)
    launches = chunk_triton.plan(asked, ChunkTritonConfig(segments=2), named(target)).launches
    found = {launch.name: launch.constants["PRECISION"] for launch in launches}
    assert found["intra"] == ("ieee" if precise else on_nvidia)
    assert found["combine"] == ("ieee" if precise or dtype == "float32" else "tf32x3")


@pytest.mark.parametrize("C", [16, 32, 64])
def test_a_walk_that_recomputes_needs_the_square_matrices_only(C):
    planned = chunk_triton.plan(problem(), ChunkTritonConfig(chunk_size=C, recompute=True, segments=1), named("sm_90"))
    assert planned.workspace == dict.fromkeys(("A", "X"), ("bfloat16", (2 * 4096 // C, 4, C, C)))


@pytest.mark.parametrize("C", [16, 32, 64])
def test_what_is_allocated_is_what_the_plan_says(draw, C, monkeypatch):
    seen = []
    monkeypatch.setattr("impls.plan.Launch.run", lambda self, buffers, scalars: seen.append((self, buffers)))
    kda(*draw(2, 70, 2, 2, 8, 6), implementation="chunk_triton", chunk_size=C)
    config = ChunkTritonConfig(chunk_size=C)
    planned = chunk_triton.plan(Problem(2, 70, 2, 2, 2, 8, 6, "float32"), config, named("interpret"))
    given = {name: x for _, buffers in seen for name, x in buffers.items()}
    assert [launch.name for launch, _ in seen] == [launch.name for launch in planned.launches]
    for name, (dtype, shape) in planned.workspace.items():
        assert given[name].dtype == getattr(torch, dtype) and tuple(given[name].shape) == shape


def test_a_segment_no_shorter_than_the_sequence_costs_no_launch():
    config, target = ChunkTritonConfig(chunk_size=16, segments=4), named("sm_90")
    assert [launch.name for launch in chunk_triton.plan(problem(T=16), config, target).launches] == ONCE
    assert [launch.name for launch in chunk_triton.plan(problem(T=17), config, target).launches] == CUT


@pytest.mark.parametrize(
    "asked, cut",
    [
        (problem(B=1, T=65536, HV=2, H=2), True),
        (problem(B=1, T=65536, HV=128), False),  # heads enough to fill the processors
        (problem(B=1, T=256), False),  # too short
    ],
)
def test_the_rule_cuts_long_sequences_of_few_heads_and_can_be_overridden(asked, cut):
    names = [launch.name for launch in chunk_triton.plan(asked, ChunkTritonConfig(), named("sm_90")).launches]
    assert names == (CUT if cut else ONCE)
    for segments, expected in ((1, ONCE), (2, CUT)):
        planned = chunk_triton.plan(asked, ChunkTritonConfig(segments=segments), named("sm_90"))
        assert [launch.name for launch in planned.launches] == expected


def test_without_a_program_nothing_is_launched(draw, launched):
    kda(*draw(0, 5, 1, 1, 3, 2), implementation="recurrent_triton")
    assert launched == []
    assert plan.options(4, 2) == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert plan.options(4, 2, 96) == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 96}


MODES = [
    (None, "none", "none", False, False, 0, False),
    (None, "softplus", "once", True, True, 16, True),
    ([0, 0, 3, 20], "bounded", "twice", True, True, 16, True),
    ([0, 3, 20], "none", "once", False, True, 0, True),
]
OPS = [
    (chunk_triton.op, (16, 64, 0, 0, 1, 2, 1, 2, 0, 4, 3, 8, 0)),
    (chunk_triton.op, (16, 64, 2, 1, 1, 2, 1, 2, 0, 4, 3, 8, 0)),
    (recurrent_triton.op, (32, 4, 1, 0)),
]


@pytest.mark.parametrize("op, launch", OPS, ids=["chunk_triton", "segments", "recurrent_triton"])
@pytest.mark.parametrize("bounds, gate, sigmoid, v_first, final, interval, initial", MODES)
def test_opcheck_passes_in_every_mode(
    draw, draw_state, op, launch, bounds, gate, sigmoid, v_first, final, interval, initial
):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N, sizes = (2, (2, 20)) if bounds is None else (len(bounds) - 1, (1, 20))
    state = draw_state(N, 2, 3, 4) if v_first else draw_state(N, 2, 4, 3)
    parameters = (None, None) if gate == "none" else (torch.zeros(2), torch.zeros(8))
    arguments = (
        *draw(*sizes, 1, 2, 4, 3), *parameters, state if initial else None, cu_seqlens, None,
        0.3, -5.0 if gate == "bounded" else None, True, gate, sigmoid, v_first, final, interval, launch,
    )  # fmt: skip
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["chunk_triton", "recurrent_triton"])
def test_an_inference_compiles_into_one_graph(draw, draw_state, name):
    S0, bounds, inputs = draw_state(2, 2, 4, 3), torch.tensor([0, 3, 20]), draw(1, 20, 1, 2, 4, 3)
    asked = {"implementation": name, "output_final_state": True, "use_qk_l2norm_in_kernel": True}

    def run(*x):
        return kda(*x[:5], initial_state=x[5], cu_seqlens=bounds, **asked)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(x, y) for x, y in zip(compiled(*inputs, S0), run(*inputs, S0), strict=True))
