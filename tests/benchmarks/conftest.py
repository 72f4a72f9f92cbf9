"""Collect what the benchmarks of the CPU found, print it as tables, and write it to a file where one is asked for."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from autotune import provenance
from impls.devices import slug

FOUND = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FOLDER", help="write what the CPU benchmarks found to FOLDER/cpu-*.json")
    parser.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")


def pytest_configure(config):
    config.stash[FOUND] = {"cases": []}


@pytest.fixture
def found(request) -> dict:
    """What all benchmarks found so far, by topic."""
    return request.config.stash[FOUND]


@pytest.fixture
def threads(request) -> int:
    """Let torch take the threads that were asked for."""
    before, asked = torch.get_num_threads(), request.config.getoption("--threads")
    torch.set_num_threads(asked)
    yield asked
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash[FOUND]
    tuner, folder = found.pop("tuner", None), config.getoption("--results")
    console = Console(width=140, force_terminal=False, color_system=None, file=terminalreporter._tw._file)
    if tuner:
        _tuner_summary(console, tuner, folder)
    if not found["cases"]:
        return
    console.print(case_table(found))
    for name in ("machine", "growth", "memory", "compiling"):
        if name in found:
            console.print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in found[name].items()))
    if folder:
        console.print(f"written: {write(found, Path(folder))}")


def _tuner_summary(console: Console, tuner: dict, folder: str | None) -> None:
    table = Table("stage of the tuner", "trials a minute", "s a trial", "quartiles", "s of the processor")
    for name, x in tuner["stages"].items():
        low, high = x["seconds"]["low"], x["seconds"]["high"]
        processor = f"{x['processor_s']:.2f}" if x["processor_s"] is not None else ""
        rate, mean = f"{x['trials_per_minute']:.1f}", f"{x['mean_s']:.3f}"
        table.add_row(name, rate, mean, f"{low:.3f} .. {high:.3f}", processor)
    console.print(table)
    for name in ("overhead", "largest_process_MiB", "compilers"):
        if name in tuner:
            console.print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in tuner[name].items()))
    if folder:
        console.print(f"written: {write_tuner(tuner, Path(folder))}")


def case_table(found: dict) -> Table:
    """Return one row for every entrant of every case."""
    table = Table("case", "entrant", "median ms", "quartiles", "ours is faster by", "asked", "of products", "of copy")
    for case in found["cases"]:
        for name, spread in case["ms"].items():
            ratio = case["ratios"].get(name)
            ours, asked = name == "ours", case["asked"] if name == case["peer"] else None
            table.add_row(
                case["name"] if ours else "",
                name,
                f"{spread['median']:.2f}",
                f"{spread['low']:.2f} .. {spread['high']:.2f}",
                f"{ratio['median']:.1f}" if ratio else "",
                f"{asked:g}" if asked else "",
                f"{case['share_of_products']:.0%}" if ours and case["share_of_products"] else "",
                f"{case['share_of_copy']:.0%}" if ours else "",
            )
        table.add_section()
    return table


def write(found: dict, folder: Path) -> Path:
    """Write what was found with where it comes from, and return the file.

    What a file of the same day and sources holds beyond it stays: a run of one case loses none of the others.
    """
    path, origin = _origin("cpu", folder, ("torch", "triton", "numpy", "transformers", "fla-core"))
    before = json.loads(path.read_text()) if path.exists() else {"cases": []}
    cases = {case["name"]: case for case in (*before["cases"], *found["cases"])}
    kind = {"schema": 1, "kind": "cpu prefill and decode"}
    return _written(path, before | kind | origin | found | {"cases": list(cases.values())})


def write_tuner(tuner: dict, folder: Path) -> Path:
    """Write what tuning costs, with where it comes from, and return the file. Stages that were not run stay in it."""
    path, origin = _origin("tuner", folder, ("torch", "triton", "numpy", "optuna", "scipy"))
    before = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    kind, stages = {"schema": 1, "kind": "cost of tuning"}, before["stages"] | tuner["stages"]
    return _written(path, before | kind | origin | tuner | {"stages": stages})


def _origin(topic: str, folder: Path, packages: tuple[str, ...]) -> tuple[Path, dict]:
    """Return the file of a topic, this device, day and sources, and what tells them."""
    device, sources, today = provenance.described("cpu"), provenance.sources(), datetime.now(UTC)
    path = folder / f"{topic}-{slug(device['name'])}-{today:%Y-%m-%d}-{sources[:8]}.json"
    return path, {
        "date": today.isoformat(timespec="seconds"),
        "device": device,
        "versions": provenance.versions(packages),
        "sources": sources,
        "git": provenance.git(),
    }


def _written(path: Path, data: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
