"""Every member of Tables 6 and 7 is general DPLR and its rule a step on its objective; printed slips are shown."""

import dataclasses

import numpy as np
import pytest

from kda_spec import FAMILY, Parameters, Step, kda
from kda_spec.family import COMBA, DELTANET, GDN, GLA, HGRN2, KDA, LONGHORN, RWKV7, Member, run

T, K, V = 6, 5, 3
SHARED_GATE = {"RetNet", "Mamba2", "Comba", "GDN"}


def draw(member: Member, seed=0) -> Parameters:
    """Draw T tokens; one gate for all channels where the member has one, the same for all tokens in RetNet."""
    rng = np.random.default_rng(seed)
    g = -rng.random((T, 1 if member.name in SHARED_GATE else K))
    everything = {
        "v": rng.standard_normal((T, V)),
        "k": 0.6 * rng.standard_normal((T, K)),
        "g": np.repeat(g[:1], T, axis=0) if member.name == "RetNet" else g,
        "beta": rng.random(T),
        "feedback": rng.random(T),
        "k_hat": 0.6 * rng.standard_normal((T, K)),
        "rate": 0.1 + rng.random((T, K)),
    }
    return Parameters(**{name: x for name, x in everything.items() if name in member.uses})


def token(p: Parameters, t: int) -> Parameters:
    given = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    return Parameters(**{name: x[t] for name, x in given.items() if x is not None})


def numerical_gradient(objective, S, p: Parameters, h=1e-3):
    """Return the gradient at S by central differences, exact but for rounding: the objectives are quadratic."""
    gradient = np.empty_like(S)
    for index in np.ndindex(S.shape):
        step = np.zeros_like(S)
        step[index] = h
        gradient[index] = (objective(S + step, p) - objective(S - step, p)) / (2 * h)
    return gradient


def minimiser(objective, S, p: Parameters):
    """Return argmin_X 1/2 ||X - S||^2 + objective(X), by one Newton step with a numerical Hessian (it is quadratic)."""
    H = np.stack([numerical_gradient(objective, e.reshape(S.shape), p).ravel() for e in np.eye(S.size)], axis=1)
    at_zero = numerical_gradient(objective, np.zeros_like(S), p).ravel()
    return np.linalg.solve(np.eye(S.size) + H - at_zero[:, None], S.ravel() - at_zero).reshape(S.shape)


STEPS = {
    Step.GRADIENT: lambda L, S, p: S - numerical_gradient(L, S, p),
    Step.DECAYED: lambda L, S, p: p.alpha[:, None] * S - numerical_gradient(L, p.alpha[:, None] * S, p),
    Step.IMPLICIT: minimiser,
    Step.SCALED: lambda L, S, p: S - p.rate[:, None] * numerical_gradient(L, S, p),
}


def state(seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, V))


def test_the_family_has_the_members_of_both_tables():
    names = " ".join(member.name for member in FAMILY)
    assert names == "LA RetNet Mamba2 GLA HGRN2 Longhorn Comba RWKV7 DeltaNet GDN KDA"


@pytest.mark.parametrize("member", FAMILY, ids=lambda m: m.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_rule_is_a_step_on_the_objective(member, seed):
    p, S = token(draw(member, seed), 0), state(seed)
    assert np.allclose(STEPS[member.step](member.objective, S, p), member.rule(S, p), rtol=0, atol=1e-9)


@pytest.mark.parametrize("member", FAMILY, ids=lambda m: m.name)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_every_member_is_general_dplr(cases, member, lead):
    p, S = draw(member), state()
    q = np.random.default_rng(9).standard_normal((T, K))
    o_rule, S_rule = [], S
    for t in range(T):
        S_rule = member.rule(S_rule, token(p, t))
        o_rule.append(0.5 * S_rule.T @ q[t])
    given = {name: getattr(p, name) for name in member.uses}
    stacked = Parameters(**{name: np.broadcast_to(x, (*lead, *x.shape)) for name, x in given.items()})
    o, S_T = run(member, np.broadcast_to(q, (*lead, T, K)), stacked, np.broadcast_to(S, (*lead, K, V)), 0.5)
    assert np.allclose(o, o_rule, rtol=0, atol=1e-13) and np.allclose(S_T, S_rule, rtol=0, atol=1e-13)


@pytest.mark.parametrize("member", [DELTANET, GDN, KDA], ids=lambda m: m.name)
def test_delta_members_are_kda_with_other_gates(cases, member):
    p, q = draw(member), np.random.default_rng(9).standard_normal((T, K))
    g = np.zeros((T, K)) + (0 if p.g is None else p.g)
    for ours, theirs in zip(run(member, q, p, state()), kda(q, p.k, p.v, g, p.beta, state()), strict=True):
        assert cases.relative(ours, theirs) < 1e-13


def test_hgrn2_is_gla_with_the_forgotten_share_as_key():
    p, q = draw(GLA), np.random.default_rng(9).standard_normal((T, K))
    tied = dataclasses.replace(p, k=1 - p.alpha)
    assert np.array_equal(run(HGRN2, q, p)[0], run(GLA, q, tied)[0])


def test_longhorn_s_printed_rule_is_neither_the_gradient_nor_the_implicit_step():
    p, S = token(draw(LONGHORN), 0), state()
    rate = p.beta / (1 + p.beta * p.k @ p.k)
    printed = S - rate * np.outer(p.k, p.k @ S) + p.beta * np.outer(p.k, p.v)
    explicit = S - numerical_gradient(LONGHORN.objective, S, p)
    assert np.abs(printed - LONGHORN.rule(S, p)).max() > 1e-2
    assert np.abs(printed - explicit).max() > 1e-2
    assert np.abs(explicit - LONGHORN.rule(S, p)).max() > 1e-2


def comba_printed_objective(S, p):
    return p.beta / 2 * np.sum((S.T @ p.k - p.v) ** 2) + 0.5 * np.sum((1 - p.alpha) * S**2)


@pytest.mark.parametrize("feedback, holds", [(1.0, True), (0.5, False)])
def test_comba_s_printed_objective_gives_its_rule_without_feedback_only(feedback, holds):
    p, S = dataclasses.replace(token(draw(COMBA), 0), feedback=feedback), state()
    gap = np.abs(S - numerical_gradient(comba_printed_objective, S, p) - COMBA.rule(S, p)).max()
    assert bool(gap < 1e-9) is holds


def rwkv7_printed_objective(S, p):
    return 0.5 * np.sum((S.T @ p.k_hat - p.v) ** 2) + 0.5 * np.sum((1 - p.alpha)[:, None] * S**2)


@pytest.mark.parametrize("one_key, holds", [(True, True), (False, False)])
def test_rwkv7_s_printed_objective_gives_its_rule_for_one_key_and_rate_one_only(one_key, holds):
    p, S = token(draw(RWKV7), 0), state()
    if one_key:
        p = dataclasses.replace(p, k=p.k_hat, rate=np.ones(K))
    gap = np.abs(S - numerical_gradient(rwkv7_printed_objective, S, p) - RWKV7.rule(S, p)).max()
    assert bool(gap < 1e-9) is holds


def test_rwkv7_s_erase_is_no_plain_gradient():
    p = token(draw(RWKV7), 0)
    erase = np.outer(p.rate * p.k_hat, p.k_hat)
    assert np.abs(erase - erase.T).max() > 1e-2
