"""Generation: what is chosen follows from prompt, options and seed, not from neighbours, pieces or streaming."""

import pytest
import torch

from kimi_linear import CacheError
from kimi_linear.sampling import Sampling, choose

PROMPTS = [list(range(5)), list(range(40, 90)), [7]]
LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0]).log()  # probabilities 1/6, 1/2, 1/3, 0


def greedy_by_hand(model, prompt: list[int], count: int) -> list[int]:
    made = []
    for _ in range(count):
        logits = model.prefill([prompt + made], model.cache(1, len(prompt) + count))
        made.append(int(logits[0].argmax()))
    return made


def test_greedy_takes_the_likeliest_id_of_every_whole_text(model):
    found = model.generate(PROMPTS, max_new_tokens=12, stop=())
    assert found == [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_a_prompt_is_continued_alone_as_among_others(model, options):
    together = model.generate(PROMPTS, max_new_tokens=20, seed=5, stop=(), chunk=16, **options)
    for row, prompt in enumerate(PROMPTS):
        assert model.generate([prompt], max_new_tokens=20, seed=5 + row, stop=(), **options) == [together[row]]


def test_equal_seeds_choose_equally_and_others_do_not(model):
    first, again, other = (
        model.generate(PROMPTS, max_new_tokens=20, temperature=1.0, seed=seed, stop=()) for seed in (1, 1, 100)
    )
    assert first == again != other


def test_a_prompt_ends_with_its_stop_id_and_the_others_go_on(model):
    whole = model.generate(PROMPTS, max_new_tokens=20, stop=())
    stop = whole[0][3]
    found = model.generate(PROMPTS, max_new_tokens=20, stop=(stop,))
    for cut, full in zip(found, whole, strict=True):
        assert cut == (full[: full.index(stop) + 1] if stop in full else full)


def test_the_stop_ids_of_the_configuration_are_the_default(model, monkeypatch):
    [whole] = model.generate([[3]], max_new_tokens=8, stop=())
    changed = model.config.__class__.from_json(model.config.to_json() | {"eos_token_id": whole[2]})
    monkeypatch.setattr(model, "config", changed)
    [found] = model.generate([[3]], max_new_tokens=8)
    assert found == whole[: whole.index(whole[2]) + 1]


def test_a_stream_says_what_generate_returns(model):
    steps = list(model.stream(PROMPTS, max_new_tokens=6, stop=()))
    assert [[row for row, _ in pairs] for pairs in steps] == [[0, 1, 2]] * 6
    assert [[pairs[row][1] for pairs in steps] for row in range(3)] == model.generate(
        PROMPTS, max_new_tokens=6, stop=()
    )


def test_a_cache_goes_on_where_the_last_turn_ended(model):
    cache = model.cache(1, 60)
    [first] = model.generate([[1, 2, 3]], max_new_tokens=5, stop=(), cache=cache)
    assert cache.lengths == (7,)
    [second] = model.generate([[first[-1], 9]], max_new_tokens=5, stop=(), cache=cache)
    assert second == greedy_by_hand(model, [1, 2, 3, *first, 9], 5)


BAD = {
    "no tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
    "nan": ({"temperature": float("nan")}, ValueError, "temperature"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be at least 1"),
    "top_p": ({"top_p": 0.0}, ValueError, "top_p must be in"),
    "no prompt": ({"prompts": []}, ValueError, "at least one sequence"),
    "empty prompt": ({"prompts": [[1], []]}, ValueError, "prompt 1 must be one or more ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_the_first_id(model, name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        model.stream(**({"prompts": [[1]]} | options))


def test_a_prompt_that_does_not_fit_changes_no_cache(model):
    cache = model.cache(1, 10)
    with pytest.raises(CacheError, match="holds 10 tokens per sequence: sequence 0 has 0 and gets 11"):
        model.stream([[1] * 4], max_new_tokens=8, cache=cache)
    assert cache.lengths == (0,)


def drawn(**options) -> torch.Tensor:
    """Return how often each id is drawn from LOGITS in 4,000 draws."""
    sampling = Sampling(**{"temperature": 1.0, "seed": 0} | options)
    [generator] = sampling.generators(1)
    ids = [choose(LOGITS[None], sampling, [generator])[0] for _ in range(4000)]
    return torch.bincount(torch.tensor(ids), minlength=4) / 4000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 6, 1 / 2, 1 / 3, 0]),
        ({"top_k": 2}, [0, 3 / 5, 2 / 5, 0]),
        ({"top_k": 9}, [1 / 6, 1 / 2, 1 / 3, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 3 / 5, 2 / 5, 0]),
        ({"top_p": 1.0}, [1 / 6, 1 / 2, 1 / 3, 0]),
        ({"temperature": 0.5}, [1 / 14, 9 / 14, 4 / 14, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 1, "top_p": 0.1}, [0, 1, 0, 0]),
    ],
)
def test_ids_are_drawn_as_often_as_they_are_likely(options, expected):
    assert (drawn(**options) - torch.tensor(expected)).abs().max() < 0.03  # four standard deviations


def test_of_equally_likely_ids_the_lowest_is_taken():
    assert choose(torch.zeros(3, 50), Sampling(), [])[0] == 0
