"""Time what tuning costs: trials per minute by stage, what the tuner adds to measuring, memory; `make bench` measures.

The stages are timed from outside, through what `python -m autotune tune` itself calls, on a small prefill: compiling
for a GPU that is not here, comparing with the default's outputs, timing, proposing and keeping, the race, the judge.
Trials and plain measurements of the same configurations alternate. Without --benchmark-enable nothing runs.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from baselines import row

from autotune.cases import Case
from autotune.clock import Bench, Clock
from autotune.judge import verified_config
from autotune.pinning import load
from autotune.search import MEASURED, Search
from autotune.space import Setting, space_of
from autotune.timing import Box, Spread
from impls import table
from impls.configs import ChunkTorchConfig
from impls.plan import Problem
from verify.session import PASS

pytestmark = pytest.mark.slow

CASE = Case("tune", 1, 1024, 8)
TRIALS = 12
COMPILED = 8
"""Configurations of chunk_triton that are compiled for sm_90. The search compiles neighbours of the best so far, too;
random points, which unroll and spill, take up to a minute each."""
FINALISTS = 3


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


@pytest.fixture
def tuner(found) -> dict:
    """What was found out about the tuner; the load of the machine at the beginning is part of it."""
    shape = {"B": CASE.B, "T": CASE.T, "H": CASE.H, "K": CASE.K, "V": CASE.V}
    return found.setdefault("tuner", {"shape": shape, "load_before": load(), "stages": {}})


def stage(tuner: dict, name: str, seconds: list[float], processor_s: float | None = None) -> None:
    """Keep the seconds that a configuration takes in one stage, and of the processor, which neighbours change less."""
    mean = sum(seconds) / len(seconds)
    rates = {"trials_per_minute": 60 / mean, "mean_s": mean, "processor_s": processor_s}
    tuner["stages"][name] = rates | {"seconds": Spread.of(seconds).to_json()}


def processor_seconds() -> float:
    """Return what this process and the children that it has waited for have had of the processor."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def timed(function: Callable, *arguments) -> tuple[float, object]:
    """Return the seconds that a call takes, and what it returns."""
    begun = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begun, result


class Watched:
    """Counts the seconds that a stopwatch spends, its flushing of the caches included."""

    def __init__(self, watch):
        self.watch, self.seconds = watch, 0.0

    def __getattr__(self, name: str):
        return getattr(self.watch, name)

    def milliseconds(self, call: Callable[[], object], mode: str) -> float:
        spent, result = timed(self.watch.milliseconds, call, mode)
        self.seconds += spent
        return result


def searching(folder: Path) -> Search:
    s = CASE.sizes
    problem = Problem(B=s.B, T=s.T, N=s.N, H=s.H, HV=s.HV, K=s.K, V=s.V, dtype="float32")
    space = space_of(table.find("chunk_torch"), Setting(problem), {"compile": False})
    return Search(space, folder / "study.journal", "cost", first=(ChunkTorchConfig(),))


def test_trials(benchmark, found, tuner, threads, tmp_path):
    """Trials as the tuner makes them, and each configuration measured once more without it, in turns."""
    timer = Clock(Bench("chunk_torch", CASE, "float32", "cpu", threads), ChunkTorchConfig(), Box(1e6))
    timer.watch, stages = Watched(timer.watch), ("propose and keep", "check", "time")
    parts = {name: [] for name in (*stages, "alone", "processor")}

    def alone(config) -> None:
        parts["alone"].append(timed(timer.outcome, config)[0])

    def trial(search: Search) -> None:
        proposing, config = timed(search.next, 1e6)
        first = len(parts["alone"]) % 2 == 0
        if first:
            alone(config)
        timer.watch.seconds = 0.0
        processor = processor_seconds()
        spent, outcome = timed(timer.outcome, config)
        parts["processor"].append(processor_seconds() - processor)
        assert outcome.status == MEASURED, outcome.message
        parts["time"].append(timer.watch.seconds)
        parts["check"].append(spent - timer.watch.seconds)
        parts["propose and keep"].append(proposing + timed(search.tell, config, outcome)[0])
        if not first:
            alone(config)

    with searching(tmp_path) as search:
        benchmark.pedantic(trial, args=(search,), rounds=TRIALS, iterations=1)
        tuner["points"] = search.size
    own, alone_ms = ({i: 1e3 * x for i, x in enumerate(parts[name])} for name in ("propose and keep", "alone"))
    found["rows"].append(row("tuner: what it adds to a trial", "ms", own, {"measuring alone": alone_ms}))
    measuring = sum(parts["alone"])
    tuner["overhead"] = {
        "proposing and keeping over measuring": sum(parts["propose and keep"]) / measuring,
        "trial over measuring alone": sum(sum(parts[name]) for name in stages) / measuring,
    }
    for name in stages:
        stage(tuner, name, parts[name])
    together = [sum(x) for x in zip(parts["check"], parts["time"], strict=True)]
    stage(tuner, "check and time", together, sum(parts["processor"]) / TRIALS)
    tuner["pinned"] = timer.conditions.to_json()


def test_race(benchmark, tuner, threads):
    """The final race in a new process, by finalist."""
    timer = Clock(Bench("chunk_torch", CASE, "float32", "cpu", threads), ChunkTorchConfig(), Box(1e6))
    others = [ChunkTorchConfig(chunk_size=C) for C in (32, 64)]
    before = processor_seconds()
    standings = benchmark.pedantic(timer.raced, args=(others,), rounds=1, iterations=1)
    assert len(standings) == FINALISTS
    seconds = benchmark.stats.stats.data[0]
    stage(tuner, "race", [seconds / FINALISTS], (processor_seconds() - before) / FINALISTS)


def test_judge(benchmark, tuner, tmp_path):
    """The judge, for one configuration that is not compiled."""
    asked = ("chunk_torch", ChunkTorchConfig(), "cpu", "tune", (CASE.K,), True, tmp_path)
    before = processor_seconds()
    verdict = benchmark.pedantic(verified_config, args=asked, rounds=1, iterations=1)
    assert verdict["code"] == PASS, verdict["reason"]
    stage(tuner, "judge", benchmark.stats.stats.data, processor_seconds() - before)
    tuner["judged"] = verdict["counts"]


STATIC = """
import json, sys, time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from autotune.arguments import implementation_of, problem_of, target_of
from autotune.compiling import Compiler
from autotune.ranking import Ranking
from autotune.space import Setting, space_of, usual_of
from autotune.timing import Box
row = implementation_of("chunk_triton")
setting = Setting(problem_of("T=8192,H=64", "bfloat16"), target_of(row, "sm_90"))
space, seconds = space_of(row, setting), []
usual = usual_of(space, setting)
near = (replace(usual, **{name: x}) for part in space.parts.values() for name, values in part.items() for x in values)
with Compiler(Path(sys.argv[1])) as compiler:
    ranking = Ranking(space, setting, compiler, Box(1e6))
    for point in islice((x for x in near if space.admits(x) and x != usual), int(sys.argv[2])):
        begun = time.perf_counter()
        ranking.rank([point])
        seconds.append(time.perf_counter() - begun)
print(json.dumps({"seconds": seconds, "kernels": compiler.compiled}))
"""


def command(*arguments: str, folder: Path, threads: int = 1) -> tuple[dict, float]:
    """Run a command with caches of its own; returns the JSON on its last line, and the MiB of its largest process."""
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "KDA_CONFIG_DIR")}
    environment |= {"OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder)}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONPATH": os.getcwd()}
    asked = [sys.executable, "-c", LARGEST, *arguments]
    run = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *printed, largest = run.stdout.splitlines()
    return json.loads("\n".join(printed)), float(largest)


LARGEST = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


def test_static_compilation(tuner, tmp_path):
    """Neighbours of the default, what is new of each, by two compilers that have nothing in their caches."""
    before = processor_seconds()
    result, largest = command("-c", STATIC, str(tmp_path / "compiled"), str(COMPILED), folder=tmp_path)
    first, *others = result["seconds"]
    stage(tuner, "compile for sm_90", others, (processor_seconds() - before) / COMPILED)
    tuner["compilers"] = {"first_s": first, "kernels": result["kernels"], "largest_process_MiB": largest}


MEASURING = """
import json, sys, torch
from test_bench_tuner import CASE, Bench, Box, ChunkTorchConfig, Clock
timer = Clock(Bench("chunk_torch", CASE, "float32", "cpu", torch.get_num_threads()), ChunkTorchConfig(), Box(1e6))
print(json.dumps({"status": [timer.outcome(ChunkTorchConfig(chunk_size=C)).status for C in (16, 32, 64)]}))
"""


def test_memory(tuner, threads, tmp_path):
    """The largest process of a whole run, its race and its judge among them, beside one that only measures."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    result, alone = command("-c", here + MEASURING, folder=tmp_path, threads=threads)
    assert result["status"] == [MEASURED] * 3
    sizes = ("--tokens", str(CASE.T), "--heads", str(CASE.H), "--fix", "compile=false", "--trials", "3")
    asked = ("-m", "autotune", "tune", *sizes, "--budget", "60s", "--out", str(tmp_path / "out"), "--json")
    result, whole = command(*asked, folder=tmp_path, threads=threads)
    assert list((tmp_path / "out").rglob("*.json"))
    tuner["largest_process_MiB"] = {"tune": whole, "measuring alone": alone}
    tuner["load_after"] = load()
