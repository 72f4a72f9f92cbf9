"""Time the whole model on a CPU beside transformers' torch path: same weights, float32, common rounds; `make bench`.

Every entrant has a process of its own and is asked in turns; ratios are taken within a round. The model is the tiny
preset with 8 layers, and the same with MLA layers only. Without --benchmark-enable nothing runs.
"""

import contextlib
import importlib.util
import random
import statistics

import pytest
import torch
from baselines import row
from model_entrants import serving

from kimi_linear import preset, write_random

pytestmark = pytest.mark.slow

ROUNDS = 5
HYBRID, MLA = "hybrid", "mla"
OURS, COMPILED, THEIRS = "ours", "ours compiled", "transformers"
SHORT, DECODE, PREFILL = "decode 1024 15", "decode 4096 15", "prefill 2048"
ASKED = {DECODE: 3.0, PREFILL: 5.0}
"""How many times faster than transformers the hybrid is asked to be, compiled or not."""
GROWTH = 1.3
"""How much longer a step of the hybrid may take at 16k tokens than at 1k, uncompiled."""


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


@pytest.fixture(scope="module", params=[HYBRID, MLA])
def checkpoint(request, tmp_path_factory):
    """Return the name of a baseline and the folder of a checkpoint of it in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    write_random(preset("tiny", layers=8, baseline=request.param), folder, dtype=torch.float32)
    return request.param, folder


@pytest.fixture(scope="module")
def asking(request, checkpoint):
    """Yield what asks each entrant, ours and transformers' where it is installed, in processes of their own."""
    names = [OURS, COMPILED] + [THEIRS] * (importlib.util.find_spec("transformers") is not None)
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    with contextlib.ExitStack() as processes:
        yield {name: processes.enter_context(serving(name, checkpoint[1])) for name in names}
    torch.set_num_threads(before)


@pytest.mark.parametrize("line", [SHORT, DECODE, PREFILL])
def test_model(benchmark, found, checkpoint, asking, line):
    baseline, _ = checkpoint
    samples: dict[str, dict[int, float]] = {name: {} for name in asking}

    def timed(name: str) -> None:
        samples[name][len(samples[name])] = asking[name](line) * 1e3

    def round_of_the_others():
        others = [name for name in asking if name != OURS]
        for name in random.Random(len(samples[OURS])).sample(others, len(others)):
            timed(name)

    benchmark.pedantic(timed, args=(OURS,), setup=round_of_the_others, rounds=ROUNDS, iterations=1)
    peers = {name: samples[name] for name in (THEIRS, COMPILED) if name in samples}
    found["rows"].append(row(f"model, {baseline}: {line}", "ms", samples[OURS], peers))
    medians = {name: statistics.median(x.values()) for name, x in samples.items()}
    found["model"].append({"model": baseline, "asked": line, "ms": medians, "ratios": ratios(samples)})
    if baseline == HYBRID and line in ASKED and THEIRS in asking:
        assert max(ratios(samples).values()) >= ASKED[line]


def ratios(samples: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return the medians of ratios within rounds, of transformers to ours and to ours compiled."""
    theirs, pairs = samples.get(THEIRS, {}), ((THEIRS, OURS), (f"{THEIRS} / {COMPILED}", COMPILED))
    return {
        name: statistics.median(theirs[turn] / x for turn, x in samples[own].items()) for name, own in pairs if theirs
    }


def test_a_step_hardly_grows_with_the_context_where_few_layers_have_a_growing_cache(found, checkpoint, threads):
    """Steps behind 1,024 and 16,384 tokens take turns in one process: neighbours slow both."""
    baseline, folder = checkpoint
    with serving(OURS, folder) as ask:
        growth = [ask("growth 1024 16384 40") for _ in range(3)]
    found["rows"].append(row(f"model, {baseline}: a step at 16k over 1k", "times", dict(enumerate(growth))))
    ratios = {"16384 over 1024": statistics.median(growth)}
    found["model"].append({"model": baseline, "asked": "growth", "ms": {}, "ratios": ratios})
    assert statistics.median(growth) <= GROWTH if baseline == HYBRID else statistics.median(growth) > GROWTH
