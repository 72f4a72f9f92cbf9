"""Time the judge: cases a second of each implementation, beside fixed work in the same rounds; `make bench` measures.

The judge is what `python -m verify` runs, in its process and, for Triton without a GPU, in the interpreter. Its start
does not count, nor does its first case, in which all is imported and compiled; in the interpreter, which compiles
nothing and whose budget may end with it, the first one counts. Without --benchmark-enable nothing runs.
"""

import time

import numpy as np
import pytest
from baselines import row
from limits_cpu import seconds

from verify import session
from verify.choice import choose
from verify.plan import PROFILES, Plan

pytestmark = pytest.mark.slow

ROUNDS = 3
CHOICE = choose([], None)
WORK = "fixed work in NumPy"


@pytest.fixture(autouse=True)
def _measuring(request):
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")


def fixed_work() -> None:
    """Do what the judge does most: small products in float64, called from Python. 0.1 s on a quiet core."""
    x = np.full((8, 8), 1 / 8)  # its square is itself
    for _ in range(80_000):
        x = x @ x


def judged(target: str, device: str) -> tuple[int, float]:
    """Return how many cases counted, and the seconds that they took."""
    smoke, arrived = PROFILES["smoke"], []
    plan = Plan(target, device, smoke.name, smoke.dtypes, seed=0, examples=smoke.examples)
    verdict = session.run([[plan]], lambda record: arrived.append((record["kind"], time.perf_counter())))[target]
    assert verdict.code == session.PASS, verdict
    if device == "interpret":
        return verdict.seen, verdict.done["seconds"]["all"]
    first = next(at for kind, at in arrived if kind == "case")
    return verdict.seen - 1, arrived[-1][1] - first


@pytest.mark.parametrize(("target", "device"), CHOICE.devices.items(), ids=CHOICE.devices)
def test_judge(benchmark, found, target, device):
    rates, work = {}, {}

    def once() -> None:
        cases, took = judged(target, device)
        rates[len(rates)] = cases / took

    def beside() -> None:
        work[len(rates)] = 1 / seconds(fixed_work)

    benchmark.pedantic(once, setup=beside, rounds=ROUNDS, iterations=1)
    found["rows"].append(row(f"verify {target} on {device}", "cases/s", rates, {WORK: work}, rate=True))
