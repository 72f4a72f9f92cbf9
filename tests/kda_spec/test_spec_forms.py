"""Three forms written independently agree; the paper's literal equation 12 and Listing 8b are other functions."""

import dataclasses

import numpy as np
import pytest

from kda_spec import attention, chunkwise, recurrent
from kda_spec.chunkwise import SPAN_LIMIT

SHAPES = {
    "one head": {"T": 37, "H": 1},
    "groups": {"B": 2, "T": 33, "H": 2, "HV": 4, "K": 7, "V": 4},
    "packed": {"T": 41, "H": 1, "HV": 2, "cu_seqlens": (0, 1, 1, 17, 41)},
    "no state": {"T": 64, "state": False},
    "K = V = 1": {"T": 9, "H": 1, "K": 1, "V": 1},
    "scaled": {"T": 5, "scale": -3.0, "K": 8, "V": 8},
}


def agrees(cases, actual, expected) -> bool:
    return (
        cases.relative(actual.o, expected.o) < 1e-12
        and cases.relative(actual.final_state, expected.final_state) < 1e-12
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_form_agrees(cases, family, shape):
    inputs = cases.draw(family, seed=len(shape), **SHAPES[shape])
    assert agrees(cases, attention(inputs), recurrent(inputs))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunkwise_form_agrees_where_it_is_defined(cases, family, shape, chunk_size):
    inputs = cases.draw(family, seed=len(shape), **SHAPES[shape])
    if inputs.g.min() < -SPAN_LIMIT:
        with pytest.raises(ValueError, match="g must be finite and add up to at least -600 per channel within a chunk"):
            chunkwise(inputs, chunk_size)
    else:
        assert agrees(cases, chunkwise(inputs, chunk_size), recurrent(inputs))


@pytest.mark.parametrize("span, chunk_size", [(599.9, 32), (599.9, 8), (1190.0, 16)])
def test_chunkwise_form_holds_up_to_its_limit(cases, span, chunk_size):
    inputs = cases.draw(T=32, K=4)
    inputs.g[...] = -span / 32
    inputs.g[..., 1] = -1e-3
    assert agrees(cases, chunkwise(inputs, chunk_size), recurrent(inputs))


def test_chunkwise_form_refuses_gates_that_add_up_to_more_than_its_limit(cases):
    inputs = cases.draw(T=32)
    inputs.g[...] = -20.0
    with pytest.raises(ValueError, match="got -640 in a chunk of 32 tokens"):
        chunkwise(inputs, 32)
    assert agrees(cases, chunkwise(inputs, 16), recurrent(inputs))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_must_be_positive(cases, chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        chunkwise(cases.draw(), chunk_size)


def equation_twelve(q, k, v, alpha, beta, scale, literal: bool):
    """Transcribe equation 12 for one head, product by product; literally: decay after erase and no beta_i."""
    T, K = q.shape
    o = np.zeros_like(v)
    for t in range(T):
        for i in range(t + 1):
            product = np.eye(K)
            for j in range(i + 1, t + 1):
                erase, decay = np.eye(K) - beta[j] * np.outer(k[j], k[j]), np.diag(alpha[j])
                product = (decay @ erase if literal else erase @ decay) @ product
            o[t] += scale * (q[t] @ product @ k[i]) * (1.0 if literal else beta[i]) * v[i]
    return o


@pytest.mark.parametrize("literal", [False, True])
def test_equation_twelve_needs_equation_one_s_order_and_beta(cases, literal):
    inputs = cases.draw(T=8, H=1, state=False)
    q, k, v, g, beta = (x[0, 0] for x in inputs.heads_first(slice(0, 1), slice(0, 8)))
    o = equation_twelve(q, k, v, np.exp(g), beta, inputs.resolved_scale, literal)
    assert (cases.relative(o, attention(inputs).o[0, :, 0]) < 1e-13) is not literal


def test_equation_twelve_s_order_matters_even_with_beta_one(cases):
    inputs = dataclasses.replace(cases.draw(T=8, H=1, state=False), beta=np.ones((1, 8, 1)))
    q, k, v, g, beta = (x[0, 0] for x in inputs.heads_first(slice(0, 1), slice(0, 8)))
    o = equation_twelve(q, k, v, np.exp(g), beta, inputs.resolved_scale, literal=True)
    assert cases.relative(o, attention(inputs).o[0, :, 0]) > 1e-2


def listing_8b(q, k, v, g, S, beta=None, write_pseudo_value=False):
    """Transcribe Listing 8b for one chunk of one head, line numbers in brackets; the two keywords repair it."""
    C = len(q)
    beta = np.ones(C) if beta is None else beta
    gc = np.cumsum(g, axis=0)  # [5]
    decay = np.exp(np.minimum(gc[:, None] - gc[None], 0))  # [11, 12]
    Aqk = np.tril(np.einsum("ik,jk,ijk->ij", q, k, decay))  # [14]
    Akk = np.tril(beta[:, None] * np.einsum("ik,jk,ijk->ij", k, k, decay), -1)  # [15]
    A = -Akk  # [17]
    for i in range(1, C):  # [18, 19]
        A[i, :i] = A[i, :i] + A[i] @ A[:, :i]
    A = (A + np.eye(C)) * beta  # [20]
    w, u = A @ (np.exp(gc) * k), A @ v  # [21]
    pseudo_value = u - w @ S
    o = (q * np.exp(gc)) @ S + Aqk @ pseudo_value  # [26]
    written = pseudo_value if write_pseudo_value else v
    return o, np.exp(gc[-1])[:, None] * S + (k * np.exp(gc[-1] - gc)).T @ written  # [28, 29]


@pytest.mark.parametrize(
    "with_beta, write_pseudo_value, o_holds, state_holds",
    [(False, False, False, False), (True, False, True, False), (False, True, False, False), (True, True, True, True)],
)
def test_listing_8b_needs_beta_and_the_pseudo_value(cases, with_beta, write_pseudo_value, o_holds, state_holds):
    inputs = cases.draw(T=16, H=1, scale=1.0)
    q, k, v, g, beta = (x[0, 0] for x in inputs.heads_first(slice(0, 1), slice(0, 16)))
    o, S = listing_8b(q, k, v, g, inputs.initial_state[0, 0], beta if with_beta else None, write_pseudo_value)
    expected = recurrent(inputs)
    assert (cases.relative(o, expected.o[0, :, 0]) < 1e-12) is o_holds
    assert (cases.relative(S, expected.final_state[0, 0]) < 1e-12) is state_holds


def test_listing_8b_differs_even_where_beta_is_one(cases):
    inputs = dataclasses.replace(cases.draw(T=16, H=1, scale=1.0), beta=np.ones((1, 16, 1)))
    q, k, v, g, _ = (x[0, 0] for x in inputs.heads_first(slice(0, 1), slice(0, 16)))
    o, S = listing_8b(q, k, v, g, inputs.initial_state[0, 0])
    assert cases.relative(o, recurrent(inputs).o[0, :, 0]) < 1e-12
    assert cases.relative(S, recurrent(inputs).final_state[0, 0]) > 1e-2
