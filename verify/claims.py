"""The record of one property: a function from a trial to measures, with what it claims and when it can be asked."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from verify.trial import Measure, Trial

KINDS = {
    "bitwise": "every bit must agree, without any tolerance",
    "tolerance": "errors are measured row by row in units of what legal roundings lose in the same case (gate Y)",
    "bound": "an exact zero, or a finite number, that no rounding can break",
}


@dataclass(frozen=True)
class Property:
    """A named claim about any implementation: `applies` says whether a trial can show it, `check` measures it."""

    name: str
    kind: str
    check: Callable[[Trial], Iterable[Measure]]
    applies: Callable[[Trial], bool]
    most: int | None = None
    """Recipes of a dtype on which it is asked at most, and as many with gates of minus infinity; None: on all."""

    @property
    def explanation(self) -> str:
        """Its equation, its precondition, and the bugs that it would have caught."""
        return inspect.getdoc(self.check)


def claim(
    kind: str, applies: Callable[[Trial], bool] = lambda trial: True, most: int | None = None
) -> Callable[[Callable], Property]:
    """Make a property out of a function; its name is the function's, its explanation the docstring."""
    assert kind in KINDS

    def decorate(check: Callable[[Trial], Iterable[Measure]]) -> Property:
        return Property(check.__name__, kind, check, applies, most)

    return decorate


def plain(trial: Trial) -> bool:
    """The op gets activated inputs, one batch of equal sequences with at least one token."""
    return trial.recipe.plain and unpacked(trial)


def unpacked(trial: Trial) -> bool:
    """One batch of equal sequences with at least one token."""
    return not trial.recipe.lengths and trial.recipe.T > 0


def tokens(trial: Trial) -> bool:
    """At least one token."""
    return trial.recipe.T > 0


def gradients(trial: Trial) -> bool:
    """The target has gradients, and there is at least one token."""
    return trial.differentiable and trial.recipe.T > 0


def takes(axis: str) -> Callable[[Trial], bool]:
    """The target does not refuse an axis of the domain."""
    return lambda trial: axis not in trial.target.refused


def every(*conditions: Callable[[Trial], bool]) -> Callable[[Trial], bool]:
    """All conditions hold."""
    return lambda trial: all(condition(trial) for condition in conditions)
