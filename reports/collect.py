"""Run what writes results, one command after another, within a time box; the same command goes on where it stopped.

Layers are crossed by process: nothing of the commands is imported. A collection is a folder of one device, day and
state of the sources, `collected.json` in it says what was run; what is cut off or failed is run again by the next call,
with a larger share of its time.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import filelock

from reports import load
from reports.claims import FORMS, OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kda_spec", "impls", "verify", "autotune", "kimi_linear")
DONE, USAGE, FAILED, UNFINISHED, INTERRUPTED = 0, 2, 1, 7, 130
STATE = "collected.json"
GRACE = 30.0
"""Seconds between asking a command to stop and ending it."""
TAIL = 600
"""Characters of what a failed command printed last that are kept."""
RACE = 90.0
"""Seconds of the tuner's race and of its judge, which come when its search is over."""
COMPILING = 40.0
"""Seconds that the yardstick compiles before its clock runs, and of the call that overruns it."""
LEAST = 1.0
"""Seconds below which no command is begun."""


class CollectError(Exception):
    """Say what is wrong with the command line or the machine."""


@dataclass(frozen=True)
class Step:
    """One command: arguments with {folder}, {device} and {minutes}, and what it writes."""

    name: str
    command: tuple[str, ...]
    """Behind `python -m`."""
    weight: float
    """Of its share of the time that is left."""
    writes: str
    """A pattern of the files in the folder."""
    done: tuple[int, ...] = (0,)
    """Exit codes with which it has said what it had to say: a failed property is a result, too."""
    after: float = 0.0
    """Seconds that it takes behind the minutes it is told."""
    resumes: bool = False
    """Whether it goes on with its own files; those of the others are removed before they are run again."""

    @property
    def clocked(self) -> bool:
        """Tell whether it fills the minutes it is told; what ends by itself may take half of all that is left."""
        return "{minutes}" in self.command


_TUNED = ("--out", "{folder}/tuned", "--minutes", "{minutes}", "--record")
_TUNE = ("autotune", "tune", "--device", "{device}", "--op")
_BENCH = ("autotune", "bench", "--device", "{device}", "--minutes", "{minutes}", "--out", "{folder}/bench.json")
_MODEL = ("--preset", "tiny", "--layers", "8", "--baseline", "hybrid,mla,gdn-hybrid", "--json", "{folder}/model.json")
_JUDGED = (0, 1, 5)
_TABLE = "{folder}/trials-"
_YARDSTICK = ("autotune", "yardstick", "--device", "{device}", "--minutes", "{minutes}")


def _tuned(op: str) -> Step:
    return Step(
        f"tune {op}", (*_TUNE, op, *_TUNED, f"{_TABLE}{op}.json"), 3, f"trials-{op}.json", (0, 1), RACE, resumes=True
    )


_TESTS = ("pytest", "-q", "-m", "")


def _tested(name: str, file: str) -> Step:
    return Step(name, (*_TESTS, f"tests/kda_spec/{file}"), 0.5, f"{name.replace(' ', '-')}.log", (0, 1))


CPU = (
    Step("verify", ("verify", "--json", "{folder}/verify.jsonl"), 3, "verify.jsonl", _JUDGED),
    Step("model verify", ("verify", "kimi_linear", "--json", "{folder}/model.jsonl"), 2, "model.jsonl", _JUDGED),
    Step("self-test", ("verify", "--self-test", "--json", "{folder}/self-test.jsonl"), 4, "self-test.jsonl", (0, 1, 4)),
    _tested(FORMS, "test_spec_forms.py"),
    _tested(OBJECTIVES, "test_spec_family.py"),
    _tuned("chunk_torch"),
    _tuned("recurrent_torch"),
    Step("bench", (*_BENCH, "--cases", "small-*,t1024-*"), 2, "bench.json", (0, 1), resumes=True),
    Step("yardstick", (*_YARDSTICK, "--out", "{folder}/yardstick.json"), 2, "yardstick.json", after=COMPILING),
    Step("model", ("kimi_linear", "bench", "--device", "{device}", "--context", "1024,4096", *_MODEL), 1, "model.json"),
    Step(
        "benchmarks",
        ("pytest", "tests/benchmarks/test_bench_cpu.py", "-m", "", "--benchmark-enable", "--results", "{folder}"),
        3, "cpu-*.json", (0, 1),
    ),
)  # fmt: skip
CUDA = (
    Step("verify", ("verify", "--device", "{device}", "--json", "{folder}/verify.jsonl"), 3, "verify.jsonl", _JUDGED),
    _tuned("chunk_triton"),
    _tuned("recurrent_triton"),
    Step("bench", _BENCH, 4, "bench.json", (0, 1), resumes=True),
    Step(
        "yardstick",
        (*_YARDSTICK, "--heads", "64", "--out", "{folder}/yardstick.json"),
        2,
        "yardstick.json",
        after=COMPILING,
    ),
    Step(
        "model", ("kimi_linear", "bench", "--device", "{device}", "--context", "4096,65536", *_MODEL), 1, "model.json"
    ),
)


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
        done = {name for name, step in self.state["steps"].items() if step["outcome"] == "done"}
        return [step for step in self.steps if step.name not in done]

    def collect(self, seconds: float) -> int:
        """Run the steps that are left, each in its share of the time; returns the exit code."""
        end, waiting = time.monotonic() + seconds, self.left()
        self._write()
        self.say(f"{self.folder}: {len(self.steps) - len(waiting)} of {len(self.steps)} steps done")
        while waiting:
            step, left = waiting[0], end - time.monotonic()
            share = left * max(step.weight / sum(x.weight for x in waiting), 0.0 if step.clocked else 0.5)
            if share < LEAST:
                break
            waiting.pop(0)
            try:
                self._run(step, share)
            except KeyboardInterrupt:
                self.say(f"{step.name}: interrupted")
                return INTERRUPTED
        left = [step.name for step in self.left()]
        if left:
            self.say(f"not done: {', '.join(left)}; the same command goes on")
        failed = any(step["outcome"] == "failed" for step in self.state["steps"].values())
        return FAILED if failed else UNFINISHED if left else DONE

    def _run(self, step: Step, seconds: float) -> None:
        """Run one step and write down what became of it."""
        if not step.resumes:
            for path in self.folder.glob(step.writes):
                path.unlink()
        minutes = max(0.9 * seconds - step.after, 0.1 * seconds) / 60
        fields = {"folder": self.folder, "device": self.about["device"], "minutes": f"{minutes:.2f}"}
        command = ["python", "-m", *(part.format(**fields) for part in step.command)]
        self.say(f"{step.name}: at most {seconds:.0f} s")
        begun, log = time.monotonic(), self.folder / f"{step.name.replace(' ', '-')}.log"
        code = None
        try:
            code = ended([sys.executable, *command[1:]], log, seconds, step.done)
        finally:
            outcome = (
                "done" if code in step.done else "cut off" if code in (None, UNFINISHED, INTERRUPTED) else "failed"
            )
            found = {"command": self._short(command), "outcome": outcome, "code": code}
            found |= {"seconds": round(time.monotonic() - begun, 1)}
            found["files"] = sorted(path.name for path in self.folder.glob(step.writes))
            if outcome == "failed":
                found["tail"] = log.read_text(errors="replace")[-TAIL:]
            self.state["steps"] = {k: v for k, v in self.state["steps"].items() if k != step.name} | {step.name: found}
            self._write()
        self.say(
            f"{step.name}: {outcome} after {found['seconds']:.0f} s" + (f", see {log}" if outcome == "failed" else "")
        )

    def _short(self, command: list[str]) -> list[str]:
        """Return a command without the folder of this machine."""
        return [part.replace(str(self.folder), "FOLDER") for part in command]

    def _write(self) -> None:
        self.state["updated"] = _now()
        path = self.folder / f".{STATE}"
        path.write_text(json.dumps(self.state, indent=1) + "\n")
        os.replace(path, self.folder / STATE)


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
