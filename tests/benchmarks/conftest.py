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
    if not found["cases"]:
        return
    console = Console(width=140, force_terminal=False, color_system=None, file=terminalreporter._tw._file)
    console.print(case_table(found))
    for name in ("machine", "growth", "memory", "compiling"):
        if name in found:
            console.print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in found[name].items()))
    if folder := config.getoption("--results"):
        console.print(f"written: {write(found, Path(folder))}")


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
    device, sources, today = provenance.described("cpu"), provenance.sources(), datetime.now(UTC)
    path = folder / f"cpu-{slug(device['name'])}-{today:%Y-%m-%d}-{sources[:8]}.json"
    before = json.loads(path.read_text()) if path.exists() else {"cases": []}
    cases = {case["name"]: case for case in (*before["cases"], *found["cases"])}
    data = before | {
        "schema": 1,
        "kind": "cpu prefill and decode",
        "date": today.isoformat(timespec="seconds"),
        "device": device,
        "versions": provenance.versions(("torch", "triton", "numpy", "transformers", "fla-core")),
        "sources": sources,
        "git": provenance.git(),
        **found,
        "cases": list(cases.values()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
