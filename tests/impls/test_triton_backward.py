"""The Triton backward finds the gradients of the definition: any gate, layout and packing, only what is wanted."""

import pytest
import torch

pytest.importorskip("triton")

from impls import chunk_triton, kda
from impls.chunk_triton_backward import CHUNK, plan
from impls.plan import WANTED, Problem, Wanted
from impls.targets import named

BOUND = 1e-6
"""Twice the worst relative error of a gradient that was seen in float32."""
INPUTS = ("q", "k", "v", "g", "beta")
ALL = ["within", "replay", "walk_back", "token_gradients", "parameters"]
SOFTPLUS = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
BOUNDED = SOFTPLUS | {"lower_bound": -5.0, "allow_neg_eigval": True}
PACKED = {"cu_seqlens": torch.tensor([0, 0, 17, 18, 18, 37])}


def drawn(draw, draw_state, B, T, H, HV, K, V, dtype=torch.float32, raw=False, resets=True, **keywords):
    """Return leaves by name (q to beta, initial_state, where raw A_log and dt_bias), and do and dS."""
    q, k, v, g, beta = draw(B, T, H, HV, K, V, resets=resets and not raw)
    if raw:
        q, k, g, beta = 2 * q, 3 * k, 4 * (g + 1), 6 * (beta - 0.5)
    leaves = {name: x.to(dtype) for name, x in {"q": q, "k": k, "v": v, "g": g, "beta": beta}.items()}
    N = len(keywords["cu_seqlens"]) - 1 if "cu_seqlens" in keywords else B
    state = (N, HV, V, K) if keywords.get("state_v_first") else (N, HV, K, V)
    leaves["initial_state"] = draw_state(*state)
    if raw:
        leaves |= {"A_log": 0.3 * draw_state(1, 1, 1, HV).flatten(), "dt_bias": draw_state(1, 1, HV, K).flatten() / 2}
    return leaves, (draw_state(B, T, HV, V, dtype, seed=3), draw_state(*state, seed=5))


def gradients(leaves, starts, name="chunk_triton", wanted=None, **keywords):
    """Return by name the gradients of <do, o> + <dS, S> for the wanted leaves; do and dS may be None, for zero."""
    leaves = {x: y.detach().clone().requires_grad_(wanted is None or x in wanted) for x, y in leaves.items()}
    inputs, others = [leaves[x] for x in INPUTS], {x: leaves[x] for x in leaves if len(x) > 4}
    o, S = kda(*inputs, implementation=name, output_final_state=True, **others, **keywords)
    given = [(x, start.to(x.dtype)) for x, start in zip((o, S), starts, strict=True) if start is not None]
    asked = {x: y for x, y in leaves.items() if y.requires_grad}
    outputs, ends = zip(*given, strict=True)
    return dict(zip(asked, torch.autograd.grad(outputs, list(asked.values()), ends), strict=True))


def exact(leaves, starts, **keywords):
    wide = {x: y.double() for x, y in leaves.items()}
    return gradients(wide, [x if x is None else x.double() for x in starts], "chunk_torch", **keywords)


def assert_near(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.isfinite().all(), name
        assert (x.double() - expected[name]).norm() <= bound * expected[name].norm(), name


# B, T, H, HV, K, V: one token, one chunk, ragged ends, grouped heads, channels that no tile has, tiles, the most.
SHAPES = [(1, 1, 1, 1, 1, 1), (1, 16, 1, 1, 16, 16), (2, 19, 1, 2, 20, 5), (1, 33, 2, 2, 7, 70)]
SHAPES += [(1, 17, 1, 1, 256, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_and_gates_of_minus_infinity_have_none(draw, draw_state, shape):
    leaves, starts = drawn(draw, draw_state, *shape)
    found = gradients(leaves, starts, scale=0.3)
    assert_near(found, exact(leaves, starts, scale=0.3))
    assert not found["g"][leaves["g"] == -torch.inf].any()


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("packing", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("flags", [SOFTPLUS, BOUNDED], ids=["softplus", "bounded"])
def test_gradients_of_raw_inputs_agree(draw, draw_state, flags, packing, v_first):
    keywords = flags | packing | {"state_v_first": v_first}
    leaves, starts = drawn(draw, draw_state, 1, 37, 1, 3, 20, 12, raw=True, **keywords)
    assert_near(gradients(leaves, starts, **keywords), exact(leaves, starts, **keywords))


def test_raw_gates_at_their_extremes_have_finite_gradients(draw, draw_state):
    for flags in (SOFTPLUS, BOUNDED):
        leaves, starts = drawn(draw, draw_state, 1, 20, 1, 2, 4, 4, raw=True)
        leaves["q"][:, 3], leaves["k"][:, 4], leaves["g"][:, 5], leaves["g"][:, 6] = 0, 0, 3e38, -3e38
        leaves["beta"][:, 7], leaves["beta"][:, 8], leaves["A_log"][0] = 1e30, -1e30, 3.0
        assert all(x.isfinite().all() for x in gradients(leaves, starts, **flags).values())


@pytest.mark.parametrize("factor", [0.0, 1.0, 40.0], ids=["no gate", "mild gates", "strong gates"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_near_collinear_keys_agree_whatever_the_gate(draw, draw_state, factor, beta):
    leaves, starts = drawn(draw, draw_state, 1, 19, 1, 1, 16, 16, resets=False)
    leaves["k"] = torch.nn.functional.normalize(leaves["k"][:, :1] + 1e-3 * leaves["k"], dim=-1)
    leaves |= {"g": factor * leaves["g"], "beta": torch.full_like(leaves["beta"], beta)}
    bound = max(BOUND, torch.finfo(torch.float32).eps * condition(leaves["k"], beta))
    assert_near(gradients(leaves, starts), exact(leaves, starts), bound)


def condition(k, beta: float) -> float:
    """Return the condition of I + beta L of the first chunk without decay: what rounding L may cost."""
    rows = k[0, :CHUNK, 0].double()
    return torch.linalg.cond(torch.eye(len(rows)).double() + beta * torch.tril(rows @ rows.mT, -1)).item()


@pytest.mark.parametrize("missing", [0, 1], ids=["dS only", "do only"])
def test_an_output_without_a_gradient_counts_as_zero(draw, draw_state, missing):
    leaves, starts = drawn(draw, draw_state, 1, 37, 1, 2, 5, 4, **PACKED)
    given = [None if i == missing else x for i, x in enumerate(starts)]
    found, zeros = (gradients(leaves, x, **PACKED) for x in (given, [torch.zeros_like(starts[0]), given[1]]))
    expected = exact(leaves, given, **PACKED)
    assert not found["q"].any() if missing == 0 else found["q"].any()
    assert_near(found, expected)
    if missing == 0:
        assert all(torch.equal(x, y) for x, y in zip(found.values(), zeros.values(), strict=True))
    no_state = {x: y for x, y in leaves.items() if x != "initial_state"}
    assert gradients(no_state, given, **PACKED).keys() == expected.keys() - {"initial_state"}


WALKED = ["within", "replay", "walk_back", "token_gradients"]
NEEDED = dict.fromkeys(("v", "initial_state"), ["within", "walk_back"]) | {"q": ["within", "replay", "token_gradients"]}
NEEDED |= dict.fromkeys(("k", "g", "beta"), WALKED) | dict.fromkeys(("A_log", "dt_bias"), ALL)


@pytest.mark.parametrize("name", NEEDED)
def test_one_gradient_takes_only_the_launches_it_needs_and_has_the_bits_of_all(draw, draw_state, launched, name):
    leaves, starts = drawn(draw, draw_state, 1, 20, 1, 2, 5, 4, raw=True)
    whole = gradients(leaves, starts, **SOFTPLUS)
    assert launched[2:] == ALL
    launched.clear()
    found = gradients(leaves, starts, wanted=[name], **SOFTPLUS)
    assert launched[2:] == NEEDED[name]
    assert found.keys() == {name} and torch.equal(found[name], whole[name])


def test_what_is_not_wanted_is_not_kept():
    problem = Problem(1, 64, 1, 2, 2, 32, 32, "bfloat16", A_log=True, dt_bias=True, gate="softplus")

    def kept(**wanted):
        asked = Wanted(*(x in wanted for x in WANTED), do=wanted.get("do", True))
        return set(plan(problem, asked, named("sm_90")).workspace)

    everything = kept(**dict.fromkeys(WANTED, True))
    assert everything - kept(q=1) == {"adjoints", "solved", "of_A_log", "of_dt_bias"}
    assert everything - kept(beta=1) == {"states", "adjoints", "of_A_log", "of_dt_bias"}
    walked = {"X", "k_before", "k_after", "last", "strength"}
    assert kept(v=1) == walked | {"A", "q_before"} and kept(v=1, do=False) == walked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_repeat_bit_for_bit_and_have_the_dtypes_of_the_inputs(draw, draw_state, dtype):
    leaves, starts = drawn(draw, draw_state, 1, 20, 1, 2, 5, 4, dtype, raw=True)
    leaves |= {"g": leaves["g"].float(), "initial_state": leaves["initial_state"].bfloat16()}
    first, *others = (gradients(leaves, starts, **SOFTPLUS) for _ in range(10))
    assert all(torch.equal(first[x], other[x]) for other in others for x in first)
    assert [x.dtype for x in first.values()] == [x.dtype for x in leaves.values()]
    narrow = BOUND if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_near(first, exact(leaves, starts, **SOFTPLUS), max(narrow, torch.finfo(torch.bfloat16).eps))


def test_gradients_of_states_beyond_what_float16_holds_stay_finite(draw, draw_state):
    leaves, (do, dS) = drawn(draw, draw_state, 1, 37, 1, 1, 16, 16, torch.float16, resets=False)
    leaves["g"] *= 0.01
    expected = exact(leaves, (3e3 * do, 1e6 * dS), scale=1.0)
    found = gradients(leaves, (3e3 * do, 1e6 * dS), scale=1.0)
    for name in ("initial_state", "v"):
        small = expected[name].abs() < torch.finfo(leaves[name].dtype).max
        assert found[name][small].isfinite().all()
    error = (found["initial_state"].double() - expected["initial_state"]).norm()
    assert expected["initial_state"].abs().max() > 65504 and error <= 1e-2 * expected["initial_state"].norm()


def test_packed_sequences_have_the_gradients_that_they_have_alone_whatever_their_neighbours_hold(draw, draw_state):
    bounds = PACKED["cu_seqlens"].tolist()
    leaves, (do, dS) = drawn(draw, draw_state, 1, 37, 1, 3, 16, 17, **PACKED)
    for x in (*(leaves[name] for name in INPUTS), do):
        x[:, 17] = torch.nan
    leaves["initial_state"][2], dS[2] = torch.nan, torch.nan
    found = gradients(leaves, (do, dS), **PACKED)
    for n, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = {x: y[n : n + 1] if x == "initial_state" else y[:, first:last] for x, y in leaves.items()}
        alone = gradients(own, (do[:, first:last], dS[n : n + 1]))
        for name, x in alone.items():
            mine = found[name][n : n + 1] if name == "initial_state" else found[name][:, first:last]
            assert mine.isnan().all() if n == 2 else torch.equal(mine, x)


MODES = [
    (None, "none", "none", False, False),
    (None, "softplus", "once", True, True),
    ([0, 0, 3, 20], "bounded", "twice", True, True),
    ([0, 3, 20], "none", "once", False, True),
]


@pytest.mark.parametrize("bounds, gate, sigmoid, v_first, final", MODES)
def test_opcheck_passes_with_gradients(draw, draw_state, bounds, gate, sigmoid, v_first, final):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N, sizes = (2, (2, 20)) if bounds is None else (len(bounds) - 1, (1, 20))
    state = draw_state(N, 2, 3, 4) if v_first else draw_state(N, 2, 4, 3)
    parameters = (None, None) if gate == "none" else (torch.zeros(2), torch.zeros(8))
    tensors = [None if x is None else x.requires_grad_() for x in (*draw(*sizes, 1, 2, 4, 3), *parameters, state)]
    numbers = 0.3, -5.0 if gate == "bounded" else None, True, gate, sigmoid, v_first, final, 0, (0,)
    torch.library.opcheck(chunk_triton.op_trained, (*tensors, cu_seqlens, None, *numbers))
