"""The tasks of section 5.1: what is read, what is to be answered where, and a solver of each that knows nothing else.

    palindrome   O G R <sep> R G O             at R, G behind <sep>: the letter that comes next
    mqar         A 1 C 3 B 0 <sep> B A         at each query: the value that stood behind that key
    stack        <push> 1 G <pop> 1 G          at the 1 behind <pop>: what lies on top of that stack

Answers stand where they are asked for, IGNORED elsewhere: that is the mask of the loss. A batch is a function of task,
seed and step alone, so that a run that goes on needs nothing but its step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100
"""What `torch.nn.functional.cross_entropy` leaves out."""
STACKS = 64
"""Independent stacks, as in the paper."""


class TaskError(ValueError):
    """A task that cannot be: too short, or with too few letters."""


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens: ids [B, T] and answers [B, T], int64."""

    ids: torch.Tensor
    answers: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Return where an answer is asked for [B, T], bool."""
        return self.answers != IGNORED


@dataclass(frozen=True)
class Task:
    """What all tasks have: a length in tokens, and an alphabet of letters from id 0 on."""

    length: int
    alphabet: int

    name = ""
    shortest = 0
    letters = 1
    """Letters for each token of the length, where nobody asks for another alphabet."""

    def __post_init__(self):
        if self.length < self.shortest:
            raise TaskError(f"length of {self.name} must be at least {self.shortest} tokens, got {self.length}")
        if self.alphabet < self.fewest:
            raise TaskError(
                f"alphabet of {self.name} must have at least {self.fewest} letters at length {self.length}, "
                f"got {self.alphabet}"
            )

    @property
    def fewest(self) -> int:
        """Return the fewest letters that leave something to be answered."""
        return 2


class Palindrome(Task):
    """Say random letters backwards: n letters, <sep>, the same reversed, n = (length - 1) // 2.

    Ids: letters 0 to A - 1, <sep> = A. The letters of a sequence are distinct, and the first behind <sep> is given, as
    in the paper's example.
    """

    name, shortest = "palindrome", 5

    @property
    def fewest(self) -> int:
        """Return the fewest letters: none comes twice."""
        return max(2, self.said)

    @property
    def said(self) -> int:
        """Return n."""
        return (self.length - 1) // 2

    @property
    def vocabulary(self) -> int:
        """Return the number of ids."""
        return self.alphabet + 1

    @property
    def described(self) -> str:
        """Say what the paper does not: sizes."""
        return f"{self.said} of {self.alphabet} letters"

    def draw(self, rng: np.random.Generator, B: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and answers [B, 2 n + 1]."""
        n = self.said
        letters = np.argsort(rng.random((B, self.alphabet)), axis=1)[:, :n]
        ids = np.concatenate((letters, np.full((B, 1), self.alphabet), letters[:, ::-1]), axis=1)
        answers = np.full_like(ids, IGNORED)
        answers[:, n + 1 : -1] = ids[:, n + 2 :]
        return ids, answers

    def solve(self, ids: Sequence[int]) -> list[int | None]:
        """Return what is to be answered at each token of one sequence, None where nothing is."""
        n = ids.index(self.alphabet)
        backwards = ids[n - 1 :: -1] if n else []
        return [None] * (n + 1) + list(backwards[1:]) + [None]


class Mqar(Task):
    """Recall values by their keys: P pairs, <sep>, queries to the end of the sequence, P = length // 4.

    Ids: keys 0 to A - 1, values A to 2 A - 1, <sep> = 2 A. The keys of a sequence are distinct; its queries are the
    keys in random order, and again in another one where they are more.
    """

    name, shortest, letters = "mqar", 8, 2

    @property
    def fewest(self) -> int:
        """Return the fewest letters: every pair has a key of its own."""
        return max(2, self.pairs)

    @property
    def pairs(self) -> int:
        """Return P."""
        return self.length // 4

    @property
    def vocabulary(self) -> int:
        """Return the number of ids."""
        return 2 * self.alphabet + 1

    @property
    def described(self) -> str:
        """Say what the paper does not: sizes."""
        return f"{self.pairs} pairs of {self.alphabet} keys and values, {self.length - 2 * self.pairs - 1} queries"

    def draw(self, rng: np.random.Generator, B: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and answers [B, length]."""
        P, A, queries = self.pairs, self.alphabet, self.length - 2 * self.pairs - 1
        keys = np.argsort(rng.random((B, A)), axis=1)[:, :P]
        values = rng.integers(A, 2 * A, (B, P))
        rounds = [np.argsort(rng.random((B, P)), axis=1) for _ in range(-(-queries // P))]
        asked = np.concatenate(rounds, axis=1)[:, :queries]
        pairs = np.stack((keys, values), axis=2).reshape(B, 2 * P)
        ids = np.concatenate((pairs, np.full((B, 1), 2 * A), np.take_along_axis(keys, asked, 1)), axis=1)
        answers = np.full_like(ids, IGNORED)
        answers[:, 2 * P + 1 :] = np.take_along_axis(values, asked, 1)
        return ids, answers

    def solve(self, ids: Sequence[int]) -> list[int | None]:
        """Return what is to be answered at each token of one sequence, None where nothing is."""
        sep = ids.index(2 * self.alphabet)
        memory = dict(zip(ids[:sep:2], ids[1:sep:2], strict=True))
        return [None] * (sep + 1) + [memory[key] for key in ids[sep + 1 :]]


class Stack(Task):
    """Keep STACKS stacks: operations of three tokens, <push> s x and <pop> s x, length // 3 of them.

    Ids: elements 0 to A - 1, stacks A to A + 63, <push> = A + 64, <pop> = A + 65. Every second operation is a pop in
    the mean, from any of the stacks that are not empty, the others push to any stack.
    """

    name, shortest = "stack", 6

    @property
    def vocabulary(self) -> int:
        """Return the number of ids."""
        return self.alphabet + STACKS + 2

    @property
    def described(self) -> str:
        """Say what the paper does not: sizes."""
        return f"{self.length // 3} operations on {STACKS} stacks, {self.alphabet} elements"

    def draw(self, rng: np.random.Generator, B: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and answers [B, 3 n]; answers stand at the stack's number."""
        n, A, rows = self.length // 3, self.alphabet, np.arange(B)
        element = rng.integers(0, A, (n, B))
        pops, luck = rng.random((n, B)) < 0.5, rng.random((n, B, STACKS), dtype=np.float32) + 1
        number = np.empty((n, B), dtype=np.int64)
        top, below = np.full((B, STACKS), -1), np.empty((n, B), dtype=np.int64)  # operations, by their index
        for i in range(n):
            full = top >= 0
            pop = pops[i] = pops[i] & full.any(1)
            s = number[i] = np.where(pop[:, None], luck[i] * full, luck[i]).argmax(1)
            before = top[rows, s]
            element[i] = np.where(pop, element[before, rows], element[i])
            below[i] = before
            top[rows, s] = np.where(pop, below[before, rows], i)
        ids = np.stack((np.where(pops, A + STACKS + 1, A + STACKS), A + number, element), axis=2)
        answers = np.full_like(ids, IGNORED)
        answers[:, :, 1] = np.where(pops, element, IGNORED)
        return tuple(x.transpose(1, 0, 2).reshape(B, 3 * n) for x in (ids, answers))

    def solve(self, ids: Sequence[int]) -> list[int | None]:
        """Return what is to be answered at each token of one sequence, None where nothing is."""
        stacks: dict[int, list[int]] = {}
        answers: list[int | None] = []
        for operation, stack, element in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
            if operation == self.alphabet + STACKS:
                stacks.setdefault(stack, []).append(element)
                answers += [None, None, None]
            else:
                answers += [None, stacks[stack].pop(), None]
        return answers


TASKS: dict[str, type[Task]] = {task.name: task for task in (Palindrome, Mqar, Stack)}


def batch(task: Task, seed: tuple[int, ...], step: int, B: int) -> Batch:
    """Return batch number `step` of a seed (numbers): B sequences, the same on every machine with one NumPy."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, step))))
    ids, answers = task.draw(rng, B)
    return Batch(torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(np.ascontiguousarray(answers)))


def check(task: Task, drawn: Batch) -> None:
    """Solve every sequence of a batch from its ids alone; TaskError names the first answer that is another one."""
    for b, (ids, answers) in enumerate(zip(drawn.ids.tolist(), drawn.answers.tolist(), strict=True)):
        for t, (wanted, got) in enumerate(zip(task.solve(ids), answers, strict=True)):
            if got != (IGNORED if wanted is None else wanted):
                raise TaskError(f"{task.name}: sequence {b}, token {t}: expected the answer {wanted}, got {got}")
