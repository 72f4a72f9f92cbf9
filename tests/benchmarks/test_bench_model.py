"""Time the whole model on a CPU beside transformers' torch path: same weights, float32, common rounds; `make bench`.

Every entrant has a process of its own and is asked in turns; ratios are taken within a round. The model is the tiny
preset with 8 layers, and the same with MLA layers only. Without --benchmark-enable nothing runs.
"""

import contextlib
import importlib.util
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from model_entrants import apart

from autotune import provenance
from impls.devices import slug
from kimi_linear import preset, write_random

pytestmark = pytest.mark.slow

ROUNDS = 5
HYBRID, MLA = "hybrid", "mla"
OURS, COMPILED, THEIRS = "ours", "ours compiled", "transformers"
DECODE, PREFILL = "decode 4096 15", "prefill 2048"
SHORT = "decode 1024 15"
ASKED = {DECODE: 3.0, PREFILL: 5.0}
"""How many times faster than transformers the hybrid is asked to be, compiled or not."""
GROWTH = 1.3
"""How much longer a step of the hybrid may take at 16k tokens than at 1k, uncompiled."""


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in float32, by baseline."""
    found = {}
    for baseline in (HYBRID, MLA):
        found[baseline] = tmp_path_factory.mktemp(baseline)
        write_random(preset("tiny", layers=8, baseline=baseline), found[baseline], dtype=torch.float32)
    return found


@pytest.fixture(scope="module")
def rows(request) -> list[dict]:
    """What was measured, printed and written at the end."""
    rows: list[dict] = []
    yield rows
    for row in rows:
        times = ", ".join(f"{x} {ms:.2f} ms" for x, ms in row["ms"].items())
        ratios = ", ".join(f"{x}: {ratio:.2f} times" for x, ratio in row["ratios"].items())
        print(f"\n{row['model']:8} {row['asked']:16} {times}; {ratios}", end="")
    if folder := request.config.getoption("--results"):
        print(f"\nwritten: {write(rows, Path(folder))}")


def write(rows: list[dict], folder: Path) -> Path:
    """Write what was measured with where it comes from, and return the file."""
    device, today = provenance.described("cpu"), datetime.now(UTC)
    path = folder / f"model-cpu-{slug(device['name'])}-{today:%Y-%m-%d}.json"
    data = {
        "schema": 1,
        "kind": "model on a cpu",
        "date": today.isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(("torch", "transformers")),
        "git": provenance.git(),
        "model": "tiny, 8 layers, float32",
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def measured(entrants: dict[str, Path], asked: list[str], rounds: int = ROUNDS) -> dict[tuple[str, str], list[float]]:
    """Return milliseconds of every entrant, named "PROGRAM of MODEL", for everything asked, round by round."""
    found: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as processes:
        programs = {name: apart(name.split(" of ")[0], folder) for name, folder in entrants.items()}
        timed = {name: processes.enter_context(program) for name, program in programs.items()}
        for _ in range(rounds):
            for line in asked:
                for name, ask in timed.items():
                    found.setdefault((name, line), []).append(ask(line) * 1e3)
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return the median of ratios within rounds."""
    return statistics.median(x / y for x, y in zip(slow, fast, strict=True))


@pytest.mark.parametrize("baseline", [HYBRID, MLA])
def test_against_transformers(folders, rows, threads, baseline):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    entrants = {f"{program} of {baseline}": folders[baseline] for program in (OURS, COMPILED, THEIRS)}
    found = measured(entrants, [SHORT, DECODE, PREFILL])
    best = {}
    for line in (SHORT, DECODE, PREFILL):
        own, fast, theirs = (found[name, line] for name in entrants)
        ms = {name.split(" of ")[0]: statistics.median(found[name, line]) for name in entrants}
        ratios = {THEIRS: ratio(theirs, own), f"{THEIRS} / {COMPILED}": ratio(theirs, fast)}
        rows.append({"model": baseline, "asked": line, "ms": ms, "ratios": ratios})
        best[line] = max(ratios.values())
    if baseline == HYBRID:
        assert {line: times for line, times in ASKED.items() if best[line] < times} == {}


def test_a_step_hardly_grows_with_the_context_where_few_layers_have_a_growing_cache(folders, rows, threads):
    """Steps behind 1,024 and 16,384 tokens take turns in one process: neighbours slow both."""
    growth = {}
    for baseline in (HYBRID, MLA):
        with apart(OURS, folders[baseline]) as ask:
            growth[baseline] = statistics.median(ask("growth 1024 16384 40") for _ in range(3))
        rows.append({"model": baseline, "asked": "growth", "ms": {}, "ratios": {"16384 over 1024": growth[baseline]}})
    assert growth[HYBRID] <= GROWTH < growth[MLA], growth
