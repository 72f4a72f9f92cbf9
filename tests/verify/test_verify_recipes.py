"""Recipes: every one that can be drawn makes exact numbers inside the domain, the same ones anywhere and forever."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from kda_spec.recurrent import recurrent
from kda_spec.types import check_domain
from verify import recipes
from verify.drawing import neutral, strategy_of
from verify.exact import round_to
from verify.families import materialise
from verify.plan import Plan
from verify.recipes import AXES, DTYPES, STRONG, TALL, Recipe, draw, drawn, from_json
from verify.resolve import resolve
from verify.targets import Target, default_contract
from verify.yardstick import activated

ROOT = Path(__file__).parents[2]
TOKENS, WORK = 65, 20_000
STRATEGY = recipes.recipes(DTYPES, tokens=TOKENS, work=WORK, chunks=(16, 32))


@pytest.fixture(scope="module")
def many() -> list[Recipe]:
    return [drawn(STRATEGY, number) for number in range(320)]


@pytest.fixture(scope="module")
def cases(many):
    return [materialise(recipe) for recipe in many]


def test_no_recipe_is_drawn_twice(many):
    assert len(set(many)) == len(many) == 320


def test_every_number_is_representable_in_its_dtype(cases):
    for case in cases:
        a = case.activation
        named = {case.dtype: (case.q, case.k, case.v, case.do), case.gate_dtype: (case.g, case.beta)}
        for dtype, arrays in ((case.state_dtype, (case.S0, case.dS, a.A_log, a.dt_bias)), *named.items()):
            for x in arrays:
                assert x is None or np.array_equal(round_to(x, dtype), x)


def test_every_case_is_inside_the_domain_once_activated(cases):
    """No slack beyond the 1e-12 of check_domain: beta is shrunk after the cast where a rounded key is longer than 1."""
    for case in cases:
        check_domain(activated(case).inputs())


def test_the_class_beta_up_to_one_means_one(many, cases):
    for recipe, case in zip(many, cases, strict=True):
        inner = activated(case)
        strength = inner.beta * inner.per_value_head(np.sum(inner.k**2, axis=-1))
        # a sigmoid is not shrunk after the cast: bfloat16 may lengthen a unit key by 2^-8, twice in the square
        slack = 2.0**-7 + 2.0**-15 if recipe.sigmoid == "sigmoid" else 1e-12
        assert np.max(strength, initial=0.0) <= {"beta<=1": 1, "beta<=2": 2}[recipe.conditioning] * (1 + slack)


def test_gates_of_minus_infinity_stand_where_a_recipe_says_so(many, cases):
    for recipe, case in zip(many, cases, strict=True):
        assert recipe.infinite or np.all(np.isfinite(case.g))
    assert any(np.any(np.isneginf(case.g)) for case in cases)


OPTIONS = {
    "dtype": DTYPES,
    "keys": recipes.KEYS,
    "queries": recipes.QUERIES,
    "values": recipes.VALUES,
    "gates": recipes.GATES,
    "betas": recipes.BETAS,
    "activation": recipes.ACTIVATIONS,
    "sigmoid": recipes.SIGMOIDS,
}
RANGES = {"plant": range(8), "K": recipes.DIMS, "V": recipes.DIMS, "B": (1, 2, 3), "H": (1, 2, 3), "G": (1, 2, 3)}


@pytest.mark.parametrize("field, options", (OPTIONS | RANGES).items())
def test_every_family_and_size_is_drawn(many, field, options):
    assert {getattr(recipe, field) for recipe in many} >= set(options)


@pytest.mark.parametrize("K, V", [(8, 3), (8, 8), (4, 12)])
def test_cancelling_queries_read_next_to_nothing_of_what_is_there(K, V):
    read = {}
    for queries in ("unit", "cancelling"):
        r = Recipe("float32", 3, 2, 17, 2, 1, K, V, (), queries=queries, gates="mild", betas="uniform", state=True)
        case = materialise(r)
        read[queries] = np.abs(recurrent(case.inputs()).o[..., : min(V, K - 1)])
        assert np.allclose(np.linalg.norm(case.q, axis=-1), 1, atol=1e-5)
    assert np.max(read["cancelling"]) < 1e-4 * np.median(read["unit"])


@pytest.mark.parametrize("dtype, least", [("float32", 2.0**-126), ("bfloat16", 2.0**-126), ("float16", 2.0**-14)])
def test_subnormal_values_are_below_the_normal_numbers_and_not_all_zero(dtype, least):
    v = np.abs(materialise(Recipe(dtype, 3, 1, 16, 1, 1, 2, 8, values="subnormal")).v)
    assert 0 < np.max(v) < 4 * least and np.mean((v > 0) & (v < least)) > 0.5


def test_wide_heads_are_drawn_in_deep():
    plan = Plan("recurrent_torch", "cpu", "deep", ("float32",), 0, 60)
    strategy = strategy_of(plan, resolve("recurrent_torch", "cpu"), "float32")
    drawn_dims = {d for n in range(60) for r in [drawn(strategy, n)] for d in (r.K, r.V)}
    assert drawn_dims >= {60, 100, 128, 256}


def test_lengths_around_chunk_borders_are_drawn(many):
    assert {t for t in recipes.BORDERS if t <= TOKENS} <= {recipe.T for recipe in many}
    assert any(0 in recipe.lengths for recipe in many)


def work(r: Recipe) -> int:
    return r.B * r.HV * r.T * r.K * r.V


def test_work_and_length_are_bounded(many):
    for r in many:
        longest = 4 * (TOKENS // 2) + max(TALL) if r.lengths else max(TOKENS, *TALL)
        assert work(r) <= WORK
        assert longest >= r.T
        assert not r.lengths or (r.B == 1 and sum(r.lengths) == r.T)


ON = {
    "HV > H": lambda r: r.G > 1,
    "varlen": lambda r: bool(r.lengths),
    "T = 0": lambda r: r.T == 0 or 0 in r.lengths,
    "initial_state": lambda r: r.state,
    "scale": lambda r: r.scale,
    "K != V": lambda r: r.K != r.V,
    "g = -inf": lambda r: r.infinite,
    "g < -5": lambda r: r.activation == "none" and r.gates in STRONG,
    "use_qk_l2norm_in_kernel": lambda r: r.l2norm,
    "use_gate_in_kernel": lambda r: r.activation != "none",
    "lower_bound": lambda r: r.activation.startswith("lower"),
    "use_beta_sigmoid_in_kernel": lambda r: r.sigmoid != "none",
    "allow_neg_eigval": lambda r: r.sigmoid == "twice",
    "float32 gates": lambda r: r.gates_float32,
    "chunk_size": lambda r: r.chunk != 0,
}


@pytest.mark.parametrize("axis", AXES)
def test_the_neutral_form_leaves_its_axis_and_touches_no_other_recipe(many, axis):
    on = [r for r in many if ON[axis](r)]
    assert on
    assert not any(ON[axis](AXES[axis](r)) for r in on)
    assert all(AXES[axis](r) == r for r in many if not ON[axis](r))


@pytest.mark.parametrize("refused", [list(AXES), list(AXES)[::-1], ["T = 0"], ["g = -inf", "use_gate_in_kernel"]])
def test_refusing_axes_together_leaves_all_of_them_in_cases_that_can_be_made(many, refused):
    target = Target("t", print, default_contract, DTYPES, refused=dict.fromkeys(refused, "declared"))
    for recipe in (neutral(r, target) for r in many[:100]):
        assert not [axis for axis in refused if ON[axis](recipe)]
        assert work(recipe) <= max(WORK, 4 * work(replace(recipe, T=1)))
        check_domain(activated(materialise(recipe)).inputs())


def test_recipes_survive_json(many):
    for recipe in many[:100]:
        assert from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"version": 99}, "version 1, got 99"),
        ({"colour": 3}, "colour"),
        ({"keys": "round"}, "keys must be one of .*got 'round'"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_unknown_versions_fields_and_options_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        from_json(Recipe().to_json() | changes)


PINNED = {
    Recipe(): "4ed98875941d1957",
    Recipe(
        dtype="bfloat16",
        seed=7,
        B=2,
        T=17,
        H=2,
        G=2,
        K=5,
        V=3,
        keys="near_collinear",
        values="spikes",
        gates="channels_inf",
        betas="above_one",
        plant=3,
        state=True,
    ): "698e19750565eeeb",
    Recipe(
        dtype="float16", seed=9, T=5, K=8, V=4, lengths=(2, 0, 3), l2norm=True, activation="softplus", sigmoid="twice"
    ): "727f48d7a75ddfd3",
}


def test_three_recipes_make_the_same_bits_in_a_fresh_process_forever():
    """A change here is a new recipe version: recorded failures would replay on other numbers."""
    asked = json.dumps([recipe.to_json() for recipe in PINNED])
    code = "import json, sys; from verify.families import materialise; from verify.recipes import from_json"
    code += "; print(*(materialise(from_json(x)).digest() for x in json.loads(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code, asked], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == list(PINNED.values())


@pytest.mark.parametrize("field", [f.name for f in fields(Recipe) if f.name not in ("G", "lengths", "T", "captured")])
def test_every_field_of_a_recipe_changes_the_case(field):
    base = list(PINNED)[2 if field in ("l2norm", "activation", "sigmoid") else 1]
    value = getattr(base, field)
    if field in OPTIONS:
        other = next(option for option in OPTIONS[field][::-1] if option != value)
    else:
        other = not value if isinstance(value, bool) else value + 1
    assert materialise(replace(base, **{field: other})).digest() != materialise(base).digest()


def shrunk(condition) -> Recipe:
    met = []

    def meet(recipe):
        if condition(recipe):
            met.append(recipe)
            raise AssertionError

    for number in range(100):
        try:
            draw(STRATEGY, number, meet, shrink=True)
        except AssertionError:
            return met[-1]
    raise LookupError


@pytest.mark.parametrize(
    "condition, smallest",
    [
        (lambda r: r.T > 5, Recipe(T=6)),
        (lambda r: r.G > 1 and r.T, Recipe(T=1, G=2)),
        (lambda r: r.K > r.V, Recipe(T=1, K=2)),
        (lambda r: r.infinite, Recipe(T=1, gates="resets_inf")),
        (lambda r: r.state and r.betas == "largest", Recipe(T=1, state=True, betas="largest")),
    ],
)
def test_shrinking_ends_at_the_smallest_recipe(condition, smallest):
    assert shrunk(condition) == smallest
