"""The gradients of the Triton kernels are those of the definition: any gate, grouped heads, ragged ends."""

import pytest
import torch

pytest.importorskip("triton")

from impls import adjoint_torch, chunk_triton_backward

# B, T, H, HV, K, V: one token, one chunk, ragged ends, grouped heads, channels that no tile has, two tiles of values.
SHAPES = [(1, 1, 1, 1, 3, 2), (1, 16, 1, 1, 16, 16), (2, 19, 1, 2, 20, 5), (1, 33, 2, 2, 7, 70)]
GATES = {"mild": 1.0, "strong": 40.0, "none": 0.0}
BOUND = 1e-6
"""Five times the worst relative error of a gradient that was seen, 1.8e-7."""


def problem(draw, draw_state, B, T, H, HV, K, V, dtype=torch.float32, resets=True):
    inputs, S0 = draw(B, T, H, HV, K, V, dtype, resets=resets), draw_state(B, HV, K, V)
    return inputs, S0, draw_state(B, T, HV, V, dtype, seed=3), draw_state(B, HV, K, V, seed=5)


def exact(inputs, S0, scale, do, dS):
    wide = [None if x is None else x.double() for x in (S0, do, dS)]
    return adjoint_torch.adjoint(*(x.double() for x in inputs), wide[0], None, scale, *wide[1:], ())


def assert_near(found, expected, bound=BOUND):
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all() and (x.double() - y).norm() <= bound * y.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_and_gates_of_minus_infinity_have_none(draw, draw_state, shape):
    inputs, S0, do, dS = problem(draw, draw_state, *shape)
    found = chunk_triton_backward.adjoint(*inputs, S0, 0.3, do, dS)
    assert_near(found, exact(inputs, S0, 0.3, do, dS))
    assert not found[3][inputs[3] == -torch.inf].any()


@pytest.mark.parametrize("factor", GATES.values(), ids=GATES)
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_near_collinear_keys_agree_whatever_the_gate(draw, draw_state, factor, beta):
    (q, k, v, g, _), S0, do, dS = problem(draw, draw_state, 1, 19, 1, 1, 16, 16, resets=False)
    k = torch.nn.functional.normalize(k[:, :1] + 1e-3 * k, dim=-1)
    inputs = q, k, v, factor * g, torch.full(v.shape[:3], beta)
    found = chunk_triton_backward.adjoint(*inputs, S0, 0.3, do, dS)
    assert_near(found, exact(inputs, S0, 0.3, do, dS), max(BOUND, torch.finfo(torch.float32).eps * condition(k, beta)))


def condition(k, beta: float) -> float:
    """Return the condition of I + beta L of the first chunk without decay: what rounding L may cost."""
    rows = k[0, : chunk_triton_backward.CHUNK, 0].double()
    return torch.linalg.cond(torch.eye(len(rows)).double() + beta * torch.tril(rows @ rows.mT, -1)).item()


def test_what_is_not_given_counts_as_zero(draw, draw_state):
    inputs, S0, do, dS = problem(draw, draw_state, 1, 19, 1, 1, 5, 4)
    for given in ((S0, do, None), (S0, None, dS), (None, do, dS)):
        S0_given = torch.zeros_like(S0) if given[0] is None else S0
        found = chunk_triton_backward.adjoint(*inputs, given[0], 0.3, *given[1:])
        for x, y in zip(found, exact(inputs, S0_given, 0.3, *given[1:]), strict=True):
            assert (x.double() - y).norm() <= BOUND * max(y.norm(), 1)


def test_gradients_repeat_bit_for_bit_and_have_the_dtypes_of_the_inputs(draw, draw_state):
    inputs, S0, do, dS = problem(draw, draw_state, 1, 19, 1, 2, 5, 4, torch.bfloat16)
    first, *others = (chunk_triton_backward.adjoint(*inputs, S0, 0.3, do, dS) for _ in range(10))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
    assert [x.dtype for x in first] == [torch.bfloat16] * 5 + [torch.float32]
    assert_near(first, exact(inputs, S0, 0.3, do, dS), torch.finfo(torch.bfloat16).eps)
