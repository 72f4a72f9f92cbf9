"""Run workers side by side, collect their records, and turn them into a verdict and an exit code."""

import contextlib
import json
import queue
from collections.abc import Callable
from dataclasses import dataclass, field

from verify.children import Rest, worker
from verify.coverage import SEEN, TERMS
from verify.plan import LEAST, Plan

SIDE_BY_SIDE = 2
SILENCE = 600.0
"""Seconds without a record after which a worker counts as hung and is killed; a deep recipe takes under 20."""

PASS, FAILED, USAGE, NOTHING, SURVIVOR, FLAKY, CRASH, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

Listener = Callable[[dict], None]


@dataclass
class Cell:
    """One property of one target: how many cases and rows were judged, and the worst measure."""

    cases: int = 0
    worst: dict | None = None

    def add(self, result: dict) -> None:
        """Count a case."""
        self.cases += 1
        if self.worst is None or float(result["ratio"]) > float(self.worst["ratio"]):
            self.worst = result

    @property
    def ratio(self) -> float:
        """Worst ratio to the limit."""
        return float(self.worst["ratio"]) if self.worst else 0.0


@dataclass
class Verdict:
    """All that is known of one target."""

    target: str
    cells: dict[str, Cell] = field(default_factory=dict)
    coverage: dict[str, list[float]] = field(default_factory=dict)
    probes: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    failing: list[dict] = field(default_factory=list)
    """Recipes on which a property failed, as they were drawn."""
    counts: dict[str, int] = field(default_factory=dict)
    seen: int = 0
    done: dict | None = None
    """What is said of all parts of it: counts are sums, demands the least that was met."""
    crashes: list[dict] = field(default_factory=list)
    """How processes ended that judged it, in order; of a target that could not be judged as named, what was wrong."""

    def add(self, record: dict) -> None:
        """Take in one record."""
        kind = record["kind"]
        if kind == "case":
            self.seen += 1
            if any(float(result["ratio"]) > 1 for result in record["results"].values()):
                self.failing.append(record["recipe"])
            for name, result in record["results"].items():
                self.cells.setdefault(name, Cell()).add(result)
            for term, change in record["coverage"].items():
                self.coverage.setdefault(term, []).append(change)
        elif kind == "probe":
            if record["axis"] not in {p["axis"] for p in self.probes}:
                self.probes.append(record)
        elif kind == "failure":
            self._keep_smallest(record)
        elif kind == "target":
            self.done = record if self.done is None else _together(self.done, record)
            self.counts = self.done["counts"]
        else:
            self.crashes.append(record)

    @property
    def broken(self) -> dict | None:
        """The end of the last process that judged it and did not come to its own; None where all did."""
        return self.crashes[-1] if self.crashes else None

    def _keep_smallest(self, failure: dict) -> None:
        """Keep one failure of a property: that of the smallest case, where several parts of a run found one."""
        at = next((i for i, x in enumerate(self.failures) if x["property"] == failure["property"]), None)
        if at is None:
            self.failures.append(failure)
        elif size(failure) < size(self.failures[at]):
            self.failures[at] = failure

    def untested(self) -> list[str]:
        """Name the terms of the recurrence that no case exercised, of those that the target takes."""
        closed = self.done["refused"] if self.done else {}
        seen = {term for term, changes in self.coverage.items() if any(x > SEEN for x in changes)}
        asked = [term for term in TERMS if term != "initial state" or "initial_state" not in closed]
        return [term for term in asked if term not in seen]

    @property
    def strict_code(self) -> int:
        """Exit code where a term that no case exercised is a failure."""
        return FAILED if self.code == PASS and self.untested() else self.code

    @property
    def findings(self) -> list[dict]:
        """What the probe found: keywords that the target takes and ignores, questions that it answers wrongly."""
        return [p for p in self.probes if p["outcome"] in ("ignored", "wrong")]

    @property
    def nondeterministic(self) -> bool:
        """True if equal calls gave different bits, or a failure was gone when its case ran again."""
        repeated = [cell for name, cell in self.cells.items() if name.startswith("determinism") and cell.ratio > 1]
        unequal = any(not cell.worst["what"].startswith("raised ") for cell in repeated)
        return unequal or any(not f["steady"] for f in self.failures)

    @property
    def code(self) -> int:
        """Exit code of this target alone."""
        if self.broken:
            return USAGE if self.broken["kind"] == "usage" else CRASH
        if self.nondeterministic:
            return FLAKY
        if self.findings or any(cell.ratio > 1 for cell in self.cells.values()):
            return FAILED
        return PASS if self.cells else NOTHING


def _together(one: dict, other: dict) -> dict:
    """Join what two parts of a run say of a target."""
    names = one["counts"].keys() | other["counts"].keys()
    counts = {n: [x["counts"][n] for x in (one, other) if n in x["counts"]] for n in sorted(names)}
    spent = [x.get("seconds", {}) for x in (one, other)]
    return one | {
        "counts": {n: min(x) if n in LEAST else sum(x) for n, x in counts.items()},
        "not_asked": {n: reason for n, reason in one["not_asked"].items() if n in other["not_asked"]},
        "seconds": {n: round(sum(x.get(n, 0.0) for x in spent), 3) for n in ("all", "target", "definition")},
    }


def size(failure: dict) -> tuple[float, str]:
    """Order failing cases: by the numbers of their recipe, then by its text."""
    recipe = failure["recipe"]
    numbers = [x for name, x in recipe.items() if isinstance(x, int) and name not in ("version", "seed")]
    return sum(numbers), json.dumps(recipe)


def exit_code(codes: list[int]) -> int:
    """Combine exit codes: usage first (nothing was judged as asked), then 6 > 5 > 1 > 4 > 3 > 0; 3 if there is none."""
    return next((code for code in (USAGE, CRASH, FLAKY, FAILED, SURVIVOR, NOTHING, PASS) if code in codes), NOTHING)


def run(
    batches: list[list[Plan]],
    listen: Listener,
    workers: int = SIDE_BY_SIDE,
    silence: float = SILENCE,
) -> dict[str, Verdict]:
    """Judge batches of plans, each batch in a process of its own, so many at a time; returns verdicts by target.

    `listen` gets every record in the order of arrival. A process that says nothing for so many seconds is killed; what
    a process leaves that died goes to the next one. On KeyboardInterrupt the workers are killed and it propagates.
    """
    verdicts = {plan.target: Verdict(plan.target) for batch in batches for plan in batch}
    waiting, arrived, running = list(batches), queue.Queue(), 0
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and running < workers:
                stack.enter_context(worker(waiting.pop(0), arrived, silence))
                running += 1
            record = arrived.get()
            if isinstance(record, Rest):
                running -= 1
                waiting = [list(record.plans), *waiting] if record.plans else waiting
                continue
            verdicts[record["target"]].add(record)
            listen(record)
    return verdicts
