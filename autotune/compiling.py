"""Compile candidates ahead of time in worker processes that can be killed, and keep what the compiler said.

A compiler may hang, take all memory or end its process: a worker has a limit of address space, is killed when a job
outlasts its time, and is replaced. Results are cached by what they follow from: the sources of the kernels, Triton's
version, the target, the problem's constants and the fields that the kernel depends on.
"""

import contextlib
import hashlib
import json
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from autotune import provenance
from autotune.store import write
from autotune.timing import Box
from impls.assembly import Counts
from impls.compiler_triton import Job, Resources, outcome
from impls.estimate import Latency

MEMORY = 12 << 30
"""Bytes of address space that a worker may take; torch's and Triton's libraries are 4 GiB of it."""
STARTING = 60.0
"""Seconds that a new worker has to import torch and Triton, on top of a job's."""


@dataclass
class _Worker:
    process: object
    pipe: Connection
    job: Job | None = None
    until: float = 0.0
    fresh: bool = True


class Compiler:
    """Compiles jobs side by side; a context manager, behind which no worker is left."""

    def __init__(
        self,
        cache: Path,
        processes: int = 2,
        seconds: float = 60.0,
        elsewhere: Callable[[list[Job], Box], Iterator[tuple[Job, Resources | str, bool]]] | None = None,
    ):
        """elsewhere: compiles jobs on other machines, and yields what `_run` yields, instead of processes here."""
        self.cache, self.processes, self.seconds = cache, processes, seconds
        self.run = elsewhere or self._run
        self.workers: list[_Worker] = []
        self.sources = provenance.kernels()
        self.compiled = self.recalled = 0

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *error) -> None:
        for worker in self.workers:
            _end(worker)
        self.workers = []

    def outcomes(self, jobs: Iterable[Job], box: Box) -> dict[Job, Resources | str]:
        """Return what became of each job: resources, or why there are none; those that the box cut off are missing.

        What a compiler answered is in the cache at once.
        """
        found, todo = {}, []
        for job in dict.fromkeys(jobs):
            known = self._recall(job)
            if known is None:
                todo.append(job)
            else:
                found[job] = known
        for job, result, lasting in self.run(todo, box):
            self.compiled += lasting
            if lasting:
                self._keep(job, result)
            found[job] = result
        return found

    def _run(self, todo: list[Job], box: Box) -> Iterator[tuple[Job, Resources | str, bool]]:
        """Yield job, result, and whether it would be the same again: a busy machine kills compilers, too."""
        todo = todo[::-1]
        while (todo and box.left) or any(worker.job for worker in self.workers):
            self._hand_out(todo, box)
            busy = [worker for worker in self.workers if worker.job]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], max(0.0, min(x.until for x in busy) - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    yield self._answer(worker)
                elif time.monotonic() >= worker.until:
                    yield self._drop(worker, f"the compiler took more than {self.seconds:g} s and was killed")

    def _hand_out(self, todo: list[Job], box: Box) -> None:
        while todo and box.left:
            worker = next((x for x in self.workers if x.job is None), None)
            if worker is None and len(self.workers) < self.processes:
                worker = _start()
                self.workers.append(worker)
            if worker is None:
                return
            worker.job = todo.pop()
            worker.until = time.monotonic() + self.seconds + (STARTING if worker.fresh else 0)
            worker.fresh = False
            with contextlib.suppress(OSError):  # it died idle: reading from it will say so
                worker.pipe.send(worker.job)

    def _answer(self, worker: _Worker) -> tuple[Job, Resources | str, bool]:
        try:
            job, result = worker.job, worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            return self._drop(worker, f"the compiler ended its process with status {worker.process.exitcode}")
        worker.job = None
        return job, result, True

    def _drop(self, worker: _Worker, reason: str) -> tuple[Job, str, bool]:
        self.workers.remove(worker)
        _end(worker)
        return worker.job, reason, False

    def _path(self, job: Job) -> Path:
        versions = provenance.versions(("triton",))
        told = [
            asdict(job.problem),
            asdict(job.config),
            asdict(job.target),
            job.kernel,
            self.sources,
            versions["triton"],
        ]
        return self.cache / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}.json"

    def _recall(self, job: Job) -> Resources | str | None:
        path = self._path(job)
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            result = data["error"] or _resources(data["resources"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a file that was cut off is compiled again
        self.recalled += 1
        return result

    def _keep(self, job: Job, result: Resources | str) -> None:
        failed = isinstance(result, str)
        data = {"error": result if failed else None, "resources": None if failed else asdict(result)}
        write(self._path(job), json.dumps(data))


def _resources(data: dict) -> Resources:
    parts = {"code": Counts(**data["code"]), "loop": Counts(**data["loop"]), "latency": Latency(**data["latency"])}
    return Resources(**(data | parts))


def _start() -> _Worker:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it ends its workers
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(outcome(pipe.recv()))
