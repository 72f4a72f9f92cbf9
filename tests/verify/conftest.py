"""What the judge's tests share: the broken kernels by name, a run in this process, and a run of the command."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from verify import runner, session
from verify.plan import Plan

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(HERE))
"""So that `broken_kernels:name` is found here as it is in the worker processes."""


@pytest.fixture(scope="session")
def judged():
    """Judge a target in this process; returns its records."""

    def judge(target: str, properties: tuple[str, ...] = (), examples: int = 8, **plan) -> list[dict]:
        records = []
        filled = {"device": "cpu", "profile": "smoke", "dtypes": ("float32",), "seed": 0} | plan
        made = Plan(target=target, examples=examples, properties=properties, **filled)
        runner.judge(made, lambda kind, **fields: records.append({"kind": kind, **fields}))
        return [record for record in records if record["kind"] != "begin"]

    return judge


@pytest.fixture
def in_process(monkeypatch):
    """Have plans judged in this process."""
    from in_this_process import judge_here

    monkeypatch.setattr(session, "run", judge_here)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command():
    """Run `python -m verify` from the root of the repository, as a person does; returns how it ended."""

    def run(*arguments, module: str = "verify") -> Ended:
        with started(*arguments, module=module) as process:
            out, err = process.communicate(timeout=100)
        return Ended(process.returncode, out, err)

    return run


def started(*arguments, module: str = "verify") -> subprocess.Popen:
    """Start the command."""
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def interrupted():
    """Start the command, wait until `ready()`, press Ctrl-C; returns how it ended and the processes it had started."""

    def run(ready, *arguments) -> tuple[Ended, list[int]]:
        with started(*arguments) as process:
            while not ready() and process.poll() is None:
                time.sleep(0.05)
            children = _children(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err), children

    return run


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended since
            found += map(int, (task / "children").read_text().split())
    return found
