"""Run workers side by side, collect their records, and turn them into a verdict and an exit code."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from verify.plan import Plan

SIDE_BY_SIDE = 2
SILENCE = 600.0
"""Seconds without a record after which a worker counts as hung and is killed; a deep recipe takes under 20."""

PASS, FAILED, USAGE, NOTHING, SURVIVOR, FLAKY, CRASH, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

Listener = Callable[[dict], None]


@dataclass
class Cell:
    """One property of one target: how many cases and rows were judged, and the worst measure."""

    cases: int = 0
    worst: dict | None = None

    def add(self, result: dict) -> None:
        """Count a case."""
        self.cases += 1
        if self.worst is None or float(result["ratio"]) > float(self.worst["ratio"]):
            self.worst = result

    @property
    def ratio(self) -> float:
        """Worst ratio to the limit."""
        return float(self.worst["ratio"]) if self.worst else 0.0


@dataclass
class Verdict:
    """All that is known of one target."""

    target: str
    cells: dict[str, Cell] = field(default_factory=dict)
    coverage: dict[str, list[float]] = field(default_factory=dict)
    probes: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seen: int = 0
    done: dict | None = None
    broken: dict | None = None

    def add(self, record: dict) -> None:
        """Take in one record."""
        kind = record["kind"]
        if kind == "case":
            self.seen += 1
            for name, result in record["results"].items():
                self.cells.setdefault(name, Cell()).add(result)
            for term, change in record["coverage"].items():
                self.coverage.setdefault(term, []).append(change)
        elif kind == "probe":
            self.probes.append(record)
        elif kind == "failure":
            self.failures.append(record)
        elif kind == "target":
            self.done, self.counts = record, record["counts"]
        else:
            self.broken = record

    @property
    def findings(self) -> list[dict]:
        """What the probe found: keywords that the target takes and ignores, questions that it answers wrongly."""
        return [p for p in self.probes if p["outcome"] in ("ignored", "wrong")]

    @property
    def nondeterministic(self) -> bool:
        """True if equal calls gave different bits, or a failure was gone when its case ran again."""
        repeated = [cell for name, cell in self.cells.items() if name.startswith("determinism") and cell.ratio > 1]
        unequal = any(not cell.worst["what"].startswith("raised ") for cell in repeated)
        return unequal or any(not f["steady"] for f in self.failures)

    @property
    def code(self) -> int:
        """Exit code of this target alone."""
        if self.broken:
            return USAGE if self.broken["kind"] == "usage" else CRASH
        if self.nondeterministic:
            return FLAKY
        if self.findings or any(cell.ratio > 1 for cell in self.cells.values()):
            return FAILED
        return PASS if self.cells else NOTHING


def exit_code(codes: list[int]) -> int:
    """Combine exit codes: usage first (nothing was judged as asked), then 6 > 5 > 1 > 4 > 3 > 0; 3 if there is none."""
    return next((code for code in (USAGE, CRASH, FLAKY, FAILED, SURVIVOR, NOTHING, PASS) if code in codes), NOTHING)


def run(batches: list[list[Plan]], listen: Listener) -> dict[str, Verdict]:
    """Judge batches of plans, each batch in a process of its own, `SIDE_BY_SIDE` at a time; returns verdicts by target.

    `listen` gets every record in the order of arrival. On KeyboardInterrupt the workers are killed and it propagates.
    """
    verdicts = {plan.target: Verdict(plan.target) for batch in batches for plan in batch}
    waiting, arrived, running = list(batches), queue.Queue(), 0
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and running < SIDE_BY_SIDE:
                stack.enter_context(_worker(waiting.pop(0), arrived))
                running += 1
            record = arrived.get()
            if record is None:
                running -= 1
                continue
            verdicts[record["target"]].add(record)
            listen(record)
    return verdicts


UNCACHED = "glibc.malloc.tcache_count=0"
"""Keeps glibc from caching blocks of up to 1 KiB for each thread: these come with what they held, whatever
`poison.poisoned_memory` has asked malloc to fill them with."""


def environment(device: str) -> dict[str, str]:
    """Return the environment of a worker that judges on a device."""
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), UNCACHED)))
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": tunables}
    found.pop("TRITON_INTERPRET", None)  # a device means what it says, whatever the shell is set to
    return found | {"TRITON_INTERPRET": "1"} if device == "interpret" else found


@contextlib.contextmanager
def _worker(batch: list[Plan], arrived: queue.Queue) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "verify.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(batch[0].device),
        start_new_session=True,
    )
    thread = threading.Thread(target=_collect, args=(process, batch, arrived), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _kill(process)
        thread.join()


def _kill(process: subprocess.Popen) -> None:
    """Kill a worker with everything that its targets started: they hold its pipes open, and would be left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _collect(process: subprocess.Popen, batch: list[Plan], arrived: queue.Queue) -> None:
    watchdog = _Watchdog(process)
    errors = threading.Thread(target=watchdog.keep_errors, daemon=True)
    errors.start()
    unfinished = [plan.target for plan in batch]
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps([plan.to_json() for plan in batch]))
        process.stdin.close()
    for line in process.stdout:
        watchdog.heard()
        if not line.endswith("\n"):
            break  # a worker that was killed in the middle of a record
        record = json.loads(line)
        if record["kind"] in ("target", "usage", "crash"):
            unfinished.remove(record["target"])
        arrived.put(record)
    code = process.wait()
    _kill(process)
    watchdog.stop()
    errors.join()
    for target in unfinished:
        reason = f"no record for {SILENCE:.0f} s: killed" if watchdog.fired else f"worker ended with {_ending(code)}"
        arrived.put({"schema": 1, "kind": "crash", "target": target, "reason": reason, "trace": watchdog.tail()})
    arrived.put(None)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Watchdog:
    """Kills a process that has been silent for too long, and keeps the end of what it wrote to standard error."""

    def __init__(self, process: subprocess.Popen):
        self._process, self.fired, self._errors = process, False, []
        self._timer = None
        self.heard()

    def heard(self) -> None:
        """Start counting silence anew."""
        self.stop()
        self._timer = threading.Timer(SILENCE, self._fire)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Stop counting."""
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self.fired = True
        _kill(self._process)

    def keep_errors(self) -> None:
        """Read standard error to its end."""
        for line in self._process.stderr:
            self._errors = [*self._errors[-40:], line]

    def tail(self) -> str:
        """Return the last lines of standard error."""
        return "".join(self._errors)
