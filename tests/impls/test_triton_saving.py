"""A forward that saves for its backward gives the same outputs, and gradients bit for bit as by recomputation."""

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from impls import ChunkTritonConfig, chunk_kda, chunk_triton, kda
from impls.chunk_triton_backward import SAVED, plan, saving_plan, saving_tiling
from impls.plan import ITEMSIZE, WANTED, Problem, Wanted
from impls.targets import named

SAVES = ChunkTritonConfig(saves=True)
FLAGS = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
PACKED = {"cu_seqlens": torch.tensor([0, 0, 17, 18, 18, 37])}
# HV, K, V, dtype, keywords: grouped heads, channels that no tile has, either state layout, packed, both gates
CASES = {
    "plain": (1, 16, 16, torch.float32, {}),
    "packed, value first": (3, 20, 12, torch.float32, PACKED | FLAGS | {"state_v_first": True}),
    "bounded": (2, 7, 70, torch.float32, FLAGS | {"lower_bound": -5.0, "allow_neg_eigval": True}),
    "bfloat16": (2, 16, 32, torch.bfloat16, PACKED),
    "float16": (1, 16, 16, torch.float16, FLAGS),
}


def drawn(draw, draw_state, HV, K, V, dtype, keywords):
    """Return leaves by name, and the gradients of o and of the final state."""
    leaves = dict(zip("qkvg", draw(1, 37, 1, HV, K, V, resets=True), strict=False))
    leaves = {name: x.to(dtype) for name, x in leaves.items()} | {"beta": draw(1, 37, 1, HV, K, V)[4].to(dtype)}
    N, turned = len(keywords["cu_seqlens"]) - 1 if "cu_seqlens" in keywords else 1, keywords.get("state_v_first")
    state = (N, HV, V, K) if turned else (N, HV, K, V)
    leaves["initial_state"] = draw_state(*state)
    if "use_gate_in_kernel" in keywords:
        leaves |= {"g": 4 * draw(1, 37, 1, HV, K, V)[3].to(dtype) + 4, "A_log": torch.zeros(HV)}
    return leaves, (draw_state(1, 37, HV, V, dtype, seed=3), draw_state(*state, seed=5))


def differentiated(leaves, ends, **keywords):
    """Return o, the final state, and the gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    others = {name: x for name, x in leaves.items() if name in ("initial_state", "A_log")}
    tokens = [leaves[name] for name in ("q", "k", "v", "g", "beta")]
    o, S = kda(*tokens, implementation="chunk_triton", output_final_state=True, **others, **keywords)
    ends = [x.to(y.dtype) for x, y in zip(ends, (o, S), strict=True)]
    return o, S, torch.autograd.grad([o, S], list(leaves.values()), ends)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_saved_and_recomputed_gradients_are_the_same_bits(draw, draw_state, launched, case):
    *shape, dtype, keywords = case
    leaves, ends = drawn(draw, draw_state, *shape, dtype, keywords)
    o, S, expected = differentiated(leaves, ends, **keywords)
    launched.clear()
    saved_o, saved_S, found = differentiated(leaves, ends, disable_recompute=True, **keywords)
    assert launched == ["within", "replay", "walk_back", "token_gradients", "parameters"][: 4 + ("A_log" in leaves)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    bound = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for x, y in ((saved_o, o), (saved_S, S)):
        assert (x.double() - y.double()).norm() <= bound * y.double().norm()


def test_a_configuration_saves_as_the_argument_does(draw, draw_state, launched):
    leaves, ends = drawn(draw, draw_state, 2, 16, 48, torch.float32, {})
    o, S, expected = differentiated(leaves, ends, disable_recompute=True)
    tiled = ChunkTritonConfig(saves=True, value_tile=16, intra_warps=1)
    for config in (SAVES, tiled, ChunkTritonConfig(value_tile=32)):
        launched.clear()
        *outputs, found = differentiated(leaves, ends, config=config, disable_recompute=not config.saves)
        assert launched[:2] == ["within", "replay"] and len(launched) == 4
        for x, y in zip((*outputs, *found), (o, S, *expected), strict=True):
            assert (x - y).norm() <= 1e-6 * y.norm()


def test_without_gradients_nothing_is_saved(draw, launched):
    inputs, asked = draw(1, 20, 1, 1, 8, 8), {"implementation": "chunk_triton"}
    assert torch.equal(kda(*inputs, disable_recompute=True, **asked)[0], kda(*inputs, **asked)[0])
    assert launched == ["intra", "walk"] * 2


@pytest.mark.parametrize(
    "fields", [{"chunk_size": 32}, {"segments": 2}, {"recompute": True}, {"chunk_size": 32, "intra_tiles": 2}], ids=str
)
def test_what_a_forward_that_saves_cannot_do_is_refused(draw, fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"{name} must be .* where saves is True, got {fields[name]}"):
        kda(*draw(1, 4, 1, 1, 4, 4), implementation="chunk_triton", config=ChunkTritonConfig(**fields, saves=True))
    with pytest.raises(ValueError, match="chunk_size must be 16 where saves is True, got 32"):
        kda(*draw(1, 4, 1, 1, 4, 4), implementation="chunk_triton", chunk_size=32, disable_recompute=True)


def test_elsewhere_the_argument_changes_nothing(draw):
    inputs = draw(1, 20, 1, 1, 8, 8)
    for name in ("chunk_torch", "recurrent_torch", "recurrent_triton"):
        o, _ = kda(*inputs, implementation=name)
        assert torch.equal(kda(*inputs, implementation=name, disable_recompute=True)[0], o)
    with pytest.raises(TypeError, match="disable_recompute must be"):
        chunk_kda(*inputs, disable_recompute=1.5)


def test_a_training_step_that_saves_compiles_into_one_graph_and_survives_checkpointing(draw):
    def loss(*x):
        return kda(*x, implementation="chunk_triton", config=SAVES)[0].square().sum()

    sets = [[x.requires_grad_() for x in draw(1, 20, 1, 2, 8, 8)] for _ in range(3)]
    loss(*sets[0]).backward()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*sets[1]).backward()
    checkpoint(loss, *sets[2], use_reentrant=False).backward()
    for eager, compiled, again in zip(*sets, strict=True):
        assert torch.equal(eager.grad, compiled.grad) and torch.equal(eager.grad, again.grad)


# a chunk in every slot: what is saved of slots without one is undefined
@pytest.mark.parametrize("bounds", [None, [0, 3, 20]])
def test_opcheck_passes_with_gradients(draw, draw_state, bounds):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N, sizes = 2, (2 if bounds is None else 1, 20)
    tensors = [x.requires_grad_() for x in (*draw(*sizes, 1, 2, 4, 3), torch.zeros(2), torch.zeros(8))]
    state = draw_state(N, 2, 4, 3).requires_grad_()
    numbers = 0.3, None, True, "softplus", "once", False, True, 0, (0,)
    torch.library.opcheck(chunk_triton.op_saving, (*tensors, state, cu_seqlens, None, *numbers))


def test_what_is_saved_is_12_times_q_and_leaves_a_workspace_of_9():
    problem, target = Problem(1, 8192, 1, 64, 64, 128, 128, "bfloat16"), named("sm_90")
    wanted = Wanted(**{name: name in "qkvgbeta" for name in WANTED})

    def times_q(buffers):
        size = sum(torch.Size(shape).numel() * ITEMSIZE[dtype] for dtype, shape in buffers.values())
        return size / (problem.T * problem.H * problem.K * 2)

    forward = saving_plan(problem, saving_tiling(problem, target), target).workspace
    assert times_q({name: forward[name] for name in SAVED}) == pytest.approx(12.39, abs=0.02)
    assert times_q(plan(problem, wanted, target, True).workspace) == pytest.approx(9.0, abs=0.02)
    assert times_q(plan(problem, wanted, target).workspace) == pytest.approx(21.5, abs=0.1)
