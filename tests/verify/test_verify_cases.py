"""Ways to vary a case agree with the definition: a part, a reordering, a sequence on its own."""

from dataclasses import replace

import numpy as np
import pytest

from kda_spec.recurrent import recurrent
from verify.families import materialise
from verify.recipes import ACTIVATIONS, Recipe
from verify.yardstick import activated

BATCH = Recipe(dtype="float64", seed=3, B=3, T=9, H=2, G=2, K=4, V=3, gates="log_uniform", betas="uniform", state=True)
PACKED = replace(BATCH, B=1, T=9, lengths=(4, 0, 5))


def outputs(case):
    return recurrent(activated(case).inputs())


def same(x, y):
    return np.allclose(x, y, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_two_pieces_with_the_state_handed_on_are_one_run(cut):
    case = materialise(BATCH)
    whole, first = outputs(case), outputs(case.tokens(0, cut))
    second = outputs(case.tokens(cut, case.T).but(S0=first.final_state))
    assert same(np.concatenate([first.o, second.o], axis=1), whole.o)
    assert same(second.final_state, whole.final_state)


def test_only_a_piece_from_the_start_has_the_initial_state():
    case = materialise(BATCH)
    assert case.tokens(0, 3).S0 is case.S0
    assert case.tokens(1, 3).S0 is None


@pytest.mark.parametrize("recipe", [BATCH, PACKED], ids=["batch", "packed"])
def test_sequences_alone_give_their_rows_of_the_whole(recipe):
    case = materialise(recipe)
    whole = outputs(case)
    for n, (b, tokens) in enumerate(case.sequences()):
        alone = outputs(case.sequence(n))
        assert same(alone.o, whole.o[b : b + 1, tokens])
        assert same(alone.final_state, whole.final_state[n : n + 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reordered_heads_give_reordered_results(activation):
    case, order = materialise(replace(BATCH, activation=activation)), np.array([1, 0])
    values = np.array([2, 3, 0, 1])
    whole, moved = outputs(case), outputs(case.heads(order))
    assert same(moved.o, whole.o[:, :, values])
    assert same(moved.final_state, whole.final_state[:, values])


def test_a_reordered_batch_gives_reordered_results():
    case, order = materialise(BATCH), np.array([2, 0, 1])
    whole, moved = outputs(case), outputs(case.batch(order))
    assert same(moved.o, whole.o[order])
    assert same(moved.final_state, whole.final_state[order])


def test_keys_repeated_per_value_head_mean_the_same():
    case = materialise(BATCH)
    repeated = case.but(q=case.per_value_head(case.q), k=case.per_value_head(case.k))
    assert same(outputs(repeated).o, outputs(case).o)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "S0", "do", "dS"])
def test_the_digest_sees_the_last_bit_of_every_array(name):
    case = materialise(BATCH)
    x = getattr(case, name).copy()
    x[(-1,) * x.ndim] = np.nextafter(x[(-1,) * x.ndim], 5)
    assert case.but(**{name: x}).digest() != case.digest()


@pytest.mark.parametrize(
    "changes",
    [{"S0": None}, {"scale": 0.5}, {"chunk_size": 16}, {"gate_dtype": "float32"}, {"dtype": "float32"}],
    ids=str,
)
def test_the_digest_sees_every_argument(changes):
    case = materialise(BATCH)
    assert case.but(**changes).digest() != case.digest()


@pytest.mark.parametrize(
    "changes", [{"l2norm": True}, {"gate": "softplus"}, {"A_log": np.zeros(4)}, {"lower_bound": -5.0}], ids=str
)
def test_the_digest_sees_what_is_computed_inside(changes):
    case = materialise(BATCH)
    assert case.but(activation=replace(case.activation, **changes)).digest() != case.digest()
