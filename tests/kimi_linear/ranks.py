"""Run a program as the ranks of a job, on loopback, and tell how each of them ended. No test by itself."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 150
"""Seconds after which a test ends what it has started: none of it takes 20 where the machine has nothing else to do."""


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    code: int
    out: str
    err: str


def port() -> str:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def start(arguments: list[str], ranks: int, **environment: str) -> list[subprocess.Popen]:
    """Start python with these arguments once per rank, as torchrun would; environment values may hold {rank}."""
    known = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=known
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {name: value.format(rank=rank) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(processes: list[subprocess.Popen]) -> list[End]:
    """Wait for all ranks, the last first, and return how they ended; none outlives this."""
    try:
        told = [process.communicate(timeout=LIMIT) for process in reversed(processes)][::-1]
        return [End(process.returncode, *each) for process, each in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()


def run(arguments: list[str], ranks: int = 2, **environment: str) -> list[End]:
    """Start ranks and wait for them."""
    return ended(start(arguments, ranks, **environment))


def done(ends: list[End]) -> list[str]:
    """Return what ranks that all ended well have printed."""
    assert [end.code for end in ends] == [0] * len(ends), [end.err[-2000:] for end in ends]
    return [end.out for end in ends]
