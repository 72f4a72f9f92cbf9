"""Time prefill and decode on a CPU against everybody else's, in common rounds; `make bench` measures.

pytest-benchmark times ours; what is compared runs in the setup of each of its rounds, ours in the same process and
each peer in one of its own, and ratios are taken within a round. The peer of a decode step runs in ours too. Without
--benchmark-enable nothing runs.
"""

import contextlib
import ctypes
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from baselines import row
from cases_cpu import CASES, Case, draw
from limits_cpu import in_a_row, repeated, seconds
from peers_cpu import called, serving
from stored import keep

from autotune.timing import Spread
from impls import ChunkTorchConfig, RecurrentTorchConfig, kda, pages
from kda_spec import costs

pytestmark = pytest.mark.slow

CONFIGS = {"chunk_torch": ChunkTorchConfig(compile=True), "recurrent_torch": RecurrentTorchConfig(compile=True)}
EAGER = {"chunk_torch": ChunkTorchConfig(), "recurrent_torch": RecurrentTorchConfig()}
SLOW_SECONDS = 2.0
"""An entrant that takes longer than this runs in the first rounds only."""
LEAST_ROUNDS = 3
DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference of whole tensors that is taken for the same result: peers round inputs of 16 bits elsewhere."""
EXTRA_MIB = 64


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


def ours(case: Case, name: str, config):
    tokens, keywords = draw(case)
    if case.bounds:
        keywords["cu_seqlens"] = torch.tensor(case.bounds)
    return partial(kda, *tokens, implementation=name, config=config, output_final_state=True, **keywords)


def here(case: Case) -> dict[str, Callable]:
    """Return what runs beside ours in this process: ours uncompiled, token by token, in float32; a step's peer."""
    name = "recurrent_torch" if case.T == 1 else "chunk_torch"
    calls = {f"{name}, uncompiled": ours(case, name, EAGER[name])}
    if case.T > 1:
        calls["recurrent_torch"] = ours(case, "recurrent_torch", CONFIGS["recurrent_torch"])
        if case.dtype != "float32":  # which 16 bits have to beat, in common rounds
            calls[f"{name}, float32"] = ours(replace(case, dtype="float32"), name, CONFIGS[name])
    elif (peer := called(case, case.peer)) is not None:
        calls[f"{case.peer}, in our process"] = peer
    return calls


def agree(case: Case, expected, found) -> bool:
    """Tell whether outputs and final states are the same result."""
    pairs = zip(found, expected, strict=True)
    return all((x.float() - y.float()).norm() <= DIFFERENCE[case.dtype] * y.float().norm() for x, y in pairs)


def shares(case: Case, median_ms: float, machine: dict) -> dict[str, float | None]:
    """Return how much of the machine's rate of products and of its bandwidth the op uses."""
    moved = costs.minimal_bytes(case.sizes, case.dtype, initial_state=case.state, final_state=True)
    flops = costs.tree_chunk_flops(case.sizes, CONFIGS["chunk_torch"].chunk_size, case.lengths).matmul
    rate, best = flops / median_ms * 1e3, max(machine[f"{of}_flops_per_second"] for of in ("library", "template"))
    return {
        "share_of_products": None if case.T == 1 else rate / best,
        "share_of_copy": moved / median_ms * 1e3 / machine["copy_bytes_per_second"],
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark, found, threads, case):
    name = "recurrent_torch" if case.T == 1 else "chunk_torch"
    call, beside = ours(case, name, CONFIGS[name]), here(case)
    with torch.no_grad(), contextlib.ExitStack() as processes:
        expected, others = call(), {other: partial(in_a_row, run, case.calls) for other, run in beside.items()}
        for run in beside.values():
            assert agree(case, expected, run())
        for peer in (case.peer, *case.others):
            if (run := called(case, peer)) is not None:
                assert agree(case, expected, run())
                others[peer] = partial(processes.enter_context(serving(case.name, peer)), "")
        samples, turn = {other: {} for other in others}, iter(range(10**6))

        def round_of_the_others():
            number = next(turn)
            for other, timed in random.Random(number).sample(list(others.items()), len(others)):
                if number < LEAST_ROUNDS or samples[other][0] < SLOW_SECONDS * 1e3:
                    samples[other][number] = timed() * 1e3
            call()  # untimed, as in `in_a_row`

        several = partial(repeated, call, case.calls)
        benchmark.pedantic(several, setup=round_of_the_others, rounds=case.rounds, iterations=1)
    mine = dict(enumerate(x * 1e3 / case.calls for x in benchmark.stats.stats.data))
    kind = "decode" if case.T == 1 else "prefill"
    keep(found, f"{kind} {case.name.removeprefix('decode-')}", case, mine, samples, shares)


def test_time_grows_linearly(found, threads):
    """T = 65,536 against T = 4,096, in common rounds: one call of 2 s between calls of 0.1 s for 0.8 s."""
    cases = [Case("", 1, T, 16, "", 0) for T in (4096, 65536)]
    short, long = (ours(case, "chunk_torch", CONFIGS["chunk_torch"]) for case in cases)
    with torch.no_grad():
        short()
        long()  # the first time the system has to find 2.5 GiB: the outputs alone took 1.7 s
        pairs = [(in_a_row(short, 8), seconds(long), in_a_row(short, 8)) for _ in range(5)]
    times = [2 * long / (before + after) for before, long, after in pairs]
    growth = Spread.of(times)
    found["rows"].append(row("prefill T=65536 over T=4096", "times", dict(enumerate(times))))
    found["growth"] = {"T=65536 over T=4096": growth.median, "least": growth.least, "most": growth.most}


MEMORY = """
import json, sys, torch
from test_bench_cpu import CONFIGS, Case, ours, extra_mib
with torch.no_grad():
    calls = {T: ours(Case("", 1, T, 16, "", 0), "chunk_torch", CONFIGS["chunk_torch"]) for T in (256, 4096, 65536)}
    calls.pop(256)()
    print(json.dumps({T: extra_mib(call) for T, call in calls.items()}))
"""


def extra_mib(call) -> float:
    """Return how much more memory a process has at most during a call than before and for what the call returns."""
    pages._spare.clear()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier call left would be counted as there before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    outputs = call()
    return (status("VmHWM") - before) / 1024 - sum(x.nbytes for x in outputs) / 2**20


def status(name: str) -> int:
    """Return a line of what Linux says of this process, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def child(script: str, **environment: str) -> dict:
    """Run a script in a process of its own and return the JSON that it prints last."""
    paths = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_memory_beside_inputs_and_outputs(found, threads):
    extra = child(MEMORY)
    found["memory"] = {f"MiB at T={T}": x for T, x in extra.items()}
    found["rows"] += [row(f"memory beside inputs and outputs, T={T}", "MiB", {0: x}) for T, x in extra.items()]
    assert all(0 < x <= EXTRA_MIB for x in extra.values())


COMPILING = """
import json, time, torch
from test_bench_cpu import CONFIGS, Case, ours
def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
call = ours(Case("", 1, 256, 16, "", 0), "chunk_torch", CONFIGS["chunk_torch"])
decode = ours(Case("", 1, 1, 16, "", 0), "recurrent_torch", CONFIGS["recurrent_torch"])
with torch.no_grad():
    calls = {"torch's own": lambda: torch.compile(lambda x: x + 1)(torch.ones(3)), "chunk": call, "decode": decode}
    print(json.dumps({name: timed(call) for name, call in calls.items()}))
"""


def test_compiling(found, threads, tmp_path):
    """The first call of a process, with nothing in Inductor's cache and with everything."""
    kept = []
    for kind in ("cold", "warm"):
        seconds_of = child(COMPILING, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        found.setdefault("compiling", {}).update({f"{name} {kind} s": x for name, x in seconds_of.items()})
        kept.append({path.name for path in tmp_path.rglob("*.so")})
    found["rows"] += [row(f"first call: {name[:-2]}", "s", {0: x}) for name, x in found["compiling"].items()]
    assert kept[0] and kept[0] == kept[1]  # the second process has compiled nothing
