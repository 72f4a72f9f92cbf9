"""Hold the threads of this process on cores of their own while something is timed, and say how busy the machine was.

The affinity of the main thread does not move workers that exist already, so each thread of OpenMP's team, which torch
and what it compiles share, sets its own: GOMP_parallel runs a function in all of them. Nothing is held longer than a
race, or compilers and the judge, started from here, would inherit the cores.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")
MAPS = Path("/proc/self/maps")
TEAM = re.compile(r"/\S*lib(?:gomp|omp|iomp5)[^/]*\.so\S*")


class Unpinnable(Exception):
    """Threads cannot be held on cores of their own here; the message says why."""


@dataclass(frozen=True)
class Pinning:
    """Where the threads were held."""

    cpus: tuple[int, ...]
    """The CPU of each thread of the team, the calling one first; empty where they ran wherever the system put them."""
    reason: str | None
    """Why they were not held."""


@dataclass(frozen=True)
class Conditions:
    """What a measurement ran under: where its threads were held, and the load of the machine around it."""

    pinning: Pinning
    before: float | None
    after: float | None

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        return {
            "cpus": list(self.pinning.cpus),
            "unpinned": self.pinning.reason,
            "load_before": self.before,
            "load_after": self.after,
        }


def load() -> float | None:
    """Return how many threads wanted a CPU, on the average of the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


@contextlib.contextmanager
def pinned(threads: int, topology: Path = TOPOLOGY) -> Iterator[Pinning]:
    """Hold the calling thread and its OpenMP team of so many on distinct physical cores until this ends.

    Where that is impossible they stay where they are, and the reason is told. What they were allowed before, each of
    them is allowed again.
    """
    before: list[tuple[int, set[int]]] = []

    def hold(number: int) -> None:
        before.append((_thread(), os.sched_getaffinity(0)))
        os.sched_setaffinity(0, {chosen[number]})

    try:
        chosen = places(threads, topology)
        for in_team in _teams(threads):
            in_team(hold)
        found = Pinning(chosen, None)
    except (Unpinnable, OSError) as error:
        found = Pinning((), str(error))
        _restore(before)
    try:
        yield found
    finally:
        _restore(before)


def places(threads: int, topology: Path = TOPOLOGY) -> tuple[int, ...]:
    """Return a CPU for each thread, on distinct physical cores out of those that this thread may use.

    The last cores come first: the system's own work prefers CPU 0. Raises Unpinnable where there are too few cores, or
    the system does not offer it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise Unpinnable("the system has no sched_setaffinity")
    cores = {_core(cpu, topology): cpu for cpu in sorted(os.sched_getaffinity(0), reverse=True)}
    if threads > len(cores):
        raise Unpinnable(f"{threads} threads on {len(cores)} physical cores")
    return tuple(sorted(cores.values(), reverse=True)[:threads])


def _core(cpu: int, topology: Path) -> tuple[str, ...]:
    """Return what names the physical core of a CPU; the CPU itself where Linux does not tell."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        return tuple((folder / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _teams(threads: int) -> list[Callable[[Callable[[int], None]], None]]:
    """Return, for each OpenMP library of this process, what runs a function of a thread's number in its team.

    One thread needs no library. Raises Unpinnable where there is none, or its team is smaller than asked for.
    """
    if threads == 1:
        return [lambda do: do(0)]
    found = sorted({match[0] for line in MAPS.read_text().splitlines() if (match := TEAM.search(line))})
    libraries = [x for x in map(ctypes.CDLL, found) if hasattr(x, "GOMP_parallel")]
    if not libraries:
        raise Unpinnable("no OpenMP library with GOMP_parallel is loaded")
    return [lambda do, x=x: _in_team(x, threads, do) for x in libraries]


def _in_team(library: ctypes.CDLL, threads: int, do: Callable[[int], None]) -> None:
    met: dict[int, Exception | None] = {}

    def run(_) -> None:
        number = library.omp_get_thread_num()
        try:
            met[number] = do(number)
        except Exception as error:  # none may leave a callback of C
            met[number] = error

    library.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(run), None, threads, 0)
    if len(met) < threads:
        raise Unpinnable(f"OpenMP gives {len(met)} threads, not {threads}")
    for error in filter(None, met.values()):
        raise error


def _thread() -> int:
    return int(Path("/proc/thread-self").readlink().name)


def _restore(before: list[tuple[int, set[int]]]) -> None:
    for thread, cpus in reversed(before):  # of one that is in two teams the first entry counts
        with contextlib.suppress(OSError):  # a worker that has ended, or CPUs that were taken away meanwhile
            os.sched_setaffinity(thread, cpus)
