"""The limits of the gates, with how they were obtained, kept in limits.json beside this file."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from impls.contracts import PrecisionContract

FILE = Path(__file__).with_name("limits.json")


@dataclass(frozen=True)
class Limits:
    """Largest ratios that right implementations reach, in units of the yardstick."""

    row: float
    """Gate Y: one row against the definition."""
    row_overall: float
    """Gate Y: a whole tensor against the definition."""
    rounded: float
    """The same for tensors rounded to a dtype narrower than the accumulator: that rounding is most of their error."""
    rounded_overall: float
    """A whole tensor of that kind."""
    pair: float
    """One row of two runs that must agree: each may err."""
    pair_overall: float
    """A whole tensor of two runs that must agree."""
    never: float
    """Gate R: one row against the running bound with constant 1."""
    law: float
    """A conservation law of the gradients against the sum of what its terms may err."""

    def overall(self, gate: str) -> float:
        """Return the limit of a whole tensor for gate "row", "rounded" or "pair"."""
        return getattr(self, f"{gate}_overall")


START = Limits(
    row=3.0, row_overall=2.0, rounded=3.0, rounded_overall=2.0, pair=6.0, pair_overall=4.0, never=4.0, law=3.0
)
"""The design's starting values: they hold where nothing was calibrated, and no calibrated limit is sharper, but one."""


def limits_for(contract: PrecisionContract, dtype: str, conditioning: str) -> Limits:
    """Return the limits of a contract (operand > input dtype) and conditioning class; "any" where there is none."""
    table = load()["limits"]
    kind = f"{contract.operand}>{dtype}"
    return Limits(**table.get(f"{kind} {conditioning}", table[f"any {conditioning}"])["limits"])


@functools.cache
def load() -> dict:
    """Read limits.json."""
    return json.loads(FILE.read_text())
