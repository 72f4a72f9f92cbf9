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
class Condition:
    """When a property can be asked: a test of a trial, and how a person would say it."""

    words: str
    holds: Callable[[Trial], bool]

    def __call__(self, trial: Trial) -> bool:
        return self.holds(trial)


def condition(words: str) -> Callable[[Callable[[Trial], bool]], Condition]:
    """Make a condition out of a function of a trial."""
    return lambda holds: Condition(words, holds)


ANY = Condition("any case", lambda trial: True)


@dataclass(frozen=True)
class Property:
    """A named claim about any implementation: `applies` says whether a trial can show it, `check` measures it."""

    name: str
    kind: str
    check: Callable[[Trial], Iterable[Measure]]
    applies: Condition
    most: int | None = None
    """Recipes of a dtype on which it is asked at most, and as many with gates of minus infinity; None: on all."""

    @property
    def explanation(self) -> str:
        """Its equation, and the bugs that it would have caught."""
        return inspect.getdoc(self.check)

    @property
    def precondition(self) -> str:
        """When it can be asked, in words."""
        most = f"; {self.most} cases of a dtype at most" if self.most else ""
        return self.applies.words + most


def claim(kind: str, applies: Condition = ANY, most: int | None = None) -> Callable[[Callable], Property]:
    """Make a property out of a function; its name is the function's, its explanation the docstring."""
    assert kind in KINDS

    def decorate(check: Callable[[Trial], Iterable[Measure]]) -> Property:
        return Property(check.__name__, kind, check, applies, most)

    return decorate


@condition("at least one token")
def tokens(trial: Trial) -> bool:
    """At least one token."""
    return trial.recipe.T > 0


@condition("one batch of equal sequences with at least one token")
def unpacked(trial: Trial) -> bool:
    """One batch of equal sequences with at least one token."""
    return not trial.recipe.lengths and trial.recipe.T > 0


@condition("one batch of equal sequences with at least one token, q to beta activated before the call")
def plain(trial: Trial) -> bool:
    """The op gets activated inputs, one batch of equal sequences with at least one token."""
    return trial.recipe.plain and unpacked(trial)


@condition("the target has gradients, and there is at least one token")
def gradients(trial: Trial) -> bool:
    """The target has gradients, and there is at least one token."""
    return trial.differentiable and trial.recipe.T > 0


def takes(axis: str) -> Condition:
    """The target does not refuse an axis of the domain."""
    return Condition(f"the target takes {axis}", lambda trial: axis not in trial.target.refused)


def more(size: str, least: int = 1) -> Condition:
    """A size of the recipe is larger than `least`."""
    return Condition(f"{size} > {least}", lambda trial: getattr(trial.recipe, size) > least)


def every(*conditions: Condition) -> Condition:
    """All conditions hold."""
    return Condition(
        "; ".join(c.words for c in conditions), lambda trial: all(condition(trial) for condition in conditions)
    )
