"""Layers of Kimi Linear: their forms agree, their states carry on where they stopped, ties are settled by a rule."""

from dataclasses import replace

import numpy as np
import pytest

from kda_spec import (
    KdaSettings,
    KdaState,
    MlaSettings,
    MlaState,
    MoeSettings,
    attend_absorbed,
    attend_expanded,
    constrained_dplr,
    kda,
    kda_layer,
    lower_bound_gate,
    moe_layer,
    route,
    short_convolution,
)
from kda_spec.layers import forget_gate, output_gate, silu, write_strength

KDA = KdaSettings(heads=2, head_dim=4, taps=4)
KDA_FORMS = {
    "Kimi Linear": KDA,
    "Kimi K3": replace(KDA, lower_bound=-5.0, full_rank_gate=True),
    "Ling 3.0": replace(KDA, lower_bound=-5.0, full_rank_gate=True, full_rank_decay=True),
    "GLM 5.3": replace(KDA, lower_bound=-5.0),
    "two-sided": replace(KDA, allow_neg_eigval=True),
    "Gated DeltaNet": replace(KDA, decay_per_head=True),
}
D = 6


def kda_tensors(settings: KdaSettings, rng) -> dict[str, np.ndarray]:
    H, K, HK = settings.heads, settings.head_dim, settings.heads * settings.head_dim
    shapes = {f"{name}_proj.weight": (HK, D) for name in "qkvfg"}
    shapes |= {"f_a_proj.weight": (K, D), "f_b_proj.weight": (HK, K), "g_a_proj.weight": (K, D)}
    shapes |= {"g_b_proj.weight": (HK, K), "b_proj.weight": (H, D), "o_norm.weight": (K,), "o_proj.weight": (D, HK)}
    shapes |= {f"{name}_conv1d.weight": (HK, 1, settings.taps) for name in "qkv"}
    shapes |= {"A_log": (H,), "dt_bias": (settings.decays,)}
    if settings.decay_per_head:
        shapes["f_proj.weight"] = (H, D)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def kda_state(settings: KdaSettings, rng, B=2) -> KdaState:
    HK = settings.heads * settings.head_dim
    tails = (rng.standard_normal((B, settings.taps - 1, HK)) for _ in "qkv")
    return KdaState(*tails, rng.standard_normal((B, settings.heads, settings.head_dim, settings.head_dim)))


def same(state: KdaState, other: KdaState, tolerance=1e-13) -> bool:
    pairs = ((getattr(state, name), getattr(other, name)) for name in ("q", "k", "v", "S"))
    return all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("settings", KDA_FORMS.values(), ids=KDA_FORMS)
def test_a_kda_layer_goes_on_where_it_stopped(settings, rng):
    w, state, x = kda_tensors(settings, rng), kda_state(settings, rng), rng.standard_normal((2, 9, D))
    whole, end = kda_layer(x, w, settings, state)
    parts = []
    for token in np.split(x, 9, axis=1):
        y, state = kda_layer(token, w, settings, state)
        parts.append(y)
    assert np.allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-13)
    assert same(state, end)


@pytest.mark.parametrize("settings", KDA_FORMS.values(), ids=KDA_FORMS)
def test_a_kda_layer_is_equations_1_and_10_written_out(settings, rng):
    w, x = kda_tensors(settings, rng), rng.standard_normal((1, 1, D))
    state = kda_state(settings, rng, B=1)
    y, _ = kda_layer(x, w, settings, state)
    expected = np.zeros(D)
    for h in range(settings.heads):
        rows = slice(h * 4, h * 4 + 4)
        q, k, v = (_convolved(x[0, 0], getattr(state, name)[0], w, name)[rows] for name in "qkv")
        g, beta = forget_gate(x, w, settings)[0, 0, h], write_strength(x, w, settings)[0, 0, h]
        k, S = k / np.sqrt(k @ k + 1e-6), np.exp(g)[:, None] * state.S[0, h]
        S = S + beta * np.outer(k, v - S.T @ k)
        o = S.T @ (q / np.sqrt(q @ q + 1e-6)) * 0.5
        o = o / np.sqrt(np.mean(o * o) + settings.eps) * w["o_norm.weight"]
        gate = output_gate(x, w, settings)[0, h, 0]
        expected += w["o_proj.weight"][:, rows] @ (o / (1 + np.exp(-gate)))
    assert np.allclose(y[0, 0], expected, rtol=1e-12)


def _convolved(x, tail, w, name):
    inputs = np.vstack([tail, w[f"{name}_proj.weight"] @ x])
    y = np.einsum("td,dt->d", inputs, w[f"{name}_conv1d.weight"][:, 0])
    return y / (1 + np.exp(-y))


def test_the_other_form_of_the_recurrence_makes_the_same_layer(rng):
    w, state, x = kda_tensors(KDA, rng), kda_state(KDA, rng), rng.standard_normal((2, 7, D))
    (y, end), (other, other_end) = (kda_layer(x, w, KDA, state, form) for form in (kda, constrained_dplr))
    assert np.allclose(y, other, rtol=0, atol=1e-13)
    assert same(end, other_end)


def test_gates_take_their_member_s_form(rng):
    w, x = kda_tensors(KDA, rng), rng.standard_normal((1, 3, D))
    softplus, K3, Ling = (forget_gate(x, w, KDA_FORMS[name]) for name in ("Kimi Linear", "Kimi K3", "Ling 3.0"))
    f = (x @ w["f_a_proj.weight"].T @ w["f_b_proj.weight"].T).reshape(1, 3, 2, 4)
    full = (x @ w["f_proj.weight"].T).reshape(1, 3, 2, 4)
    biased = f + w["dt_bias"].reshape(2, 4)
    assert np.allclose(softplus, -np.exp(w["A_log"])[:, None] * np.log1p(np.exp(biased)), rtol=1e-12)
    assert np.array_equal(K3, lower_bound_gate(f, -5.0, w["A_log"], w["dt_bias"]))
    assert np.array_equal(Ling, lower_bound_gate(full, -5.0, w["A_log"], w["dt_bias"]))
    per_head = forget_gate(
        x, w | {"f_proj.weight": w["f_proj.weight"][:2], "dt_bias": w["dt_bias"][:2]}, KDA_FORMS["Gated DeltaNet"]
    )
    rate = np.log1p(np.exp(x @ w["f_proj.weight"][:2].T + w["dt_bias"][:2]))
    assert np.allclose(per_head, (-np.exp(w["A_log"]) * rate)[..., None] * np.ones(4), rtol=1e-12)
    gates = [output_gate(x, w, KDA_FORMS[name]).swapaxes(1, 2).reshape(1, 3, 8) for name in ("Kimi Linear", "Kimi K3")]
    assert np.array_equal(gates[0], x @ w["g_a_proj.weight"].T @ w["g_b_proj.weight"].T)
    assert np.array_equal(gates[1], x @ w["g_proj.weight"].T)
    assert np.all(write_strength(x, w, KDA_FORMS["two-sided"]) == 2 * write_strength(x, w, KDA))


STORED = [lambda A: A, lambda A: A[:, None], lambda A: A[None, None, :, None], lambda A: np.r_[A, 0, 0]]


@pytest.mark.parametrize("stored", STORED, ids=["[H]", "[H, 1]", "[1, 1, H, 1]", "padded"])
def test_a_log_is_found_however_it_is_stored(stored, rng):
    w, x = kda_tensors(KDA, rng), rng.standard_normal((1, 3, D))
    other = w | {"A_log": stored(w["A_log"]), "dt_bias": w["dt_bias"].reshape(2, 4)}
    assert np.array_equal(forget_gate(x, w, KDA), forget_gate(x, other, KDA))


def test_a_convolution_reads_its_taps_and_hands_on_the_rest():
    x, tail = np.arange(1.0, 6.0).reshape(1, 5, 1), np.array([[[-2.0], [-1.0]]])
    y, rest = short_convolution(x, np.array([[[100.0, 10.0, 1.0]]]), tail)
    assert y.ravel().tolist() == [-209.0, -88.0, 123.0, 234.0, 345.0]
    assert rest.ravel().tolist() == [4.0, 5.0]
    short, rest = short_convolution(x[:, :1], np.array([[[100.0, 10.0, 1.0]]]), tail)
    assert short.ravel().tolist() == [-209.0] and rest.ravel().tolist() == [-1.0, 1.0]


def mla_case(rng, settings: MlaSettings, T=5, past=3):
    state = MlaState(
        rng.standard_normal((2, past + T, settings.latent)), rng.standard_normal((2, past + T, settings.rope))
    )
    q = rng.standard_normal((2, settings.heads, T, settings.nope + settings.rope))
    return q, state, rng.standard_normal((settings.heads * (settings.nope + settings.value), settings.latent))


@pytest.mark.parametrize("rope", [0, 4])
@pytest.mark.parametrize("past", [0, 3])
def test_absorbed_attention_is_expanded_attention(rope, past, rng):
    settings = MlaSettings(heads=3, latent=7, nope=5, rope=rope, value=4)
    case = mla_case(rng, settings, past=past)
    expanded, absorbed = attend_expanded(*case, settings), attend_absorbed(*case, settings)
    assert np.linalg.norm(absorbed - expanded) <= 1e-12 * np.linalg.norm(expanded)


def test_attention_is_the_causal_softmax_written_out(rng):
    settings = MlaSettings(heads=1, latent=3, nope=2, rope=2, value=2)
    q, state, kv_b = mla_case(rng, settings, T=2, past=1)
    o = attend_expanded(q, state, kv_b, settings)
    for t, visible in ((0, 2), (1, 3)):
        latent, key = state.latent[1, :visible], state.key[1, :visible]
        scores = np.exp((latent @ kv_b[:2].T @ q[1, 0, t, :2] + key @ q[1, 0, t, 2:]) / 2)
        assert np.allclose(o[1, 0, t], scores @ (latent @ kv_b[2:].T) / scores.sum(), rtol=1e-12)


def test_scores_far_apart_neither_overflow_nor_vanish(rng):
    settings = MlaSettings(heads=3, latent=7, nope=5, rope=4, value=4)
    q, state, kv_b = mla_case(rng, settings)
    assert np.all(np.isfinite(attend_expanded(1e6 * q, state, kv_b, settings)))
    assert np.allclose(silu(np.array([-1e4, -800.0, 0.0, 800.0, 1e4])), [0.0, 0.0, 0.0, 800.0, 1e4])


MOE = MoeSettings(experts=6, top_k=2, width=3, scaling=2.5)


def router(scores, bias=0.0) -> dict[str, np.ndarray]:
    """Return a router that gives the single channel x = 1 the given scores."""
    scores = np.asarray(scores)
    return {
        "gate.weight": np.log(scores / (1 - scores))[:, None],
        "gate.e_score_correction_bias": np.broadcast_to(bias, scores.shape),
    }


def chosen(scores, settings=MOE, bias=0.0):
    routing = route(np.ones((1, 1)), router(scores, bias), settings)
    return routing.experts[0].tolist(), routing.weights[0], float(routing.margin[0])


def test_the_best_experts_weigh_their_share_of_the_scaling():
    experts, weights, margin = chosen([0.1, 0.6, 0.2, 0.3, 0.1, 0.1])
    assert experts == [1, 3] and margin == pytest.approx(0.1)
    assert np.allclose(weights, [2.5 * 0.6 / 0.9, 2.5 * 0.3 / 0.9])


def test_without_renormalisation_scores_are_weights():
    assert np.allclose(chosen([0.1, 0.6, 0.2, 0.3, 0.1, 0.1], replace(MOE, renormalise=False))[1], [1.5, 0.75])


@pytest.mark.parametrize(
    ("top_k", "experts"),
    [(1, [1]), (2, [1, 0]), (3, [1, 0, 2]), (4, [1, 0, 2, 3]), (5, [1, 0, 2, 3, 4]), (6, [1, 0, 2, 3, 4, 5])],
)
def test_of_equal_experts_the_lower_index_is_taken(top_k, experts):
    found, _, margin = chosen([0.5, 0.75, 0.5, 0.5, 0.5, 0.5], replace(MOE, top_k=top_k))
    assert found == experts
    assert margin == {1: 0.25, 6: np.inf}.get(top_k, 0.0)


def test_the_bias_chooses_but_does_not_weigh():
    bias = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    experts, weights, _ = chosen([0.1, 0.6, 0.2, 0.3, 0.1, 0.1], bias=bias)
    assert experts == [2, 1] and np.allclose(weights, [2.5 * 0.2 / 0.8, 2.5 * 0.6 / 0.8])
    biased = chosen([0.1, 0.6, 0.2, 0.3, 0.1, 0.1], replace(MOE, biased_weights=True), bias)
    assert biased[0] == [2, 1] and np.allclose(biased[1], [2.5 * 1.2 / 1.8, 2.5 * 0.6 / 1.8])


@pytest.mark.parametrize(
    ("bias", "experts", "margin"),
    [
        # by the sum of two: 0.5 and 0.8 and 0.7; the best expert of all stands in the group that is left out
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [2, 3], 0.1),
        ([0.1, 0.0, 0.0, 0.0, 0.0, 0.3], [5, 4], 0.2),
        ([-0.1, -0.9, -0.9, -0.9, -0.9, -0.9], [0, 1], 0.5),  # below 0 too, nobody from outside is taken
    ],
)
def test_experts_come_from_the_best_group_only(bias, experts, margin):
    settings = replace(MOE, groups=3, top_groups=1)
    found = chosen([0.45, 0.05, 0.4, 0.4, 0.35, 0.35], settings, np.array(bias))
    assert found[0] == experts and found[2] == pytest.approx(margin)


def test_of_equal_groups_the_lower_index_is_taken():
    assert chosen([0.5] * 6, replace(MOE, groups=3))[::2] == ([0, 1], 0.0)


def test_a_token_gets_its_experts_by_weight_and_the_shared_one(rng):
    w = {"gate.weight": rng.standard_normal((6, D)), "gate.e_score_correction_bias": np.zeros(6)}
    for e in range(6):
        w |= {f"experts.{e}.{name}.weight": rng.standard_normal((3, D)) for name in ("w1", "w3")}
        w[f"experts.{e}.w2.weight"] = rng.standard_normal((D, 3))
    w |= {f"shared_experts.{name}_proj.weight": rng.standard_normal((3, D)) for name in ("gate", "up")}
    w["shared_experts.down_proj.weight"] = rng.standard_normal((D, 3))
    x = rng.standard_normal((2, 3, D))
    y, routing = moe_layer(x, w, MOE)
    token = x[1, 2]

    def mlp(gate, up, down):
        return w[down] @ (silu(w[gate] @ token) * (w[up] @ token))

    expected = mlp(*(f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")))
    for e, weight in zip(routing.experts[1, 2], routing.weights[1, 2], strict=True):
        expected = expected + weight * mlp(*(f"experts.{e}.{name}.weight" for name in ("w1", "w3", "w2")))
    assert np.allclose(y[1, 2], expected, rtol=1e-12)


def test_a_layer_of_float32_stays_float32(rng):
    w, state = kda_tensors(KDA, rng), vars(kda_state(KDA, rng))
    w, state = ({name: x.astype(np.float32) for name, x in arrays.items()} for arrays in (w, state))
    y, end = kda_layer(rng.standard_normal((2, 3, D)).astype(np.float32), w, KDA, KdaState(**state))
    assert {y.dtype, *(x.dtype for x in vars(end).values())} == {np.dtype(np.float32)}
