"""The recurrence is equation 1: exact on rationals, 13 digits against 50, and the same for every way to call it."""

import dataclasses
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from kda_spec import Inputs, attention, chunkwise, constrained_dplr, general_dplr, kda, recurrent

FORMS = {"recurrent": recurrent, "attention": attention, "chunkwise": lambda inputs: chunkwise(inputs, chunk_size=4)}


def equation_one(q, k, v, alpha, beta, S, scale):
    """Transcribe equation 1 for any number type, with matrices: q, k, alpha [T][K], v [T][V], beta [T], S [K][V]."""
    K, V, o = len(S), len(S[0]), []
    for q_t, k_t, v_t, alpha_t, beta_t in zip(q, k, v, alpha, beta, strict=True):
        erase = [[(c == d) - beta_t * k_t[c] * k_t[d] for d in range(K)] for c in range(K)]
        S = [
            [sum(erase[c][d] * alpha_t[d] * S[d][j] for d in range(K)) + beta_t * k_t[c] * v_t[j] for j in range(V)]
            for c in range(K)
        ]
        o.append([scale * sum(S[c][j] * q_t[c] for c in range(K)) for j in range(V)])
    return o, S


def one_head(inputs: Inputs, number, decay):
    """Return q, k, v, alpha, beta, S of a case with B = H = 1, converted number by number; decay turns g into alpha."""

    def convert(x, function=number):
        return np.vectorize(function, otypes=[object])(x).tolist()

    q, k, v, g, beta = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    return convert(q), convert(k), convert(v), convert(g, decay), convert(beta), convert(inputs.initial_state[0, 0])


def halving(g: float) -> Fraction:
    return {0.0: Fraction(1), -np.inf: Fraction(0)}.get(g, Fraction(1, 2))


def dyadic_inputs(seed: int, reset: bool) -> Inputs:
    """Draw a case of binary fractions: alpha in {1, 1/2} (and 0), beta in {0, 1}, keys of halves, small integers."""
    rng = np.random.default_rng(seed)
    T, K, V = 7, 4, 3
    g = np.log(rng.choice([1.0, 0.5], size=(1, T, 1, K)))
    if reset:
        g[0, 3, 0, :2] = -np.inf
    return Inputs(
        q=rng.integers(-3, 4, size=(1, T, 1, K)),
        k=rng.choice([-0.5, 0.5], size=(1, T, 1, K)),
        v=rng.integers(-3, 4, size=(1, T, 1, V)),
        g=g,
        beta=rng.integers(0, 2, size=(1, T, 1)),
        scale=0.5,
        initial_state=rng.integers(-3, 4, size=(1, 1, K, V)),
    )


@pytest.mark.parametrize("form, reset", [(f, r) for f in FORMS for r in (False, True) if (f, r) != ("chunkwise", True)])
@pytest.mark.parametrize("seed", range(5))
def test_rational_cases_have_zero_error(form, reset, seed):
    inputs = dyadic_inputs(seed, reset)
    o, S = equation_one(*one_head(inputs, Fraction, halving), Fraction(1, 2))
    outputs = FORMS[form](inputs)
    assert [[Fraction(x) for x in row] for row in outputs.o[0, :, 0]] == o
    assert [[Fraction(x) for x in row] for row in outputs.final_state[0, 0]] == S


@pytest.mark.parametrize("seed", range(3))
def test_fifty_digits_agree_to_thirteen(cases, family, seed):
    inputs = cases.draw(family, seed=seed, T=12, H=1, K=4, V=3)
    with mpmath.workdps(50):
        o, S = equation_one(*one_head(inputs, mpmath.mpf, lambda g: mpmath.exp(mpmath.mpf(g))), mpmath.mpf("0.5"))
    outputs = recurrent(inputs)
    assert cases.relative(outputs.o[0, :, 0], np.array(o, np.float64)) < 1e-13
    assert cases.relative(outputs.final_state[0, 0], np.array(S, np.float64)) < 1e-13


def test_leading_axes_of_any_number_are_separate_runs(cases):
    rng = np.random.default_rng(3)
    lead, T, K, V = (2, 1, 3), 9, 4, 5
    q, k, g = rng.standard_normal((3, *lead, T, K))
    v, beta, S0 = rng.standard_normal((*lead, T, V)), rng.random((*lead, T)), rng.standard_normal((*lead, K, V))
    g = -np.abs(g)
    o, S = kda(q, k, v, g, beta, S0)
    for index in np.ndindex(lead):
        one_o, one_S = kda(q[index], k[index], v[index], g[index], beta[index], S0[index])
        assert cases.relative(o[index], one_o) < 1e-14 and cases.relative(S[index], one_S) < 1e-14


def test_kda_is_constrained_dplr(cases, family):
    q, k, v, g, beta = cases.draw(family, B=2, T=30).heads_first(slice(0, 2), slice(0, 30))
    S0 = np.random.default_rng(1).standard_normal((2, 2, 5, 3))
    for ours, theirs in zip(kda(q, k, v, g, beta, S0), constrained_dplr(q, k, v, g, beta, S0), strict=True):
        assert cases.relative(ours, theirs) < 1e-13


def test_general_dplr_follows_its_equation():
    rng = np.random.default_rng(2)
    q, k, a, b = 0.5 * rng.standard_normal((4, 6, 4))
    v, g, S = rng.standard_normal((6, 3)), -rng.random((6, 4)), rng.standard_normal((4, 3))
    o, S_T = general_dplr(q, k, v, a, b, g, S, scale=0.3)
    for t in range(6):
        S = (np.diag(np.exp(g[t])) - np.outer(a[t], b[t])) @ S + np.outer(k[t], v[t])
        assert np.allclose(o[t], 0.3 * S.T @ q[t], rtol=1e-13, atol=1e-13)
    assert np.allclose(S_T, S, rtol=1e-13, atol=1e-13)


def test_scale_defaults_to_the_inverse_root_of_K(cases):
    given, default = (recurrent(cases.draw(K=16, scale=scale)).o for scale in (0.25, None))
    assert np.array_equal(given, default)


def test_value_heads_read_the_query_head_of_their_group(cases):
    inputs = cases.draw(H=2, HV=6)
    repeated = dataclasses.replace(inputs, q=np.repeat(inputs.q, 3, axis=2), k=np.repeat(inputs.k, 3, axis=2))
    assert np.array_equal(recurrent(inputs).o, recurrent(repeated).o)


def test_packed_sequences_are_separate_runs(cases):
    inputs = cases.draw("per-head gates", T=20, H=1, HV=2, cu_seqlens=(0, 0, 7, 8, 8, 20))
    outputs = recurrent(inputs)
    for _, tokens, n in inputs.sequences():
        rows = {name: getattr(inputs, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}
        alone = recurrent(Inputs(**rows, initial_state=inputs.initial_state[n : n + 1]))
        assert np.array_equal(outputs.o[:, tokens], alone.o)
        assert np.array_equal(outputs.final_state[n], alone.final_state[0])


@pytest.mark.parametrize("form", FORMS)
def test_no_token_passes_the_state_through_as_a_copy(cases, form):
    inputs = cases.draw(B=2, T=0)
    outputs = FORMS[form](inputs)
    assert outputs.o.shape == (2, 0, 2, 3)
    assert np.array_equal(outputs.final_state, inputs.initial_state)
    assert not np.shares_memory(outputs.final_state, inputs.initial_state)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_as_they_are(cases, form):
    inputs, untouched = cases.draw(B=2), cases.draw(B=2)
    FORMS[form](inputs)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        assert np.array_equal(getattr(inputs, name), getattr(untouched, name))


@pytest.mark.parametrize("form", ["recurrent", "attention"])
def test_a_reset_forgets_everything_before_it(cases, form):
    inputs, t = cases.draw(T=12), 5
    inputs.g[:, t] = -np.inf
    rows = {name: getattr(inputs, name)[:, t:] for name in ("q", "k", "v", "g", "beta")}
    whole, fresh = FORMS[form](inputs), FORMS[form](Inputs(**rows))
    assert np.all(np.isfinite(whole.o)) and cases.relative(whole.o[:, t:], fresh.o) < 1e-14
    assert cases.relative(whole.final_state, fresh.final_state) < 1e-14


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: kda(x, x[:, :2], x, x, x[:, 0]), r"k must have shape \[..., T, K\] = \(3, 4\), got \(3, 2\)"),
        (lambda x: kda(x, x, x[:2], x, x[:, 0]), r"v must have shape \[..., T, V\] = \(3, 'V'\), got \(2, 4\)"),
        (lambda x: kda(x, x, x, x, x), r"beta must have shape \(3,\), got \(3, 4\)"),
        (lambda x: kda(x, x, x, x, x[:, 0], x), r"S0 must have shape \[..., K, V\] = \(4, 4\), got \(3, 4\)"),
        (lambda x: general_dplr(x, x, x, x, x[:2], x), r"b must have shape \[..., T, K\] = \(3, 4\), got \(2, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((3, 4)))
