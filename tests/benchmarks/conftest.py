"""Collect what the benchmarks of the CPU found: one table, files where they are asked for, and what has got slower."""

import os
from pathlib import Path

import baselines
import pytest
import stored
import summary
import torch
from rich.console import Console

FOUND, SAID = pytest.StashKey[dict](), pytest.StashKey[list]()
REGRESSED = 1


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FOLDER", help="write what the CPU benchmarks found to files there")
    parser.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    held = "compare with the baseline of this machine in FOLDER, and keep there what it does not know yet"
    parser.addoption("--baseline", metavar="FOLDER", help=held)
    parser.addoption("--set-baseline", action="store_true", help="let this run be the baseline of --baseline")


def pytest_configure(config):
    config.stash[FOUND] = {"cases": [], "rows": [], "model": []}
    config.stash[SAID] = []
    if config.getoption("--results") and not config.getoption("benchmark_compare"):
        config.option.benchmark_quiet = True  # one table is enough


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


def pytest_sessionfinish(session):
    """Write the files and compare; a regression is exit code 1."""
    config, found = session.config, session.config.stash[FOUND]
    if not found["rows"]:
        return
    origin, held = stored.Origin(config.getoption("--threads")), config.getoption("--baseline")
    baseline = baselines.Baseline.of(Path(held), origin.device) if held else baselines.Baseline(Path())
    changes, said = baseline.changes(found["rows"]), config.stash[SAID]
    said += [summary.table(changes), *summary.details(found), *summary.verdict(changes, baseline, origin.versions)]
    if held and (taken := baseline.take(found["rows"], origin.about(), config.getoption("--set-baseline"))):
        said.append(f"{baseline.path}: {len(taken)} benchmarks are held to these figures from now on")
    if folder := config.getoption("--results"):
        said += [f"written: {path}" for path in stored.stored(found, origin, Path(folder))]
    if any(change.verdict == baselines.REGRESSION for change in changes):
        session.exitstatus = max(int(session.exitstatus), REGRESSED)


def pytest_terminal_summary(terminalreporter, config):
    console = Console(width=160, force_terminal=False, color_system=None, file=terminalreporter._tw._file)
    for what in config.stash[SAID]:
        console.print(what, **({"soft_wrap": True, "markup": False} if isinstance(what, str) else {}))
