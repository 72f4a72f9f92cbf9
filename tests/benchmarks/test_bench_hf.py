"""Time transformers' Kimi Linear on a CPU, with our ops and as it is: same weights, float32, common rounds.

Both have processes of their own, which are asked in turns; ratios are taken within a round. The model is random, four
layers, an eighth of the released one's widths and heads; where steps are measured, all of the heads in question. Run by
`make bench`: without --benchmark-enable nothing runs.
"""

import contextlib
import importlib.util

import pytest
import torch
from baselines import row
from hf_entrants import ABSORBED, HYBRID, MLA, OURS, STATES, THEIRS, serving

pytestmark = pytest.mark.slow

ROUNDS = {"prefill": 5, "memory": 2, "decode": 7}
ASKED = {(HYBRID, "prefill 2048"): 5.0, (HYBRID, "memory 2048"): 3.0, (STATES, "decode 1100 40"): 1.0}
"""How many times faster, and with how many times less memory, they are asked to be."""


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed (pip install transformers)")


@pytest.fixture(scope="module")
def asking(request):
    """Return a function: what asks an entrant for a model; processes are started when they are first needed."""
    before, started = torch.get_num_threads(), {}
    torch.set_num_threads(request.config.getoption("--threads"))
    with contextlib.ExitStack() as processes:

        def ask(entrant: str, model: str, line: str) -> float:
            if (entrant, model) not in started:
                started[entrant, model] = processes.enter_context(serving(entrant, model))
            return started[entrant, model](line)

        yield ask
    torch.set_num_threads(before)


def measured(benchmark, asking, model: str, line: str, own: str, other: str) -> tuple[dict, dict]:
    """Return what was measured of the two, by round, in ms or MiB."""
    unit = 1.0 if line.startswith("memory") else 1e3
    ours, theirs = {}, {}
    asking(own, model, line)

    def theirs_first():
        theirs[len(theirs)] = asking(other, model, line) * unit

    def timed():
        ours[len(ours)] = asking(own, model, line) * unit

    benchmark.pedantic(timed, setup=theirs_first, rounds=ROUNDS[line.split()[0]], iterations=1)
    return ours, theirs


@pytest.mark.parametrize(("model", "line"), ASKED)
def test_with_our_ops(benchmark, found, asking, model, line):
    ours, theirs = measured(benchmark, asking, model, line, OURS, THEIRS)
    unit = "MiB" if line.startswith("memory") else "ms"
    result = row(f"transformers with our ops: {line}", unit, ours, {THEIRS: theirs})
    found["rows"].append(result)
    assert result.peers[0].ratio.median >= ASKED[model, line]


def test_a_step_of_absorbed_mla_at_16k(benchmark, found, asking):
    ours, theirs = measured(benchmark, asking, MLA, "decode 16384 3", ABSORBED, OURS)
    result = row("transformers with our ops, MLA absorbed: decode 16384", "ms", ours, {"expanded": theirs})
    found["rows"].append(result)
    assert result.peers[0].ratio.median > 1
