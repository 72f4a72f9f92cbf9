"""Compile and measure on the workers of a dask cluster: one thread for a worker, one worker for a GPU.

    dask scheduler
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 1 --resources GPU=1      (CPU=1 to measure on CPUs)

Searching, claiming, the final race and the judge stay in the process that names the scheduler: only one storage is
written, and one device decides. Workers must have its kernels' sources and versions, and to measure its kind of device.
A worker that a configuration took down is a result of that configuration, when it does so twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from autotune import clock, measuring, provenance
from autotune.clock import Bench, Clock
from autotune.outcomes import UsageError
from autotune.search import FAILED, Outcome
from autotune.store import differences
from autotune.timing import Box
from impls.devices import named
from verify.cluster import ANSWER, Failure, Pool, Unreachable, cluster

if TYPE_CHECKING:  # it imports triton, which only compiling needs
    from impls.compiler_triton import Job, Resources

STARTING = 120.0
"""Seconds that a worker has for its first task on top: importing, and for a measurement inputs and the default."""
DEATHS = 2
"""Times that a configuration may end its worker until it is to blame: the first time it may have been killed."""


@contextmanager
def joined(address: str) -> Iterator[Pool]:
    """Give the workers of a scheduler; UsageError where there is none, or it goes away."""
    try:
        with cluster(address) as pool:
            yield pool
    except Unreachable as error:
        raise UsageError(f"--scheduler {address}: {error}") from error


def compiles(pool: Pool, seconds: float) -> "Callable[[list[Job], Box], Iterator[tuple[Job, Resources | str, bool]]]":
    """Return what compiles jobs on any worker: yields job, result, and whether it would be the same again.

    UsageError where a worker is none of ours.
    """
    about = _about(None)

    def run(todo: list, box: Box) -> Iterator[tuple]:
        todo, flying = todo[::-1], {}
        while (todo and box.left) or flying:
            while todo and box.left and len(flying) < 2 * max(1, pool.slots()):
                job = todo.pop()
                flying[pool.submit(compiled, job, about, seconds=seconds + STARTING)] = job
            for task, result in pool.finished():
                failed = isinstance(_own(result), Failure)
                yield flying.pop(task), f"the compiler {result.message}" if failed else result, not failed

    return run


class Fleet:
    """Measures configurations on all workers that have a device, each beside the default there."""

    def __init__(self, pool: Pool, bench: Bench, default: object, seconds: float = measuring.PATIENCE):
        self.pool, self.bench, self.default, self.seconds, self.box = pool, bench, default, seconds, Box(0)
        self.resource = "CPU" if bench.device == "cpu" else "GPU"
        if not pool.slots(self.resource, ANSWER):
            offered = f"{self.resource}=1"
            raise UsageError(f"--scheduler: no worker offers {offered}: dask worker ADDRESS --resources {offered}")
        self.about = _about(bench.device)

    def outcomes(self, claimed: Callable[[int], object | None]) -> Iterator[tuple[object, Outcome]]:
        """Yield configurations with what became of them, until none is left and all are back.

        claimed: gives the next configuration while so many are under way, None where there is none.
        """
        flying, deaths = {}, Counter()
        while True:
            while len(flying) < max(1, self.pool.slots(self.resource)) and (config := claimed(len(flying))) is not None:
                flying[self._submit(config)] = config
            if not flying:
                return
            for task, result in self.pool.finished():
                config = flying.pop(task)
                if isinstance(_own(result), Failure):
                    deaths[config] += 1
                    if result.kind == "died" and deaths[config] < DEATHS:
                        flying[self._submit(config)] = config
                        continue
                    result = result.message, True
                answer, goes_on = result
                if not goes_on:
                    self.pool.restart(task.worker)
                if answer is not None:  # None: the box was over before it was measured
                    yield config, Outcome(FAILED, 0.0, message=answer) if isinstance(answer, str) else answer

    def raced(self, configs: list) -> list[clock.Standing]:
        """Do what `clock.raced` does, on this machine's device."""
        return clock.raced(self.bench, configs, self.default)

    def _submit(self, config):
        asked = self.bench, self.default, config, self.box.left, self.about
        return self.pool.submit(measured, *asked, seconds=self.seconds + STARTING, resources={self.resource: 1})


def compiled(job: "Job", about: dict) -> "Resources | str":
    """Compile a job, on a worker."""
    _check(about, None)
    from impls.compiler_triton import check_compiling, outcome

    check_compiling()
    return outcome(job)


def measured(bench: Bench, default: object, config: object, seconds: float, about: dict) -> tuple:
    """Measure a configuration, on a worker; returns what became of it, and whether the device still answers."""
    _check(about, bench.device)
    return measuring.measured(_timer(bench, default), config, seconds)


@lru_cache(maxsize=1)
def _timer(bench: Bench, default: object) -> Clock:
    return Clock(bench, default, Box(0))


@cache
def _about(device: str | None) -> dict:
    """Say what results follow from, besides the job: a worker must have had the same from its first task on."""
    versions = provenance.versions(("torch", "triton"))
    found = {"sources": provenance.kernels(), "torch": versions["torch"], "triton": versions["triton"]}
    return found | ({"device": named(device)} if device else {})


def _check(about: dict, device: str | None) -> None:
    """Raise RuntimeError on a worker whose results would be another's."""
    from distributed import get_worker

    worker = get_worker()
    if wrong := differences(about, _about(device)):
        raise RuntimeError(f"the worker {worker.address} is another: {'; '.join(wrong)}")
    if (threads := worker.state.nthreads) != 1:
        raise RuntimeError(f"the worker {worker.address} has {threads} threads: dask worker ADDRESS --nthreads 1")


def _own(result: object) -> object:
    """Return a result; what a worker raised, or the cluster lost, is no candidate's fault: UsageError."""
    if isinstance(result, Failure) and result.kind in ("raised", "lost"):
        raise UsageError(f"--scheduler: {result.message}")
    return result
