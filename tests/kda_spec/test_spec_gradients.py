"""The hand-written adjoint is the derivative: torch autograd of equation 1, differences, and conservation laws."""

import dataclasses

import numpy as np
import pytest
import torch

from kda_spec import (
    Inputs,
    beta_sigmoid,
    beta_sigmoid_backward,
    gradients,
    l2norm,
    l2norm_backward,
    lower_bound_gate,
    lower_bound_gate_backward,
    recurrent,
    softplus_gate,
    softplus_gate_backward,
)

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
SHAPES = {
    "one head": {"T": 17, "H": 1},
    "groups": {"B": 2, "T": 9, "H": 2, "HV": 4, "K": 4, "V": 3},
    "packed": {"T": 21, "H": 1, "HV": 2, "cu_seqlens": (0, 0, 1, 9, 21)},
    "longer than a segment": {"T": 70, "H": 1, "K": 3, "V": 2},
}

torch.set_num_threads(1)


def cotangents(inputs: Inputs, seed=7):
    rng, s = np.random.default_rng(seed), inputs.sizes
    return rng.standard_normal(inputs.v.shape), rng.standard_normal((s.N, s.HV, s.K, s.V))


def loss(inputs: Inputs, do, dS_T) -> float:
    outputs = recurrent(inputs)
    return np.sum(outputs.o * do) + np.sum(outputs.final_state * dS_T)


def equation_one_in_torch(inputs: Inputs, q, k, v, g, beta, S0, do, dS_T):
    """Return L by equation 1 as printed, with K x K transitions, sequence by sequence and head by head."""
    group, total = inputs.sizes.HV // inputs.sizes.H, torch.zeros((), dtype=torch.float64)
    for b, tokens, n in inputs.sequences():
        for h in range(inputs.sizes.HV):
            S = S0[n, h]
            for t in range(tokens.start, tokens.stop):
                k_t, beta_t = k[b, t, h // group], beta[b, t, h]
                erase = torch.eye(len(k_t), dtype=torch.float64) - beta_t * torch.outer(k_t, k_t)
                S = erase @ torch.diag(g[b, t, h].exp()) @ S + beta_t * torch.outer(k_t, v[b, t, h])
                total = total + inputs.resolved_scale * (q[b, t, h // group] @ S) @ do[b, t, h]
            total = total + torch.sum(S * dS_T[n, h])
    return total


def autograd(inputs: Inputs, do, dS_T):
    leaves = [torch.tensor(getattr(inputs, name), requires_grad=True) for name in NAMES]
    equation_one_in_torch(inputs, *leaves, torch.tensor(do), torch.tensor(dS_T)).backward()
    return [x.grad.numpy() for x in leaves]


def slope(function, x: np.ndarray, direction: np.ndarray, h=2e-3) -> float:
    """Return the derivative of function along direction at x, by the central stencil of sixth order."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(w * (function(x + n * h * direction) - function(x - n * h * direction)) for n, w in weights.items()) / h


def matches_slope(function, x, gradient, seed=11) -> bool:
    direction = np.random.default_rng(seed).standard_normal(np.shape(x))
    expected = slope(function, x, direction)
    return abs(np.sum(gradient * direction) - expected) <= 1e-8 * max(np.linalg.norm(gradient), abs(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_autograd_of_equation_one(cases, family, shape):
    inputs = cases.draw(family, seed=5, **SHAPES[shape])
    do, dS_T = cotangents(inputs)
    ours = gradients(inputs, do, dS_T)
    for name, expected in zip(NAMES, autograd(inputs, do, dS_T), strict=True):
        assert cases.relative(getattr(ours, name), expected) < 1e-8, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_differences_of_the_definition(cases, shape, name):
    inputs = cases.draw("strong gates", seed=2, **SHAPES[shape])
    do, dS_T = cotangents(inputs)
    ours = getattr(gradients(inputs, do, dS_T), name)

    def changed(x):
        return loss(dataclasses.replace(inputs, **{name: x}), do, dS_T)

    assert matches_slope(changed, getattr(inputs, name), ours)


def test_gates_of_minus_infinity_have_zero_gradient_and_spare_the_others(cases):
    inputs = cases.draw("reset -inf", B=2, T=30)
    ours = gradients(inputs, *cotangents(inputs))
    assert np.all(ours.g[np.isneginf(inputs.g)] == 0) and np.any(ours.g != 0)
    assert all(np.all(np.isfinite(getattr(ours, name))) for name in NAMES)


def test_gradients_obey_the_conservation_laws(cases):
    inputs = cases.draw("strong gates", B=2, T=150, H=3)
    do, dS_T = cotangents(inputs)
    d, out = gradients(inputs, do, dS_T), recurrent(inputs)

    def dot(x, y):
        return np.sum(x * y, axis=-1)

    q_dq, v_dv, dg = dot(inputs.q, d.q), dot(inputs.v, d.v), np.sum(d.g, axis=-1)
    later = np.concatenate([dg[:, 1:], np.sum(dS_T * out.final_state, axis=(-2, -1))[:, None]], axis=1)
    assert np.allclose(q_dq, dot(out.o, do), rtol=1e-11, atol=1e-11)
    assert np.allclose(dot(inputs.k, d.k), 2 * inputs.beta * d.beta - v_dv, rtol=1e-11, atol=1e-11)
    assert np.allclose(dg - later, q_dq - v_dv, rtol=1e-11, atol=1e-11)
    assert np.allclose(dg[:, 0], np.sum(d.initial_state * inputs.initial_state, axis=(-2, -1)), rtol=1e-11, atol=1e-11)


def test_only_the_state_may_have_a_gradient_and_only_the_output(cases):
    inputs = cases.draw(T=12, cu_seqlens=(0, 5, 12))
    do, dS_T = cotangents(inputs)
    both, of_o, of_S = gradients(inputs, do, dS_T), gradients(inputs, do), gradients(inputs, 0 * do, dS_T)
    for name in NAMES:
        assert cases.relative(getattr(of_o, name) + getattr(of_S, name), getattr(both, name)) < 1e-13


def test_without_tokens_the_state_gradient_passes_through_as_a_copy(cases):
    inputs = cases.draw(B=2, T=0, state=False)
    do, dS_T = cotangents(inputs)
    ours = gradients(inputs, do, dS_T)
    assert np.array_equal(ours.initial_state, dS_T) and not np.shares_memory(ours.initial_state, dS_T)
    assert all(getattr(ours, name).shape == getattr(inputs, name).shape for name in NAMES[:-1])


@pytest.mark.parametrize("name, V, K", [("do", 4, 5), ("dS_T", 3, 4)])
def test_cotangents_of_another_shape_are_named(cases, name, V, K):
    with pytest.raises(ValueError, match=rf"{name} must have shape \(.*\), got"):
        gradients(cases.draw(), np.zeros((1, 19, 2, V)), np.zeros((1, 2, K, 3)))


HV, K = 3, 4
ACTIVATIONS = {
    "softplus": (softplus_gate, softplus_gate_backward),
    "lower bound": (
        lambda x, A_log, dt_bias: lower_bound_gate(x, -5.0, A_log, dt_bias),
        lambda dg, x, A_log, dt_bias: lower_bound_gate_backward(dg, x, -5.0, A_log, dt_bias),
    ),
}
TORCH_GATES = {
    "softplus": lambda x, A, b: -A.exp()[:, None] * torch.nn.functional.softplus(x + b.reshape(HV, K)),
    "lower bound": lambda x, A, b: -5 * torch.sigmoid(A.exp()[:, None] * (x + b.reshape(HV, K))),
}


def raw_parameters(bias_shape=(HV * K,)):
    rng = np.random.default_rng(4)
    return 3 * rng.standard_normal((2, 6, HV, K)), rng.standard_normal(HV), rng.standard_normal(bias_shape)


@pytest.mark.parametrize("bias_shape", [(HV * K,), (HV, K)])
@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_gate_gradients_equal_differences_and_autograd(cases, gate, bias_shape):
    forward, backward = ACTIVATIONS[gate]
    raw = raw_parameters(bias_shape)
    dg = np.random.default_rng(5).standard_normal(raw[0].shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in raw]
    (TORCH_GATES[gate](*leaves) * torch.tensor(dg)).sum().backward()
    for i, (x, gradient) in enumerate(zip(raw, backward(dg, *raw), strict=True)):

        def part(y, i=i):
            return np.sum(dg * forward(*raw[:i], y, *raw[i + 1 :]))

        assert gradient.shape == x.shape and matches_slope(part, x, gradient)
        assert cases.relative(gradient, leaves[i].grad.numpy()) < 1e-8


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_raw_gate_parameters_get_the_gradient_of_the_whole_op(cases, gate):
    forward, backward = ACTIVATIONS[gate]
    x, A_log, dt_bias = raw_parameters()
    base = cases.draw(B=2, T=6, H=3, K=K)
    do, dS_T = cotangents(base)

    def with_gate(*raw):
        return dataclasses.replace(base, g=forward(*raw))

    dx, dA_log, ddt_bias = backward(gradients(with_gate(x, A_log, dt_bias), do, dS_T).g, x, A_log, dt_bias)
    assert matches_slope(lambda y: loss(with_gate(y, A_log, dt_bias), do, dS_T), x, dx)
    assert matches_slope(lambda y: loss(with_gate(x, y, dt_bias), do, dS_T), A_log, dA_log)
    assert matches_slope(lambda y: loss(with_gate(x, A_log, y), do, dS_T), dt_bias, ddt_bias)


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_beta_gradient_equals_differences(allow_neg_eigval):
    x, dbeta = np.random.default_rng(6).standard_normal((2, 3, 5))
    ours = beta_sigmoid_backward(dbeta, x, allow_neg_eigval)
    assert matches_slope(lambda y: np.sum(dbeta * beta_sigmoid(y, allow_neg_eigval)), x, ours)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e6])
def test_l2norm_gradient_equals_differences(magnitude):
    x, dy = np.random.default_rng(7).standard_normal((2, 3, 5))
    ours = l2norm_backward(dy, magnitude * x) * magnitude
    assert matches_slope(lambda y: np.sum(dy * l2norm(magnitude * y)), x, ours)


def test_what_was_not_given_has_no_gradient():
    x, A_log, _ = raw_parameters()
    assert softplus_gate_backward(x, x, A_log)[2] is None
    assert lower_bound_gate_backward(x, x, -1.0)[1:] == (None, None)
