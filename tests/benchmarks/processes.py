"""Have an entrant measured in a process of its own, as its users have it; what is measured is asked by line."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent


@contextlib.contextmanager
def apart(program: str, *arguments: str | Path) -> Iterator[Callable[[str], float]]:
    """Yield a function that hands a line to a Python program, and returns the number that it answers.

    The program says one line when it is ready, and then answers each line with one. It has as many threads as this
    process. Raises RuntimeError where it ends before it has answered.
    """
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def heard() -> str:
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"{', '.join(map(str, arguments))} ended with status {process.wait()}")
        return line

    def asked(line: str) -> float:
        print(line, file=process.stdin, flush=True)
        return float(heard())

    with process:
        heard()
        yield asked
        process.stdin.close()
