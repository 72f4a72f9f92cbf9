"""The synthetic tasks: what is drawn is what a solver that reads the ids alone would answer, and nothing else is."""

import pytest
import torch

from kimi_linear.synthetic.tasks import IGNORED, STACKS, TASKS, Batch, TaskError, batch, check

PRINTED = {  # the paper's own examples, section 5.1
    "palindrome": ("O G R S U N E | E N U S R G O", ". . . . . . . . N U S R G O ."),
    "mqar": ("A 1 C 3 B 0 M 8 G 5 E 4 | B G", ". . . . . . . . . . . . . 0 5"),
    "stack": ("+ 1 G + 0 E + 1 U - 0 E - 1 U - 1 G", ". . . . . . . . . . E . . U . . G ."),
}


def numbers(task: str, text: str, alphabet: int) -> list[int | None]:
    """Return the ids of a printed example: letters from 0 on, digits as values or stacks, signs by their place."""
    signs = {"|": alphabet * (2 if task == "mqar" else 1), "+": alphabet + STACKS, "-": alphabet + STACKS + 1}
    of = lambda x: alphabet + int(x) if x.isdigit() else ord(x) - ord("A")  # noqa: E731
    return [None if x == "." else signs[x] if x in signs else of(x) for x in text.split()]


@pytest.mark.parametrize("name", TASKS)
def test_the_papers_example_is_solved_as_printed(name):
    ids, answers = (numbers(name, text, 26) for text in PRINTED[name])
    assert TASKS[name](24, 26).solve(ids) == answers


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [8, 9, 64, 257])
def test_every_answer_is_the_solvers(name, length):
    task = TASKS[name](length, 128)
    drawn = batch(task, (5,), 7, 32)
    check(task, drawn)
    assert drawn.ids.shape == drawn.answers.shape
    assert length - 2 <= drawn.ids.shape[1] <= length
    assert drawn.ids.min() >= 0 and drawn.ids.max() < task.vocabulary
    assert drawn.mask.any() and drawn.answers[drawn.mask].min() >= 0


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_answer_is_found(name):
    task = TASKS[name](24, 16)
    drawn = batch(task, (0,), 0, 4)
    b, t = drawn.mask.nonzero()[-1].tolist()
    wrong = drawn.answers.clone()
    wrong[b, t] += 1
    with pytest.raises(TaskError, match=f"{name}: sequence {b}, token {t}: expected the answer"):
        check(task, Batch(drawn.ids, wrong))
    missing = drawn.answers.clone()
    missing[b, t] = IGNORED
    with pytest.raises(TaskError, match=f"token {t}"):
        check(task, Batch(drawn.ids, missing))


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(name):
    task = TASKS[name](48, 32)
    first, again, other, later = (batch(task, (seed,), step, 8).ids for seed, step in ((1, 2), (1, 2), (2, 2), (1, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, later)


def test_half_of_the_stacks_operations_are_pops_and_all_stacks_are_met():
    task = TASKS["stack"](600, 16)
    ids = batch(task, (0,), 0, 64).ids.view(64, -1, 3)
    pops = (ids[..., 0] == 16 + STACKS + 1).double().mean().item()
    assert 0.45 < pops < 0.5  # an empty stack is never popped
    assert set(ids[..., 1].flatten().tolist()) == set(range(16, 16 + STACKS))


def test_no_letter_of_a_palindrome_comes_twice_and_all_come_at_every_place():
    ids = batch(TASKS["palindrome"](33, 20), (0,), 0, 512).ids[:, :16]
    assert all(len(set(row.tolist())) == 16 for row in ids)
    assert all(set(column.tolist()) == set(range(20)) for column in ids.T)


def test_mqar_asks_every_key_before_it_asks_one_again():
    task = TASKS["mqar"](65, 40)
    ids = batch(task, (0,), 0, 8).ids
    keys, asked = ids[:, : 2 * task.pairs : 2].sort(1).values, ids[:, 2 * task.pairs + 1 :]
    assert all(len(set(row.tolist())) == task.pairs for row in keys)
    assert torch.equal(asked[:, : task.pairs].sort(1).values, keys)


@pytest.mark.parametrize(
    ("name", "length", "alphabet", "message"),
    [
        ("palindrome", 4, 26, "length of palindrome must be at least 5 tokens, got 4"),
        ("palindrome", 64, 30, "alphabet of palindrome must have at least 31 letters at length 64, got 30"),
        ("mqar", 64, 15, "alphabet of mqar must have at least 16 letters at length 64, got 15"),
        ("stack", 64, 1, "alphabet of stack must have at least 2 letters at length 64, got 1"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name, length, alphabet, message):
    with pytest.raises(TaskError, match=message):
        TASKS[name](length, alphabet)
