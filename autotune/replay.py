"""Recorded trials of a real run: kept as a table, and played back, so that all behind the clock runs without it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from autotune.clock import Standing
from autotune.outcomes import UsageError
from autotune.search import FAILED, MEASURED, Outcome
from autotune.store import write
from autotune.timing import Box, Spread
from impls import tuned

KIND, SCHEMA = "trials", 1


def recorded(implementation: str, shape: tuned.Shape, default, outcomes: dict, provenance: dict, device: dict) -> dict:
    """Return a table in JSON values: every point that was tried, with what became of it."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "implementation": implementation,
        "device": device,
        "provenance": provenance,
        "shape": shape._asdict(),
        "default": asdict(default),
        "points": [{"config": asdict(config), "outcome": x.to_json()} for config, x in outcomes.items()],
    }


def save(path: Path, table: dict) -> None:
    """Write a table; UsageError where that cannot be."""
    write(path, json.dumps(table, allow_nan=False).replace('{"config"', '\n{"config"') + "\n")


def _itself(outcomes: dict) -> Outcome:
    """Return what became of a default that is no point of its space, where a smaller one is the same to run.

    By the times over it of the first point that was measured; ValueError where none was.
    """
    found = next((x for x in outcomes.values() if x.status == MEASURED), None)
    if found is None:
        raise ValueError("nothing in it was measured")
    return Outcome(MEASURED, 0.0, Spread.of([1.0]), Spread.of([found.ms.median / found.ratio.median]))


class Recorded:
    """Plays back a table in the place of `clock.Clock`. A point that was not tried counts as failed."""

    def __init__(self, path: Path, argument: str = "--replay"):
        """Read a table; UsageError naming the argument for what is none."""
        self.box = Box(0)
        try:
            text = path.read_text()
            data, self.digest = json.loads(text), hashlib.sha256(text.encode()).hexdigest()[:16]
            if (data["kind"], data["schema"]) != (KIND, SCHEMA):
                raise ValueError(
                    f"expected kind {KIND!r} and schema {SCHEMA}, got {data['kind']!r}, {data['schema']!r}"
                )
            self.implementation, self.shape = data["implementation"], tuned.Shape(**data["shape"])
            self.device, self.provenance = data["device"], data["provenance"]
            self.default = tuned.config_of(self.implementation, data["default"])
            self.outcomes = {
                tuned.config_of(self.implementation, point["config"]): Outcome.from_json(point["outcome"])
                for point in data["points"]
            }
            self.outcomes.setdefault(self.default, _itself(self.outcomes))
            if self.outcome(self.default).status != MEASURED:
                raise ValueError("its default was tried, and not measured")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{argument} {path}: no table of trials: {type(error).__name__}: {error}") from error

    @property
    def fixed(self) -> dict[str, object]:
        """Return the fields that have one value in all of its points: it says nothing about others."""
        rows = [asdict(config) for config in self.outcomes]
        return {name: x for name, x in rows[0].items() if all(row[name] == x for row in rows)}

    def outcome(self, config) -> Outcome:
        """Return what became of a configuration."""
        return self.outcomes.get(config) or Outcome(FAILED, 0.0, message="not in the table")

    def raced(self, configs: list) -> list[Standing]:
        """Return the standings that the recorded samples give: quartiles that leave out 1 are a difference."""
        first = self.outcomes[self.default]
        same = Standing(self.default, first.ms, first.ratio.over(first.ratio.median), False)
        found = ((x, self.outcomes[x]) for x in configs if x != self.default)
        measured = ((x, outcome) for x, outcome in found if outcome.status == MEASURED)
        return [same, *(Standing(x, o.ms, o.ratio, o.ratio.leaves_out(1)) for x, o in measured)]
