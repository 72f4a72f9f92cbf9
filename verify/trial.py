"""One recipe against one target: base call, definition and yardstick are computed once, for all properties."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from verify import yardstick
from verify.budget import BACKWARD, cost
from verify.cases import Case
from verify.exact import UNIT_ROUNDOFF, Dice
from verify.families import materialise
from verify.limits import Limits, limits_for
from verify.plan import Demands
from verify.recipes import Recipe
from verify.stopwatch import WATCH
from verify.targets import Result, Target, call
from verify.yardstick import Yardstick, rows


@dataclass(frozen=True)
class Measure:
    """One judged number: observed against allowed. A ratio above 1 fails; bitwise claims have ratio 0 or infinity."""

    what: str
    observed: float
    allowed: float
    rows: int = 1
    where: str = ""
    gate: str = "exact"
    """Which calibrated limit is `allowed`, or "exact" where none is."""

    @property
    def ratio(self) -> float:
        """Observed over allowed; infinity where nothing was allowed, or where the observation is not a number."""
        if np.isnan(self.observed):
            return float("inf")
        if self.allowed == 0:
            return 0.0 if self.observed == 0 else float("inf")
        return self.observed / self.allowed


class TargetRaised(Exception):
    """The target raised, or returned something else than (o, final_state); the message names what."""


@contextlib.contextmanager
def blame() -> Iterator[None]:
    """Turn whatever comes out of a target into TargetRaised, so that the judge's own errors stay apart from it."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise TargetRaised(f"{type(error).__name__}: {first}") from error


class Trial:
    """A recipe materialised for a target. Attributes are computed when first read."""

    def __init__(self, target: Target, recipe: Recipe, demands: Demands = Demands()):  # noqa: B008 - frozen
        self.target, self.recipe, self.demands = target, recipe, demands
        self.contract = target.contract(recipe.dtype)
        self.runs = 0
        self.units = 0
        self.met: dict[str, int] = {}
        """What properties found out that the demands came to: repeats, pairs, programs; empty until they ran."""

    @cached_property
    def case(self) -> Case:
        """The arrays."""
        return materialise(self.recipe)

    @cached_property
    def inputs(self) -> str:
        """The hash of the arguments and of every input bit."""
        return self.case.digest()

    @cached_property
    def limits(self) -> Limits:
        """Calibrated limits of this contract, dtype and conditioning class."""
        return limits_for(self.contract, self.recipe.dtype, self.recipe.conditioning)

    @cached_property
    def forward(self) -> Result:
        """The base call."""
        return self.run(self.case)

    @cached_property
    def both(self) -> Result:
        """The base call with gradients of every input."""
        return self.run(self.case, backward=True)

    @cached_property
    def yard(self) -> Yardstick:
        """The definition and the yardstick of the base case, with gradients where the target has them."""
        return yardstick.measure(self.case, self.contract, self.differentiable)

    @property
    def differentiable(self) -> bool:
        """True if gradients are judged."""
        return self.target.backward and "backward" not in self.target.refused

    def dice(self, label: str) -> Dice:
        """Return draws that belong to this recipe and a property."""
        return Dice(self.recipe.seed, "property", label, self.recipe.T, self.recipe.K)

    def run(self, case: Case, **how) -> Result:
        """Call the target on a case, and count it and its work."""
        self.count(case, BACKWARD if how.get("backward") else 1)
        with blame(), WATCH.on("target"):
            result = call(self.target, case, **how)
            result.check_shapes(case)
            return result

    def count(self, case: Case, times: int = 1) -> None:
        """Count a call on a case, and its work, so many times that of a forward."""
        self.runs += 1
        self.units += times * cost(self.target.form, case)

    def judge(
        self,
        got: dict[str, np.ndarray],
        exact: dict[str, np.ndarray],
        yard: Yardstick | None = None,
        gate: str = "row",
        label: str = "",
    ) -> Iterable[Measure]:
        """Measure every tensor's rows against what is exact, in units of this case's yardstick or another's."""
        legal = (yard or self.yard).legal
        for name, x in got.items():
            of_tensor = "rounded" if gate == "row" and self._rounds(name) else gate
            yield from self.against(label + name, name, x, exact[name], legal[name], of_tensor)

    def _rounds(self, name: str) -> bool:
        """True if a tensor's dtype is narrower than the accumulator's."""
        return UNIT_ROUNDOFF[yardstick.dtype_of(self.case, name)] > UNIT_ROUNDOFF[self.contract.accumulator]

    def against(
        self, what: str, name: str, got: np.ndarray, exact: np.ndarray, legal: np.ndarray, gate: str
    ) -> Iterable[Measure]:
        """Apply gate Y to one tensor: its worst row and the whole, in units of legal error."""
        if got.shape != exact.shape:
            yield Measure(f"{what} shape {got.shape} for {exact.shape}", float("inf"), 0)
            return
        judged = np.isfinite(legal)
        if not np.any(judged):
            return
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.where(judged, np.linalg.norm(rows(name, got) - rows(name, exact), axis=-1), 0.0)
            ratios = error / legal
            whole = float(np.linalg.norm(error) / np.linalg.norm(legal[judged]))
        worst = np.argmax(np.where(np.isnan(ratios), np.inf, ratios))
        where = f"row {tuple(int(i) for i in np.unravel_index(worst, ratios.shape))}" if ratios.ndim else ""
        row = float(ratios.reshape(-1)[worst])
        yield Measure(what, row, getattr(self.limits, gate), int(judged.sum()), where, gate)
        yield Measure(f"{what} overall", whole, self.limits.overall(gate), 1, where, f"{gate} overall")

    def agree(self, case: Case, result: Result, label: str = "") -> Iterable[Measure]:
        """Measure a result of another case against the definition of that case."""
        yield from self.agree_numbers(case, result.numbers(), bool(result.grads), label)

    def agree_numbers(
        self, case: Case, got: dict[str, np.ndarray], backward: bool = False, label: str = ""
    ) -> Iterable[Measure]:
        """Do the same for numbers that came from several calls."""
        yard = yardstick.measure(case, self.contract, backward)
        yield from self.judge(got, yard.exact, yard, label=label)

    def pair(
        self, got: dict[str, np.ndarray], other: dict[str, np.ndarray], yard: Yardstick | None = None
    ) -> Iterable[Measure]:
        """Measure two runs that must agree within rounding: each may err by its own limit."""
        yield from self.judge(got, other, yard, gate="pair")


def same_bits(what: str, got: torch.Tensor, expected: torch.Tensor) -> Measure:
    """Count the elements that differ in any bit of their value (NaN equals NaN, 0 equals -0)."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Measure(
            f"{what}: {tuple(got.shape)} {got.dtype} for {tuple(expected.shape)} {expected.dtype}", float("inf"), 0
        )
    if torch.equal(got, expected):  # a fifth of the time of what follows
        return Measure(f"{what} bitwise", 0, 0, got.numel())
    different = ~((got == expected) | (got.isnan() & expected.isnan()))
    count = int(different.sum())
    where = "" if not count else f"element {tuple(int(i) for i in different.nonzero()[0])}"
    return Measure(f"{what} bitwise", count, 0, got.numel(), where)
