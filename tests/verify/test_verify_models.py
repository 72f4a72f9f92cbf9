"""The judge of models: what it draws and allows, and that planted bugs fail the properties that are there for them."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from jsonschema import Draft202012Validator

pytest.importorskip("safetensors", reason="safetensors is not installed (pip install kda-forge[model])")

from kda_spec import forward, tensor_shapes
from verify.models import definition, mutants, targets
from verify.models.checkpoints import CLEAR, materialise, texts_of
from verify.models.judge import check
from verify.models.properties import PROPERTIES
from verify.models.recipes import AXES, Recipe, from_json, neutral, recipes, words
from verify.models.trial import Trial
from verify.recipes import drawn
from verify.records import DEFINITIONS

BOTH = Recipe(
    layers="km", dense=0, width=8, kda_heads=2, head_dim=4, taps=3, mla_heads=2, latent=4, nope=2, rope=2, value=2,
    experts=4, top_k=2, router="biased", prompts=(5, 3), tail=3,
)  # fmt: skip
TIED = replace(BOTH, router="all_tied", groups=2)
GROUPED = replace(BOTH, experts=9, groups=3, top_groups=1, router="even", prompts=(33,))
CUT = replace(BOTH, boundary=3)
BY_NAME = {prop.name: prop for prop in PROPERTIES}

KILLED = [
    ("conv_not_carried", "decode", BOTH),
    ("conv_not_moved_by_a_step", "absorbed", BOTH),
    ("conv_taps_reversed", "prefill", BOTH),
    ("state_not_carried", "chunked_prefill", BOTH),
    ("state_transposed", "decode", BOTH),
    ("output_gate_missing", "prefill", BOTH),
    ("gated_norm_missing", "prefill", BOTH),
    ("gated_norm_over_all_heads", "prefill", BOTH),
    ("l2norm_missing", "prefill", BOTH),
    ("beta_doubled", "prefill", BOTH),
    ("dt_bias_missing", "prefill", BOTH),
    ("one_rate_for_all_heads", "prefill", BOTH),
    ("latent_eps_of_the_others", "prefill", BOTH),
    ("absorbed_scale", "absorbed", BOTH),
    ("absorbed_without_shared_key", "absorbed", BOTH),
    ("piece_sees_itself_only", "chunked_prefill", BOTH),
    ("sees_the_next_token", "prefill", BOTH),
    ("router_weighs_with_bias", "prefill", BOTH),
    ("router_ignores_bias", "prefill", BOTH),
    ("router_renormalises_always", "prefill", BOTH),
    ("router_scaling_missing", "prefill", BOTH),
    ("groups_by_their_best", "prefill", GROUPED),
    ("last_of_equals", "router_ties", TIED),
    ("fork_loses_a_token", "fork", BOTH),
    ("fork_is_the_same", "fork", BOTH),
    ("truncated_without_states", "truncate", CUT),
    ("states_of_the_boundary_before", "truncate", CUT),
    ("texts_swap_states", "batching", BOTH),
    ("padding_is_remembered", "padding", BOTH),
    ("ids_wrap_around", "refusal", BOTH),
    ("written_before_checked", "refusal", BOTH),
    ("equal_calls_differ", "determinism", BOTH),
]


def judged(mutant: str, prop: str, recipe: Recipe):
    """Return the worst measure of a property of a mutant on a recipe."""
    trial = Trial(mutants.find(targets.MUTANT + mutant), recipe)
    assert BY_NAME[prop].applies(trial)
    return max(check(BY_NAME[prop], trial), key=lambda m: m.ratio)


@pytest.mark.parametrize(("mutant", "prop", "recipe"), KILLED, ids=[row[0] for row in KILLED])
def test_a_planted_bug_fails_the_property_that_is_there_for_it(mutant, prop, recipe):
    worst = judged(mutant, prop, recipe)
    assert worst.ratio > 1 and "raised" not in worst.what


def test_every_mutant_and_every_property_is_in_the_table():
    assert [row[0] for row in KILLED] == [m.name for m in mutants.MUTANTS]
    assert {row[1] for row in KILLED} == set(BY_NAME)


@pytest.mark.parametrize("recipe", [BOTH, TIED, GROUPED, CUT], ids=["both", "tied", "grouped", "cut"])
def test_the_definition_in_float32_passes_every_property(recipe):
    trial = Trial(mutants.find(targets.MUTANT + "clean"), recipe)
    for prop in PROPERTIES:
        if prop.applies(trial):
            assert max(m.ratio for m in check(prop, trial)) < 1, prop.name


@pytest.mark.parametrize(
    ("mutant", "place"),
    [("l2norm_missing", "behind block 1 (kda)"), ("latent_eps_of_the_others", "behind block 2 (mla)")],
)
def test_a_failure_names_the_first_block_that_is_wrong(mutant, place):
    worst = judged(mutant, "prefill", replace(BOTH, layers="mkmk" if "l2" in mutant else "kkmk"))
    assert place in worst.what and worst.where.startswith("token ")


def test_an_exception_of_a_model_is_a_failure_that_says_so():
    def load(folder):
        raise KeyError("model.norm.weight")

    [measure] = check(BY_NAME["prefill"], Trial(load, BOTH))
    assert measure.ratio == np.inf and measure.what == "raised KeyError: 'model.norm.weight'"


def test_a_result_of_another_shape_is_a_failure():
    trial = Trial(mutants.find(targets.MUTANT + "clean"), BOTH)
    got = trial.base[0]
    [measure] = trial.agree("text 0", trial.texts[0], targets.Trace(got.hidden[:, :, :4], got.logits))
    assert measure.ratio == np.inf and "(3, 8, 4) and (8, 19) for (3, 8, 8) and (8, 19)" in measure.what


def test_nan_is_the_worst_of_all():
    trial = Trial(mutants.find(targets.MUTANT + "clean"), BOTH)
    got = trial.base[0]
    hidden = got.hidden.copy()
    hidden[1, 4, 0] = np.nan
    *_, row, overall = trial.agree("text 0", trial.texts[0], targets.Trace(hidden, got.logits))
    assert row.ratio == overall.ratio == np.inf
    assert row.where == "token 4" and "behind block 0 (kda)" in row.what


def test_limits_are_what_float32_loses_and_not_much_more():
    rows, overall = [], []
    for number in range(40):
        checkpoint = materialise(drawn(recipes(33), number))
        for text in checkpoint.texts:
            answer = definition.answer(checkpoint, text)
            run = definition.single(checkpoint, text, definition.Order(piece=3, absorbed=False, chunk=8))
            error = definition.rows(run.hidden - answer.right.hidden)
            rows.append(np.max(error / answer.legal_hidden))
            legal = np.linalg.norm(answer.legal_hidden, axis=1)
            overall.append(np.max(np.linalg.norm(error, axis=1) / legal))
    assert definition.ROW / 20 < max(rows) < definition.ROW / 2
    assert definition.OVERALL / 20 < max(overall) < definition.OVERALL / 2


def test_legal_errors_never_shrink_from_block_to_block_and_are_never_nothing():
    checkpoint = materialise(BOTH)
    answer = definition.answer(checkpoint, checkpoint.texts[0])
    assert np.all(np.diff(answer.legal_hidden, axis=0) >= 0)
    assert np.all(answer.legal_hidden >= definition.U * definition.rows(answer.right.hidden))
    assert np.all(answer.legal_logits > 0)


@pytest.mark.parametrize("order", definition.ORDERS)
def test_every_order_of_operations_is_the_definition_up_to_float32(order):
    checkpoint = materialise(BOTH)
    text = checkpoint.texts[0]
    exact, run = definition.exact(checkpoint, text), definition.single(checkpoint, text, order)
    assert 0 < np.linalg.norm(run.logits - exact.logits) < 1e-5 * np.linalg.norm(exact.logits)


def test_orders_do_not_share_their_roundings():
    checkpoint = materialise(BOTH)
    logits = [definition.single(checkpoint, checkpoint.texts[0], order).logits for order in definition.ORDERS]
    assert not any(np.array_equal(one, other) for one, other in combinations(logits, 2))


@pytest.mark.parametrize("axis", AXES)
def test_a_refused_form_is_not_drawn(axis):
    met = [drawn(recipes(33), number) for number in range(64)]
    neutral_ones = [neutral(recipe, [axis]) for recipe in met]
    assert any(one != other for one, other in zip(met, neutral_ones, strict=True))
    assert all(neutral(recipe, [axis]) == recipe for recipe in neutral_ones)


def test_a_model_that_refuses_what_is_no_form_is_refused_itself(monkeypatch):
    monkeypatch.setattr("verify.models.reference.Reference.refuses", ("rope",), raising=False)
    with pytest.raises(targets.TargetError, match="refuses must name some of lower_bound, .*, got rope"):
        targets.resolve("model:verify.models.reference:Reference")


def test_a_checkpoint_is_the_same_everywhere():
    assert materialise(BOTH).digest() == "b158e4f084614229"
    assert materialise(replace(BOTH, seed=1)).digest() != materialise(BOTH).digest()


def test_a_checkpoint_is_written_in_the_released_layout(tmp_path):
    checkpoint = materialise(BOTH)
    checkpoint.write(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensor_shapes(checkpoint.settings).keys()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 0 < index["metadata"]["total_size"] < stored


@pytest.mark.parametrize("number", range(12))
def test_routers_choose_clearly_or_are_tied_exactly(number):
    recipe = drawn(recipes(33), number)
    checkpoint = materialise(recipe)
    out = forward(checkpoint.texts[0][None], checkpoint.tensors, checkpoint.settings)
    margins = [routing.margin for routing in out.routings if routing is not None]
    assert all(np.all((margin > CLEAR) | (margin == 0 if recipe.tied else False)) for margin in margins)


def test_texts_of_other_labels_are_others_of_the_same_lengths():
    texts, others = texts_of(BOTH), texts_of(BOTH, "other")
    assert [len(text) for text in texts] == [len(text) for text in others] == [8, 6]
    assert not np.array_equal(texts[0], others[0])


@pytest.mark.parametrize("number", range(6))
def test_a_recipe_survives_json_and_fits_the_schema(number):
    recipe = drawn(recipes(33), number)
    data = json.loads(json.dumps(recipe.to_json()))
    schema = {"$ref": "#/$defs/any_recipe", "$defs": DEFINITIONS["$defs"]}
    assert Draft202012Validator(schema).is_valid(data)
    assert from_json(data) == recipe


def test_words_say_what_is_not_simplest():
    assert words(Recipe()) == "layers=k prompts=[1] tail=1"
    assert words(replace(TIED, layers="k")).startswith("layers=k prompts=[5, 3] tail=3 dense=0 width=8 kda_heads=2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "top_k must fit into top_groups of equal groups"),
        ({"groups": 4, "top_k": 3}, "top_k must fit into top_groups of equal groups"),
        ({"top_groups": 2}, "top_groups must be at most groups"),
    ],
)
def test_a_recipe_of_no_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(replace(BOTH, **change).to_json())


def test_what_is_drawn_covers_every_form():
    met = [drawn(recipes(33), number) for number in range(64)]
    for name in ("gate", "decay", "router", "shared", "taps", "count_from", "plain_eps", "full_rank_gate"):
        assert len({getattr(recipe, name) for recipe in met}) >= 2, name
    assert {"k", "m"} <= set("".join(recipe.layers for recipe in met))
    assert any(recipe.groups > recipe.top_groups > 1 for recipe in met)
    assert any(len(recipe.prompts) > 1 for recipe in met) and any(max(recipe.prompts) > 60 for recipe in met)
