"""Processes that judge: what they say is handed on as it comes, and what they leave when they die the next one judges.

Targets run in them and nowhere else. The end of one is a verdict on the case that it was asked; behind that case a new
process goes on, a bounded number of times.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from verify.parts import earlier
from verify.plan import COUNTED, Plan

UNCACHED = "glibc.malloc.tcache_count=0"
"""Keeps glibc from caching blocks of up to 1 KiB for each thread: these come with what they held, whatever
`poison.poisoned_memory` has asked malloc to fill them with."""


@dataclass(frozen=True)
class Rest:
    """What a process has left of its plans, now that it has ended: nothing, unless it died."""

    plans: tuple[Plan, ...]


def environment(device: str) -> dict[str, str]:
    """Return the environment of a worker that judges on a device."""
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), UNCACHED)))
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": tunables}
    found.pop("TRITON_INTERPRET", None)  # a device means what it says, whatever the shell is set to
    return found | {"TRITON_INTERPRET": "1"} if device == "interpret" else found


@contextlib.contextmanager
def worker(batch: list[Plan], arrived: queue.Queue, silence: float) -> Iterator[None]:
    """Have a process judge plans one by one: its records arrive in a queue, and last the Rest."""
    process = subprocess.Popen(
        [sys.executable, "-m", "verify.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(batch[0].device),
        start_new_session=True,
    )
    thread = threading.Thread(target=_collect, args=(process, batch, arrived, silence), daemon=True)
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


def _collect(process: subprocess.Popen, batch: list[Plan], arrived: queue.Queue, silence: float) -> None:
    watchdog, heard = _Watchdog(process, silence), _Heard(batch)
    errors = threading.Thread(target=watchdog.keep_errors, daemon=True)
    errors.start()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps([plan.to_json() for plan in batch]))
        process.stdin.close()
    for line in process.stdout:
        watchdog.heard()
        if not line.endswith("\n"):
            break  # a worker that was killed in the middle of a record
        record = json.loads(line)
        if heard.take(record):
            arrived.put(record)
    code = process.wait()
    _kill(process)
    watchdog.stop()
    errors.join()
    rest = ()
    if heard.left:
        reason = f"no record for {silence:g} s: killed" if watchdog.fired else f"worker ended with {_ending(code)}"
        records, rest = heard.died(reason, watchdog.tail())
        for record in records:
            arrived.put(record)
    arrived.put(Rest(rest))


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Heard:
    """What a process has said of its plans, so that another one can go on where it ended."""

    def __init__(self, batch: list[Plan]):
        self.left, self._cases, self._reported, self._begun = list(batch), [], [], None

    def take(self, record: dict) -> bool:
        """Take in a record; returns whether it is handed on."""
        kind = record["kind"]
        if kind == "begin":
            self._begun = record
        elif kind == "case":
            self._cases.append(record)
        elif kind == "failure":
            self._reported.append(record["property"])
        elif kind in ("target", "usage", "crash"):
            self.left.pop(0)
            self._cases, self._reported, self._begun = [], [], None
        return kind != "begin"

    def died(self, reason: str, trace: str) -> tuple[list[dict], tuple[Plan, ...]]:
        """Return the records of a process that died over the first plan that is left, and what is left to be judged."""
        plan, *others = self.left
        crash = {"schema": 1, "kind": "crash", "target": plan.target, "reason": reason, "trace": trace}
        if self._begun is None:
            return [crash], tuple(others)
        fatal = _fatal(self._begun, plan, reason)
        crash |= {"recipe": self._begun["recipe"], "property": self._begun["property"]}
        rest = replace(
            plan,
            earlier=plan.earlier + earlier([*self._cases, *(x for x in fatal if x["kind"] == "case")], plan.target),
            reported=(*plan.reported, *self._reported, self._begun["property"]),
            restarts=plan.restarts - 1,
        )
        if plan.recipe or plan.restarts < 1:
            crash["left"] = 0 if plan.recipe else sum(len(rest.numbers(dtype)) for dtype in rest.dtypes)
            return [*fatal, crash], tuple(others)
        return [*fatal, crash | {"restarts": rest.restarts}], (rest, *others)


def _fatal(begun: dict, plan: Plan, reason: str) -> list[dict]:
    """Return the records of what a process died of: the failure of the property that it was asked, and its case.

    No case where one that was judged before was made smaller.
    """
    asked = {name: begun[name] for name in ("target", "recipe", "inputs")} | {"schema": 1, "device": plan.device}
    outcome = {"ratio": "inf", "what": reason, "observed": "inf", "allowed": 0.0, "where": ""}
    about = {"property": begun["property"], "steady": True, "config": plan.config, "contract": plan.contract}
    failure = asked | {"kind": "failure"} | about | outcome
    if begun["number"] is None:
        return [failure]
    counts = dict.fromkeys(COUNTED, 0) | {"cases": 1}
    judged = {"results": {begun["property"]: outcome}, "gates": {}, "coverage": {}}
    return [asked | {"kind": "case", "number": begun["number"], "units": 0, "counts": counts} | judged, failure]


class _Watchdog:
    """Kills a process that has been silent for too long, and keeps the end of what it wrote to standard error."""

    def __init__(self, process: subprocess.Popen, silence: float):
        self._process, self._silence, self.fired, self._errors = process, silence, False, []
        self._timer = None
        self.heard()

    def heard(self) -> None:
        """Start counting silence anew."""
        self.stop()
        self._timer = threading.Timer(self._silence, self._fire)
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
