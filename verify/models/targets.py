"""Which models can be judged, and what is asked of one: a module of its own package turns it into a `Model`.

Nothing here imports a model: a target is a name, and what stands behind it is imported when it is judged.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from verify.models.recipes import AXES
from verify.targets import TargetError

TARGETS = {"kimi_linear": "kimi_linear.verification:load"}
"""By the name on the command line, the function that loads a checkpoint: FOLDER -> Model."""

FOREIGN = "model:"
"""What the names of anybody's models begin with, before package.module:function."""

MUTANT = "model-mutant:"
"""What the names of mutants begin with."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model made of some tokens of one text.

    hidden [layers + 1, T, width]: the residual stream before the first block and behind every block; logits
    [T, vocabulary].
    """

    hidden: np.ndarray
    logits: np.ndarray


class Model(Protocol):
    """A loaded model. Its loader may have an attribute `refuses`: forms out of `recipes.AXES` that it does not take.

    What `start` and `fork` return is the model's own cache; nobody looks inside. Ids that are out of range, texts that
    do not fit and texts without a token raise ValueError, and leave the cache as it was.
    """

    def start(self, texts: int, capacity: int, boundary: int) -> Any:
        """Return an empty cache for so many texts of at most `capacity` tokens each.

        It can be truncated to multiples of `boundary` tokens; 0: to none.
        """

    def prefill(self, texts: Sequence[np.ndarray], cache: Any) -> list[Trace]:
        """Read texts of unequal length [T], all at once, behind what the cache holds of each."""

    def decode(self, ids: np.ndarray, cache: Any) -> list[Trace]:
        """Read one more token of every text, ids [texts]."""

    def fork(self, cache: Any) -> Any:
        """Return a cache that holds the same, and that goes its own way."""

    def truncate(self, cache: Any, tokens: int) -> None:
        """Forget all but the first tokens of every text: 0, or a multiple of the boundary."""


def is_model(target: str) -> bool:
    """Tell whether a target is a model, or a mutant of one."""
    return target in TARGETS or target.startswith((MUTANT, FOREIGN))


def resolve(name: str) -> Callable[[Path], Model]:
    """Return the function that loads a model from a folder. Raises TargetError where it is not there."""
    place = TARGETS.get(name) or name.removeprefix(FOREIGN)
    module, _, function = place.partition(":")
    if not (module and function):
        raise TargetError(f"{name} cannot be judged: expected {FOREIGN}package.module:function")
    try:
        load = attrgetter(function)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{name} cannot be judged: {place}: {error}") from error
    if unknown := set(refused(load)) - AXES.keys():
        raise TargetError(f"{place}.refuses must name some of {', '.join(AXES)}, got {', '.join(sorted(unknown))}")
    return load


def refused(load: Callable[[Path], Model]) -> tuple[str, ...]:
    """Return the forms of the family that a model's loader does not take."""
    return tuple(getattr(load, "refuses", ()))
