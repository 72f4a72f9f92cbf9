"""Cut plans into parts that can be judged anywhere, and go on behind the cases that a killed run has finished."""

from dataclasses import replace
from pathlib import Path

from impls.table import NAMED
from verify import records
from verify.choice import UsageError
from verify.plan import Plan

IDENTITY = (
    *("profile", "seed", "examples", "properties", "dtypes", "head_dims", "inputs", "config", "contract", "adapter"),
    *("targets", "shard", "sources", "versions"),
)
"""What must agree between a run and the one that goes on, or between shards."""

LONGEST_FIRST = (("chunk", True), ("chunk", False), ("recurrent", False), ("recurrent", True))
"""Form, and whether it is interpreted: in quick ours take 43, 32, 22 and 12 seconds of a Xeon's core. Others' count as
chunks."""


def parts(plans: list[Plan], workers: int) -> list[list[Plan]]:
    """Cut plans so that so many workers have something to do: as many parts of each, of interleaved recipes.

    The cases are the same whatever the number, except in the interpreter, whose budget is divided.
    """
    each = max(1, workers // max(1, len(plans)))
    found = [[_part(plan, i, each)] for plan in plans for i in range(each)]
    return sorted(found, key=lambda batch: LONGEST_FIRST.index(_kind(batch[0])))


def _kind(plan: Plan) -> tuple[str, bool]:
    by_token = any(row.form == "recurrent" for row in NAMED if row.name == plan.target)
    return "recurrent" if by_token else "chunk", plan.device == "interpret"


def _part(plan: Plan, i: int, count: int) -> Plan:
    part, of = plan.shard
    return replace(plan, shard=(part + of * i, of * count))


def finished(path: Path, identity: dict) -> list[dict]:
    """Return the run and case lines of a killed run. Raises UsageError where it was another kind of run.

    An empty or missing file is a run that has not begun.
    """
    try:
        lines = records.read(path) if path.is_file() and path.stat().st_size else []
    except ValueError as error:
        raise UsageError(f"--resume: {error}") from error
    if not lines:
        return []
    if lines[0]["kind"] != "run" or "identity" not in lines[0]:
        raise UsageError(f"--resume: {path} is not the file of a run that can go on")
    if unlike := differences(lines[0]["identity"], identity):
        raise UsageError(f"--resume: {path} is of another run: {'; '.join(unlike)}")
    return [x for x in lines if x["kind"] in ("run", "not-run") or (x["kind"] == "case" and x.get("number", -1) >= 0)]


def differences(one: dict, other: dict) -> list[str]:
    """Say where two identities differ."""
    return [f"{n} {one.get(n)} for {other.get(n)}" for n in IDENTITY if one.get(n) != other.get(n)]


def earlier(cases: list[dict], target: str) -> tuple[dict, ...]:
    """Return what a plan needs of the cases that are finished: see `Plan.earlier`."""
    return tuple(
        {
            "number": case["number"],
            "dtype": case["recipe"]["dtype"],
            "names": list(case["results"]),
            "counts": case["counts"],
            "units": case["units"],
            "failing": (failing := {n: x for n, x in case["results"].items() if float(x["ratio"]) > 1}),
            "recipe": case["recipe"] if failing else None,
        }
        for case in cases
        if case["kind"] == "case" and case["target"] == target
    )


def of_part(case: dict, plan: Plan) -> bool:
    """Tell whether a finished case belongs to a part of a plan."""
    part, count = plan.shard
    return case["number"] % count == part
