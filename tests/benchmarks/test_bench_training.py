"""Time forward and backward on a CPU against transformers' torch functions, in common rounds; `make bench` measures.

As in `test_bench_cpu`: ours runs in this process and each peer in one of its own, and ratios are taken within a round.
The table shows what is asked beside the ratio. Without --benchmark-enable nothing runs.
"""

import contextlib
import random
from functools import partial

import pytest
from cases_cpu import TRAINING
from limits_cpu import in_a_row
from peers_cpu import serving, step_of, trained
from stored import keep

from impls import ChunkTorchConfig, kda
from kda_spec import costs

pytestmark = pytest.mark.slow

DIFFERENCE = 1e-4
"""Relative difference of gradients, as whole tensors, that is taken for the same result."""
SLOW_SECONDS = 20.0
"""An entrant that takes longer than this runs in the first round only."""


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


def ours(case, compile: bool):
    config = ChunkTorchConfig(heads=min(case.H, ChunkTorchConfig.heads), compile=compile)
    return step_of(partial(kda, implementation="chunk_torch", config=config), case)


def agree(expected, found) -> bool:
    """Tell whether gradients are finite and the same result."""
    return all((x - y).norm() <= DIFFERENCE * y.norm() for x, y in zip(found, expected, strict=True))


def shares(case, median_ms: float, machine: dict) -> dict[str, float | None]:
    """Return the share of a copy's bandwidth that is used, if all is read and written once each way."""
    forward = costs.minimal_bytes(case.sizes, case.dtype, initial_state=False, final_state=False)
    moved = 2 * forward / median_ms * 1e3
    return {"share_of_products": None, "share_of_copy": moved / machine["copy_bytes_per_second"]}


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: case.name)
def test_training_step(benchmark, found, threads, case):
    step, beside = ours(case, compile=True), {"chunk_torch, uncompiled": ours(case, compile=False)}
    expected = step()
    assert agree(expected, beside["chunk_torch, uncompiled"]())
    with contextlib.ExitStack() as processes:
        others = {name: partial(in_a_row, run, 1) for name, run in beside.items()}
        for peer in (case.peer, *case.others):
            if (run := trained(case, peer)) is not None:
                assert not case.asked or agree(expected, run())  # the long case takes 16 GB: in one process only
                others[peer] = partial(processes.enter_context(serving(case.name, peer)), "")
        samples, turn = {other: {} for other in others}, iter(range(10**6))

        def round_of_the_others():
            number = next(turn)
            for other, timed in random.Random(number).sample(list(others.items()), len(others)):
                if number == 0 or samples[other][0] < SLOW_SECONDS * 1e3:
                    samples[other][number] = timed() * 1e3
            step()  # untimed, as in `in_a_row`

        benchmark.pedantic(step, setup=round_of_the_others, rounds=case.rounds, iterations=1)
    mine = dict(enumerate(x * 1e3 for x in benchmark.stats.stats.data))
    keep(found, f"training step {case.name.removeprefix('train-')}", case, mine, samples, shares)
