"""One recipe against one model: checkpoint, loaded model and right answers are made once, for all properties."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from verify.models.checkpoints import Checkpoint, materialise
from verify.models.definition import OVERALL, ROW, Answer, answer, joined, rows
from verify.models.recipes import Recipe
from verify.models.targets import Model, Trace
from verify.trial import Measure, blame

ROOM = 512
"""Tokens that a cache has beyond those that a text needs, where the room behind it is in question."""


class Trial:
    """A recipe materialised for a model. Attributes are computed when first read."""

    def __init__(self, load: Callable[[Path], Model], recipe: Recipe):
        self._load, self.recipe, self.runs = load, recipe, 0
        self._answers: dict[bytes, Answer] = {}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The configuration, tensors and texts."""
        return materialise(self.recipe)

    @cached_property
    def model(self) -> Model:
        """The model, loaded from a folder in the released layout."""
        with tempfile.TemporaryDirectory() as folder:
            self.checkpoint.write(Path(folder))
            with blame():
                return self._load(Path(folder))

    @property
    def texts(self) -> tuple[np.ndarray, ...]:
        """The texts of the recipe, prompt and tail."""
        return self.checkpoint.texts

    @property
    def prompts(self) -> list[np.ndarray]:
        """The texts without their tails."""
        return [text[: len(text) - self.recipe.tail] for text in self.texts]

    def answer(self, text: np.ndarray) -> Answer:
        """Return what is right for a text, and what may be lost on it."""
        key = np.asarray(text, np.int64).tobytes()
        if key not in self._answers:
            self._answers[key] = answer(self.checkpoint, text)
        return self._answers[key]

    def start(self, texts: Iterable[np.ndarray], room: int = 0, boundary: int = 0) -> Any:
        """Return an empty cache in which the texts fit, exactly or with room behind."""
        texts, model = list(texts), self.model
        with blame():
            return model.start(len(texts), max(map(len, texts)) + room, boundary)

    def prefill(self, texts: list[np.ndarray], cache: Any) -> list[Trace]:
        """Let the model read texts at once."""
        self.runs, model = self.runs + 1, self.model
        with blame():
            return model.prefill(texts, cache)

    def decode(self, ids: Iterable[int], cache: Any) -> list[Trace]:
        """Let the model read one more token of every text."""
        self.runs, model = self.runs + 1, self.model
        with blame():
            return model.decode(np.asarray(list(ids)), cache)

    def fork(self, cache: Any) -> Any:
        """Let the model fork a cache."""
        model = self.model
        with blame():
            return model.fork(cache)

    def truncate(self, cache: Any, tokens: int) -> None:
        """Let the model cut a cache back."""
        model = self.model
        with blame():
            model.truncate(cache, tokens)

    def steps(self, texts: Iterable[np.ndarray], cache: Any) -> list[Trace]:
        """Let the model decode texts of one length, token by token; returns one trace of each."""
        parts = [self.decode(column, cache) for column in np.stack(list(texts), axis=1)]
        return [joined(list(own)) for own in zip(*parts, strict=True)]

    def read(self, texts: list[np.ndarray], tail: int, room: int = 0) -> list[Trace]:
        """Let the model read texts in a fresh cache: all but the last `tail` tokens at once, those step by step."""
        cache = self.start(texts, room)
        begun = self.prefill([text[: len(text) - tail] for text in texts], cache)
        if not tail:
            return begun
        ended = self.steps([text[len(text) - tail :] for text in texts], cache)
        return [joined(list(own)) for own in zip(begun, ended, strict=True)]

    @cached_property
    def base(self) -> list[Trace]:
        """The texts of the recipe together, prompts at once and tails step by step."""
        return self.read(list(self.texts), self.recipe.tail)

    def agree(self, what: str, text: np.ndarray, got: Trace, first: int = 0) -> Iterator[Measure]:
        """Measure what a model made of the tokens of a text from `first` on, against what is right for them."""
        right, last = self.answer(text), first + len(got.logits)
        hidden, exact = right.right.hidden[:, first:last], right.right.logits[first:last]
        if got.hidden.shape != hidden.shape or got.logits.shape != exact.shape:
            shapes = f"{got.hidden.shape} and {got.logits.shape} for {hidden.shape} and {exact.shape}"
            yield Measure(f"{what}: shapes {shapes}", float("inf"), 0)
            return
        places = ["in the embedding"]
        places += [f"behind block {i} ({_KINDS[kind]})" for i, kind in enumerate(self.recipe.layers)]
        errors = [*rows(got.hidden - hidden), rows(got.logits - exact)]
        legal = [*right.legal_hidden[:, first:last], right.legal_logits[first:last]]
        yield from _first_wrong(what, [*places, "in the logits"], errors, legal, first)


_KINDS = {"k": "kda", "m": "mla"}


def _first_wrong(what: str, places: list[str], errors: list, legal: list, first: int) -> Iterator[Measure]:
    """Yield the measures of all places up to the first that is wrong: what follows from it tells nothing."""
    for place, error, allowed in zip(places, errors, legal, strict=True):
        ratios = error / allowed
        worst = int(np.argmax(np.where(np.isnan(ratios), np.inf, ratios)))
        where = f"token {first + worst}"
        found = [
            Measure(f"{what}, {place}", float(ratios[worst]), ROW, len(ratios), where, "row"),
            Measure(
                f"{what}, {place}, overall", float(np.linalg.norm(error) / np.linalg.norm(allowed)), OVERALL, 1, where
            ),
        ]
        yield from found
        if any(m.ratio > 1 for m in found):
            return
