"""The limits of the gates, with how they were obtained, kept in limits.json beside this file."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from impls.contracts import PrecisionContract

FILE = Path(__file__).with_name("limits.json")


@dataclass(frozen=True)
class Limits:
    """Largest ratios that a right implementation reaches, in units of the yardstick: `row` and `overall` of gate Y,
    `pair` of two
    runs that must agree, `never` of gate R, `law` of a gradient conservation law."""

    row: float
    overall: float
    pair: float
    never: float
    law: float


def limits_for(contract: PrecisionContract, dtype: str, conditioning: str) -> Limits:
    """Return the limits of a contract class (operand > input dtype) and conditioning class; "any" where none was
    calibrated.
    """
    table = _load()["limits"]
    kind = f"{contract.operand}>{dtype}"
    return Limits(**table.get(f"{kind} {conditioning}", table[f"any {conditioning}"])["limits"])


@functools.cache
def _load() -> dict:
    return json.loads(FILE.read_text())
