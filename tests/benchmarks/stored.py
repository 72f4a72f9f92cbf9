"""Write what a run of the benchmarks found: all rows, and the topics that reports show figure by figure.

What a file of the same day and sources holds beyond it stays: a run of one case loses none of the others.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import baselines
from cases_cpu import Case
from limits_cpu import measured

from autotune import provenance
from autotune.timing import Spread, ratio
from impls.devices import slug

PACKAGES = ("torch", "triton", "numpy", "optuna", "transformers", "fla-core")
MODEL = "tiny, 8 layers, float32"


class Origin:
    """Where a run's figures come from, and how its files are named."""

    def __init__(self, threads: int):
        """Ask the machine; threads are those that were measured with."""
        self.device = provenance.described("cpu") | {"threads": threads}
        self.versions, self.sources = provenance.versions(PACKAGES), provenance.sources()
        self.now = datetime.now(UTC)

    def about(self) -> dict:
        """Return what every file says of it."""
        date = self.now.isoformat(timespec="seconds")
        about = {"date": date, "device": self.device, "versions": self.versions, "sources": self.sources}
        return about | {"git": provenance.git()}

    def path(self, folder: Path, topic: str) -> Path:
        """Return the file of a topic, this device, day and sources."""
        return folder / f"{topic}-{slug(self.device['name'])}-{self.now:%Y-%m-%d}-{self.sources[:8]}.json"


Samples = dict[int, float]
"""Milliseconds by round."""


def keep(found: dict, what: str, case: Case, mine: Samples, others: dict[str, Samples], shares: Callable) -> None:
    """Keep a case among what was found: a row of the table and a record.

    `shares(case, median in ms, machine)` says how much of the machine ours uses, in fields of the record.
    """
    if "machine" not in found:
        found["machine"] = measured()
    spread = Spread.of(list(mine.values()))
    ordered = {x: others[x] for x in (case.peer, *others) if x in others}
    found["rows"].append(baselines.row(what, "ms", mine, ordered))
    found["cases"].append(
        {
            "name": case.name,
            "shape": {"B": case.B, "T": case.T, "H": case.H, "K": 128, "V": 128, "lengths": case.lengths},
            "dtype": case.dtype,
            "peer": case.peer,
            "asked": case.asked,
            "ms": {"ours": spread.to_json()} | {x: Spread.of(list(y.values())).to_json() for x, y in others.items()},
            "ratios": {x: ratio(y, mine).to_json() for x, y in others.items()},
            **shares(case, spread.median, found["machine"]),
        }
    )


def stored(found: dict, origin: Origin, folder: Path) -> list[Path]:
    """Write what was found to a folder, and return the files."""
    path = origin.path(folder, "benchmarks")
    files = [baselines.write(path, baselines.joined(path, found["rows"]), origin.about())]
    if found["cases"]:
        cpu = {name: x for name, x in found.items() if name not in ("rows", "model", "tuner")}
        files.append(_written(origin.path(folder, "cpu"), "cpu prefill and decode", origin.about() | cpu, _cases))
    if "tuner" in found:
        about = origin.about() | found["tuner"]
        files.append(_written(origin.path(folder, "tuner"), "cost of tuning", about, _stages))
    if found["model"]:
        about = {name: x for name, x in origin.about().items() if name != "sources"}
        about |= {"threads": origin.device["threads"], "model": MODEL, "rows": found["model"]}
        files.append(_written(origin.path(folder, "model-cpu"), "model on a cpu", about, _rows))
    return files


def _cases(before: dict, now: dict) -> dict:
    return {"cases": list({x["name"]: x for x in (*before.get("cases", ()), *now["cases"])}.values())}


def _stages(before: dict, now: dict) -> dict:
    return {"stages": before.get("stages", {}) | now["stages"]}


def _rows(before: dict, now: dict) -> dict:
    return {"rows": list({(x["model"], x["asked"]): x for x in (*before.get("rows", ()), *now["rows"])}.values())}


def _written(path: Path, kind: str, now: dict, both: Callable[[dict, dict], dict]) -> Path:
    """Write a topic over what the file holds, their lists joined."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(before | {"schema": 1, "kind": kind} | now | both(before, now), indent=1) + "\n")
    return path
