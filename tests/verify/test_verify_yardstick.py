"""The simulators are KDA, legal errors pass, everything else is measured as what it is: no absolute tolerance."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from impls.contracts import at_least_float32
from kda_spec.gradients import gradients
from kda_spec.recurrent import recurrent
from verify import bounds, coverage, families, simulators, yardstick
from verify.cases import Case
from verify.exact import UNIT_ROUNDOFF
from verify.families import materialise
from verify.properties import PROPERTIES
from verify.recipes import BETAS, DTYPES, GATES, Recipe, drawn, recipes
from verify.resolve import resolve
from verify.runner import check
from verify.simulators import Rounding
from verify.targets import Target, default_contract
from verify.trial import Trial
from verify.yardstick import rows

EXACT = Rounding("float64", "float64", "float64")
STORED = Rounding("float64", "float64", "float32")
OURS = resolve("recurrent_torch", "cpu")
CLAIMS = {p.name: p for p in PROPERTIES}


def drawings(dtype: str, count: int, **fixed) -> list[Recipe]:
    strategy = recipes((dtype,), tokens=33, work=10_000)
    return [replace(drawn(strategy, number), **fixed) for number in range(count)]


def judged_as(change, contract=default_contract) -> Target:
    """Return recurrent_torch with its results changed."""
    return Target("changed", lambda *a, **k: change(*OURS.function(*a, **k)), contract, DTYPES)


def ratio(target: Target, recipe: Recipe, name: str = "reference_forward") -> float:
    return max((m.ratio for m in CLAIMS[name].check(Trial(target, recipe))), default=0.0)


def close(x, y, limit=1e-13):
    return np.linalg.norm(x - y) <= limit * np.linalg.norm(y)


@pytest.mark.parametrize("keys", ["unit", "near_collinear", "alternating"])
@pytest.mark.parametrize("gates", GATES)
def test_in_float64_the_simulators_are_the_definition(gates, keys):
    for betas in BETAS:
        recipe = Recipe("float64", 1, 2, 37, 2, 1, 5, 3, keys=keys, gates=gates, betas=betas, plant=2, state=True)
        case = materialise(recipe)
        inputs, expected = case.inputs(), recurrent(case.inputs())
        arguments = (*inputs.heads_first(slice(0, 2), slice(0, 37)), case.S0, inputs.resolved_scale)
        runs = [simulators.sequential(*arguments, EXACT)]
        runs += [simulators.chunked(*arguments, EXACT, C) for C in (4, 16, 64)]
        for o, S in runs:
            assert close(np.swapaxes(o, 1, 2), expected.o)
            assert close(S, expected.final_state)
        o, S = simulators.chunked(*arguments, STORED, 16)
        assert close(np.swapaxes(o, 1, 2), expected.o, 1e-5)
        assert close(S, expected.final_state, 1e-5)


@pytest.mark.parametrize("gates", GATES)
def test_in_float64_the_simulated_adjoint_is_the_definitions(gates):
    for betas in BETAS:
        case = materialise(Recipe("float64", 2, 2, 19, 2, 1, 5, 3, gates=gates, betas=betas, plant=2, state=True))
        inputs = case.inputs()
        d = gradients(inputs, case.do, case.dS)
        arguments = (*inputs.heads_first(slice(0, 2), slice(0, 19)), case.S0, inputs.resolved_scale)
        got = simulators.adjoint(*arguments, np.swapaxes(case.do, 1, 2), case.dS, EXACT)
        expected = {"dq": d.q, "dk": d.k, "dv": d.v, "dg": d.g, "dbeta": d.beta}
        assert close(got["dS0"], d.initial_state)
        for name, x in expected.items():
            assert close(np.swapaxes(got[name], 1, 2), x)


@pytest.mark.parametrize("operand", ["bfloat16", "float16", "tf32", "float32"])
def test_a_simulator_errs_as_much_as_its_operands_are_rounded(operand):
    case = materialise(Recipe("float64", 3, 1, 64, 1, 1, 16, 16, gates="long_memory", betas="uniform"))
    inputs = case.inputs()
    arguments = (*inputs.heads_first(slice(0, 1), slice(0, 64)), case.initial, inputs.resolved_scale)
    expected = np.swapaxes(recurrent(inputs).o, 1, 2)
    for run in (simulators.sequential, lambda *a: simulators.chunked(*a, 16)):
        o, _ = run(*arguments, Rounding(operand, "float32", "float32"))
        error = np.linalg.norm(o - expected) / np.linalg.norm(expected)
        assert 0.1 < error / UNIT_ROUNDOFF[operand] < 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_kernel_passes_both_gates(dtype):
    for recipe in drawings(dtype, 15):
        assert ratio(OURS, recipe) <= 1
        assert ratio(OURS, recipe, "reference_backward") <= 1


def test_a_float32_run_never_exceeds_gate_R():
    for recipe in drawings("float32", 100):
        trial = Trial(OURS, recipe)
        for name, x in trial.forward.numbers().items():
            error = np.linalg.norm(rows(name, x) - rows(name, trial.yard.exact[name]), axis=-1)
            assert np.all(error <= trial.limits.never * trial.yard.never[name])


def test_gate_R_grows_with_the_error_that_it_bounds():
    recipe = Recipe("float32", 4, 1, 33, 1, 1, 16, 8, gates="mild", betas="uniform")
    never = [Trial(OURS, replace(recipe, dtype=dtype)).yard.never["o"] for dtype in ("float64", "float32")]
    assert np.all(never[0] < 1e-8 * never[1])


WIPED = {
    "reference_backward": Recipe(
        "bfloat16", 216, 3, 32, 3, 1, 1, 4, keys="some_zero", queries="keys", values="small", gates="resets_inf",
        plant=4, state=True, scale=True,
    ),
    "layouts": Recipe(
        "bfloat16", 1316, 2, 32, 3, 1, 1, 64, keys="some_zero", queries="keys", values="small", gates="long_memory",
        betas="largest", plant=3, state=True, l2norm=True, sigmoid="sigmoid", gates_float32=True, chunk=64,
    ),
    "gradient_split": Recipe(
        "bfloat16", 3261, 2, 17, 2, 1, 1, 1, keys="hadamard", queries="keys", values="spikes", gates="mild",
        betas="mixed", plant=4, sigmoid="twice", gates_float32=True,
    ),
    "chunk_invariance": Recipe(
        "bfloat16", 423, 1, 200, 1, 1, 1, 8, keys="near_collinear", queries="large", values="small",
        gates="long_memory", betas="above_one", plant=7, state=True, chunk=16,
    ),
}  # fmt: skip
"""What calibration found: by norms of the state alone these are 1.4 to 3e7 times the limit for a right kernel."""


@pytest.mark.parametrize("name", WIPED)
def test_rounding_in_a_chunk_what_a_later_token_of_it_erases_is_legal(name):
    assert ratio(resolve("chunk_torch", "cpu"), WIPED[name], name) <= 1


def sizes(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return |S_t| of the bounds and the norms of the columns of S_t, for a case without a state."""
    q, k, v, g, beta = (np.swapaxes(x, 1, 2) for x in (case.q, case.k, case.v, case.g, case.beta))
    whole = (slice(0, case.B), slice(0, case.T))
    states = families.states(*case.inputs().heads_first(*whole)[1:], case.initial)
    return bounds.forward(q, k, v, g, beta, case.initial)["s"], np.linalg.norm(states, axis=-2)


def test_parts_are_no_larger_than_the_state_where_nothing_is_erased():
    recipe = Recipe("float64", 3, 1, 8, 1, 1, 8, 4, gates="zero", betas="uniform")
    case = materialise(recipe)
    found, norms = sizes(case.but(k=np.eye(8)[None, :, None]))
    assert np.allclose(found, norms, rtol=1e-12)


def test_parts_of_earlier_chunks_are_not_counted_again():
    case = materialise(Recipe("float64", 3, 1, 1024, 1, 1, 16, 4, gates="zero"))
    found, norms = sizes(case)
    early, late = (np.median((found / norms)[..., tokens, :]) for tokens in (slice(0, 64), slice(960, 1024)))
    assert 1 < early < 2.5 and late < 2.5


def test_what_an_error_is_divided_by_does_not_know_the_candidate():
    trial = Trial(OURS, Recipe("float32", 5, 1, 20, 2, 1, 8, 4, gates="mild", betas="uniform"))
    exact, e = trial.yard.exact["o"], np.zeros_like(trial.yard.exact["o"])
    e[0, 7, 1] = 1.0
    small, large = ([m.observed for m in trial.judge({"o": exact + x * e}, trial.yard.exact)] for x in (1.0, 1024.0))
    assert np.allclose(np.array(large) / np.array(small), 1024.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_fail_on_inputs_of_size_2_to_the_minus_30_and_the_right_kernel_passes(dtype):
    zeros, tried = judged_as(lambda o, S: (torch.zeros_like(o), torch.zeros_like(S))), 0
    for recipe in drawings(dtype, 40, queries="unit", values="small", state=False, betas="uniform"):
        if recipe.T and recipe.plain and recipe.keys != "some_zero":
            tried += 1
            assert ratio(OURS, recipe) <= 1
            assert ratio(zeros, recipe) > 10
    assert tried >= 10


WIDE = partial(at_least_float32, bitwise=frozenset())


@pytest.mark.parametrize(
    "dtype, contract, percent",
    # operands in bfloat16 may legally lose 0.4% each, so that there 1% shows in one case of ten, 5% in most
    [("bfloat16", WIDE, 1), ("float16", WIDE, 1), ("float16", default_contract, 1), ("bfloat16", default_contract, 5)],
)
def test_a_small_error_of_scale_fails_in_half_precision(dtype, contract, percent):
    off = judged_as(lambda o, S: ((1 + percent / 100) * o, S), contract)
    # 60: of 19 that were drawn once, one case more or less made 79% of 84%
    tried = [r for r in drawings(dtype, 60, queries="unit", values="normal", betas="uniform") if r.T]
    assert sum(ratio(off, recipe) > 1 for recipe in tried) >= 0.8 * len(tried)


SMALL = Recipe("float32", 6, 2, 5, 2, 1, 4, 3, gates="mild", betas="uniform", state=True)


@pytest.mark.parametrize("name", ["o", "S", "dq", "dk", "dv", "dg", "dbeta", "dS0"])
def test_one_nan_anywhere_fails(name):
    trial = Trial(OURS, SMALL)
    got = trial.both.numbers()[name]
    for at in np.ndindex(got.shape):
        x = got.copy()
        x[at] = np.nan
        assert any(m.ratio == np.inf for m in trial.judge({name: x}, trial.yard.exact))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_one_infinity_fails(value):
    broken = judged_as(lambda o, S: (torch.where(o == o.flatten()[3], value, o), S))
    assert ratio(broken, SMALL) == np.inf


@pytest.mark.parametrize(
    "change",
    [
        lambda o, S: (o[:, :-1], S),
        lambda o, S: (o.transpose(1, 2), S),
        lambda o, S: (o, S[:1]),
        lambda o, S: (o, S.mT),
        lambda o, S: (o[..., :1], S),
    ],
)
def test_a_wrong_shape_fails_even_where_it_would_broadcast(change):
    (measure,) = check(CLAIMS["reference_forward"], Trial(judged_as(change), SMALL))
    assert measure.ratio == np.inf
    assert "must have shape" in measure.what


@pytest.mark.parametrize("returned", [None, 3, "o", [1, 2], (1, 2, 3)])
def test_what_is_not_two_results_is_blamed_on_the_target(returned):
    trial = Trial(Target("odd", lambda *a, **k: returned, default_contract, DTYPES), SMALL)
    (measure,) = check(CLAIMS["reference_forward"], trial)
    assert measure.ratio == np.inf
    assert "expected (o, final_state)" in measure.what


@pytest.mark.parametrize(
    "term, absent, present",
    [
        ("initial state", {"state": False}, {"state": True}),
        ("decay", {"gates": "zero"}, {"gates": "mild"}),
        ("erase", {"keys": "one_hot", "T": 1, "state": False}, {"keys": "repeated"}),
        ("last token", {"betas": "zero"}, {"betas": "one"}),
        ("gate per head", {"gates": "zero"}, {"gates": "per_head"}),
    ],
)
def test_a_term_counts_as_covered_only_where_leaving_it_out_shows(term, absent, present):
    base = Recipe("float32", 7, 1, 9, 2, 1, 4, 3, gates="mild", betas="uniform", state=True)

    def change(recipe):
        trial = Trial(OURS, recipe)
        return coverage.covered(trial.case, trial.yard).get(term, 0.0)

    assert change(replace(base, **absent)) <= coverage.SEEN < change(replace(base, **present))


def test_activations_inside_are_the_specifications():
    plain = materialise(Recipe("float64", 8, 1, 6, 1, 1, 4, 4, l2norm=True, sigmoid="twice", activation="softplus"))
    inner = yardstick.activated(plain)
    assert np.allclose(np.linalg.norm(inner.k, axis=-1), 1, atol=1e-5)
    assert np.all((inner.beta > 0) & (inner.beta < 2) & np.all(inner.g <= 0))


@pytest.mark.parametrize("C", [1, 16])
@pytest.mark.parametrize("gates", ["zero", "resets_inf"])
def test_subnormal_operands_are_paid_for(gates, C):
    contract = default_contract("float16")
    for recipe in drawings("float16", 12, betas="tiny", gates=gates, activation="none", sigmoid="none"):
        case, bound = materialise(recipe), Trial(judged_as(lambda o, S: (o, S)), recipe).limits.never
        yard = yardstick.measure(case, contract, backward=False)
        for name, x in yardstick.simulate(case, contract, C).items():
            error = np.linalg.norm(rows(name, x) - rows(name, yard.exact[name]), axis=-1)
            assert np.all(error <= bound * yard.never[name])


def test_a_stored_inverse_errs_more_than_substitution_where_the_state_is_erased():
    """Repeated keys erase what was there; the roundings of a stored inverse leave some of it."""
    ratios = []
    for seed in range(8):
        case = materialise(Recipe("bfloat16", seed, 1, 32, 1, 1, 4, 4, keys="repeated", betas="uniform", state=True))
        inputs, exact = case.inputs(), recurrent(case.inputs()).final_state
        arguments = (*inputs.heads_first(slice(0, 1), slice(0, 32)), case.S0, inputs.resolved_scale)
        solved, stored = (
            simulators.chunked(*arguments, Rounding("bfloat16", "float32", how), 32)[1]
            for how in ("float32", "bfloat16")
        )
        ratios.append(np.linalg.norm(stored - exact) / np.linalg.norm(solved - exact))
    assert np.median(ratios) > 2


@pytest.mark.parametrize("operand, asked", [("float32", True), ("bfloat16", True), ("float16", False)])
def test_scaling_is_not_claimed_bit_for_bit_of_operands_in_float16(operand, asked):
    trial = Trial(judged_as(lambda o, S: (o, S), lambda _: default_contract(operand)), Recipe("float16", T=3))
    assert CLAIMS["scaling_values"].applies(trial) == asked
