"""Run a command within a time, and end it with all that it has started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30.0
"""Seconds between asking a command to stop and ending it."""


def ended(command: list[str], log: Path, seconds: float, done: Sequence[int] = ()) -> int | None:
    """Run a command with all it starts, its output in a file; returns its exit code.

    Where the time ended it that is None, unless it was done at that moment, with one of these codes.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return process.returncode if process.returncode in done else None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Ask a process to stop, as Ctrl-C does, and end what of it and of all it started is left."""
    started = descendants(process.pid) if process.poll() is None else []
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    for number, begun in [(process.pid, None), *started]:
        if begun is None or _begun(number) == begun:
            _end(number, os.killpg if begun is None else os.kill)
    process.wait()


def _end(number: int, kill: Callable[[int, int], None]) -> None:
    with contextlib.suppress(ProcessLookupError):
        kill(number, signal.SIGKILL)


def descendants(root: int) -> list[tuple[int, str]]:
    """Return the processes that a process has started, sessions of their own among them, each with when it began.

    Without /proc there are none: its group is ended then.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if (fields := _stat(path)) is not None:
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            found.append((child, _begun(child) or ""))
    return found


def _stat(path: Path) -> list[str] | None:
    """Return the fields of /proc/N/stat behind the name; None of a process that is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _begun(number: int) -> str | None:
    """Return when a process began: a number that is used again is another process."""
    fields = _stat(Path(f"/proc/{number}/stat"))
    return fields[19] if fields else None
