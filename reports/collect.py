"""Run what writes results, one command after another, within a time box; the same command goes on where it stopped.

Layers are crossed by process: nothing of the commands is imported. A collection is a folder of one device, day and
state of the sources, `collected.json` in it says what was run; what is cut off or failed, and what no time was left
for, is run by the next call.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import filelock

from reports import load, shares
from reports.processes import GRACE, ROOT, ended
from reports.steps import CPU, CUDA, Step

PACKAGES = ("kda_spec", "impls", "verify", "autotune", "kimi_linear")
DONE, USAGE, FAILED, UNFINISHED, INTERRUPTED = 0, 2, 1, 7, 130
STATE = "collected.json"
TAIL = 600
"""Characters of what a failed command printed last that are kept."""
RESERVE = 0.05
"""Share of the box, at most the grace of a step, that is kept for ending what does not end by itself."""


class CollectError(Exception):
    """Say what is wrong with the command line or the machine."""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.add_argument("--device", default="cpu", help="cpu or cuda:N (default %(default)s)")
    p.add_argument("--minutes", type=float, default=20.0, metavar="N", help="time box (default 20)")
    p.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="folder of collections (default %(default)s)"
    )
    p.add_argument("--fresh", action="store_true", help="begin a new collection, whatever is unfinished")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not re.fullmatch(r"cpu|cuda:\d+", args.device):
        raise CollectError(f"--device must be cpu or cuda:N, got {args.device!r}")
    if not 0 < args.minutes < 1e6:
        raise CollectError(f"--minutes must be positive, got {args.minutes:g}")
    steps = CPU if args.device == "cpu" else CUDA
    name, digest = machine(args.device), sources(ROOT)
    about = {"device": args.device, "machine": name, "sources": digest, "minutes": args.minutes}
    folder = chosen(args.out, name, digest, [step.name for step in steps], args.fresh)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            return Collection(folder, steps, about, partial(print, flush=True)).collect(args.minutes * 60)
    except filelock.Timeout as error:
        raise CollectError(f"{folder}: another collect is at work there") from error
    except OSError as error:
        raise CollectError(f"--out {args.out}: {error}") from error


def machine(device: str) -> str:
    """Return the name of a device, asked in a process of its own; CollectError where there is none."""
    program = "import sys; from impls.devices import named; print(named(sys.argv[1])['name'])"
    asked = subprocess.run([sys.executable, "-c", program, device], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        raise CollectError(f"--device {device}: {asked.stderr.strip().splitlines()[-1]}")
    return asked.stdout.strip()


def sources(root: Path) -> str:
    """Return a hash of the programs that are run: results of two states are never in one collection."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def chosen(out: Path, name: str, digest: str, steps: Sequence[str], fresh: bool) -> Path:
    """Return the newest unfinished collection of this device and these sources, else the folder of a new one."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    found = sorted(out.glob(f"{slug}-20??-??-??-{digest[:8]}*/{STATE}"), key=lambda path: path.stat().st_mtime)
    if found and not fresh:
        done = {name for name, step in _state(found[-1])["steps"].items() if step["outcome"] == "done"}
        if set(steps) - done:
            return found[-1].parent
    base = out / f"{slug}-{datetime.now(UTC):%Y-%m-%d}-{digest[:8]}"
    taken = (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 1000)))
    return next(path for path in taken if not path.exists())


def _state(path: Path) -> dict:
    [result] = load.read([path])
    return result.data


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Collection:
    """The steps of one folder, and what became of each."""

    def __init__(self, folder: Path, steps: Sequence[Step], about: dict, say: Callable[[str], None]):
        """Read what was done before; load.ResultError where that is no state of a collection."""
        self.folder, self.steps, self.say = folder.resolve(), steps, say
        path = self.folder / STATE
        before = _state(path) if path.exists() else {"begun": _now(), "steps": {}}
        self.about, self.state = about, {"schema": 1, "kind": "collected"} | before | about

    def left(self) -> list[Step]:
        """Return the steps that are not done."""
        return [step for step in self.steps if not self._is_done(step)]

    def _is_done(self, step: Step) -> bool:
        return self._became(step) == "done"

    def _became(self, step: Step) -> str | None:
        return self.state["steps"].get(step.name, {}).get("outcome")

    def collect(self, seconds: float) -> int:
        """Run the steps that are left, each in its share of the time; returns the exit code.

        Who was cut off gets, once more, a share of what the others have left over.
        """
        end, waiting = time.monotonic() + seconds - min(GRACE, RESERVE * seconds), self.left()
        self._write()
        self.say(f"{self.folder}: {len(self.steps) - len(waiting)} of {len(self.steps)} steps done")
        try:
            if waiting and not self._pass(waiting, end):
                self._run(waiting[0], max(0.0, end - time.monotonic()))
            self._pass([step for step in waiting if self._became(step) == "cut off"], end)
        except KeyboardInterrupt:
            self.say("interrupted")
            return INTERRUPTED
        left = [step.name for step in self.left()]
        if left:
            self.say(f"not done: {', '.join(left)}; the same command goes on")
        failed = any(step["outcome"] == "failed" for step in self.state["steps"].values())
        return FAILED if failed else UNFINISHED if left else DONE

    def _pass(self, steps: Sequence[Step], end: float) -> int:
        """Run each of the steps that the time allows; returns their number."""
        count = 0
        for i, step in enumerate(steps):
            slow, left = self.pace(), end - time.monotonic()
            needs = {x: shares.need(x, slow, self.state["steps"].get(x.name)) for x in steps[i:]}
            if (own := shares.share(needs, left)) is None:
                self.say(f"{step.name}: not begun, takes about {needs[step]:.0f} s and {max(0.0, left):.0f} s are left")
            else:
                self._run(step, own)
                count += 1
        return count

    def pace(self) -> float:
        """Return how many times slower than two quiet cores this machine was so far, or is by its load."""
        done = [step for step in self.steps if self._is_done(step)]
        return shares.pace(done, self.state["steps"], os.getloadavg()[0] / os.cpu_count())

    def _run(self, step: Step, seconds: float) -> None:
        """Run one step and write down what became of it."""
        if not step.resumes:
            for path in self.folder.glob(step.writes):
                path.unlink()
        minutes = shares.told(step, seconds, self.pace())
        fields = {"folder": self._place(), "device": self.about["device"], "minutes": f"{minutes:.2f}"}
        command = ["python", "-m", *(part.format(**fields) for part in step.command)]
        self.say(f"{step.name}: at most {seconds:.0f} s")
        begun, log = time.monotonic(), self.folder / f"{step.name.replace(' ', '-')}.log"
        code = None
        try:
            code = ended([sys.executable, *command[1:]], log, seconds, step.done)
        finally:
            files = sorted(path.name for path in self.folder.glob(step.writes))
            found = {"command": self._short(command), "outcome": self._outcome(step, code, files), "code": code}
            found |= {"seconds": round(time.monotonic() - begun, 1), "files": files}
            if found["outcome"] == "failed":
                found["tail"] = log.read_text(errors="replace")[-TAIL:]
            self.state["steps"] = {k: v for k, v in self.state["steps"].items() if k != step.name} | {step.name: found}
            self._write()
        see = f", see {log}" if found["outcome"] == "failed" else ""
        self.say(f"{step.name}: {found['outcome']} after {found['seconds']:.0f} s{see}")

    def _outcome(self, step: Step, code: int | None, files: Sequence[str]) -> str:
        """Tell what became of a step; a program that does not even load ends with 1, too, but writes nothing."""
        if code in step.done and files:
            return "done"
        return "cut off" if code in (None, UNFINISHED, INTERRUPTED) else "failed"

    def _short(self, command: list[str]) -> list[str]:
        """Return a command without the folder of this machine."""
        return [part.replace(str(self._place()), "FOLDER") for part in command]

    def _place(self) -> Path:
        """Return the folder as commands are told it, who write it down: seen from where they run, if it is below."""
        return self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder

    def _write(self) -> None:
        self.state["updated"] = _now()
        path = self.folder / f".{STATE}"
        path.write_text(json.dumps(self.state, indent=1) + "\n")
        os.replace(path, self.folder / STATE)
