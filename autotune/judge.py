"""Run `python -m verify` in a process of its own and take in its verdicts: nothing unverified is ranked."""

import contextlib
import hashlib
import json
import math
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import filelock

from autotune.outcomes import BoxOver
from autotune.timing import Box
from impls import devices, table
from verify import records, session, sources
from verify.budget import demands_of
from verify.plan import Demands

GRACE = 20.0
"""Seconds that verify has, once interrupted, to end the workers that it started."""

FORGOTTEN = 7 * 86400
"""Seconds after which nobody is expected to go on with a run that was cut off."""

SILENT = "it ended without a summary"
OUTCOMES = {
    session.PASS: "passed",
    session.FAILED: "failed",
    session.USAGE: "not judged",
    session.NOTHING: "nothing ran",
    session.FLAKY: "nondeterministic",
    session.CRASH: "crashed",
}


def verified(names: list[str], device: str, profile: str, box: Box) -> dict[str, dict]:
    """Judge our implementations by name; returns the verdicts in JSON values, by name.

    What verify prints is not held back. Raises BoxOver where the box ends first; on KeyboardInterrupt verify is told,
    and given time to end its workers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        command = [sys.executable, "-m", "verify", *names, "--device", device, "--profile", profile]
        _run([*command, "--json", str(path)], box)
        lines = records.read(path) if path.is_file() else []
    return {name: _verdict(name, lines) for name in names}


def verified_config(
    name: str, config: object, device: str, profile: str, head_dims: tuple[int, ...], quiet: bool, folder: Path
) -> dict:
    """Judge one configuration of an implementation, K and V out of `head_dims`; returns its verdict in JSON values.

    A run that passed without meeting the demands of its profile (repeated calls, programs at once, gradients where the
    implementation has them) has not passed. What was judged is kept in `folder` until there is a verdict, so that who
    was cut off goes on: of a compiled configuration every case compiles, 26 s each on two slow cores.
    """
    asked = [name, "--device", device, "--profile", profile, "--head-dims", ",".join(map(str, head_dims))]
    with _kept(folder, _digest(asked, config, device)) as path:
        given = path.with_suffix(".config")
        given.write_text(json.dumps(asdict(config)))
        command = [sys.executable, "-m", "verify", *asked, "--config", str(given), "--json", str(path), "--resume"]
        # what ends a process is not to be chosen: no other process goes on with it
        _run([*command, "--restarts", "0"], Box(math.inf), subprocess.DEVNULL if quiet else None)
        lines = _readable(path)
        verdict = _verdict(name, lines)
        given.unlink()
        if any(line["kind"] == "summary" for line in lines):
            path.unlink()
    short = shortfall(verdict["counts"], demands_of(profile, device == "interpret"), table.find(name).backward)
    if verdict["code"] == session.PASS and short:
        return verdict | {"code": session.NOTHING, "outcome": OUTCOMES[session.NOTHING], "reason": short}
    return verdict


@contextlib.contextmanager
def _kept(folder: Path, digest: str) -> Iterator[Path]:
    """Yield a new file in which a run of verify goes on where the last one was cut off.

    Its name is its own: a verify whose tuner was killed may still be writing. While another process is at the same
    run, the file is in a folder that ends with the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("judging-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > FORGOTTEN:
                old.unlink()
    path = folder / f"judging-{digest}-{secrets.token_hex(4)}.jsonl"
    try:
        with filelock.FileLock(folder / f"judging-{digest}.lock", timeout=0):
            lines = {old: len(_readable(old)) for old in folder.glob(f"judging-{digest}-*.jsonl")}
            if any(lines.values()):
                shutil.copyfile(max(lines, key=lines.get), path)
            for old in folder.glob(f"judging-{digest}-*"):
                if old != path:
                    old.unlink(missing_ok=True)
            yield path
    except filelock.Timeout:
        with tempfile.TemporaryDirectory() as own:
            yield Path(own) / path.name


def _readable(path: Path) -> list[dict]:
    """Return the records of a run; none where there is no file, or another one."""
    try:
        lines = records.read(path)
    except (OSError, ValueError):
        return []
    return lines if lines and lines[0]["kind"] == "run" else []


def _digest(asked: list[str], config: object, device: str) -> str:
    """Tell runs of verify apart that cannot go on with one another's cases."""
    machine = devices.named("cpu" if device == "interpret" else device)
    about = asked, asdict(config), machine, sources.digest(), records.versions()
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def shortfall(counts: dict[str, int], demands: Demands, backward: bool) -> str | None:
    """Return what a verification that passed has left out of what its profile demands; None where that is nothing."""
    programs = counts.get("programs", counts.get("pairs", 0))
    if counts.get("repeats", 0) < demands.repeats:
        return f"equal calls were compared {counts.get('repeats', 0)} times, not {demands.repeats}"
    if programs < demands.programs:
        return f"a crowded call had {programs} programs in some launch, not {demands.programs}"
    if backward and not counts.get("backward"):
        return "no gradient was judged"
    return None


def _run(command: list[str], box: Box, output: int | None = None) -> None:
    # A session of its own: Ctrl-C reaches it once, from here, and not a second time while it is ending its workers.
    process = None
    try:
        with _held_back():  # within Popen it would leave verify running, with nobody to end it
            process = subprocess.Popen(command, start_new_session=True, stdout=output)
        process.wait(timeout=box.left if box.left < math.inf else None)
    except subprocess.TimeoutExpired:
        raise BoxOver from None
    finally:
        if process:
            _end(process)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended. It comes to the main thread only, and to Python's handlers only."""
    answer, pressed = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(answer):
        yield
        return
    signal.signal(signal.SIGINT, lambda *what: pressed.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)
        if pressed:
            answer(*pressed[0])


def _end(process: subprocess.Popen) -> None:
    """End verify as Ctrl-C does: killed, it would leave its workers running."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _verdict(name: str, lines: list[dict]) -> dict:
    """Read one target's verdict; a run without a summary is one that crashed."""
    own = [line for line in lines if line.get("target") == name]
    codes = next((line["targets"] for line in lines if line["kind"] == "summary"), {})
    code = codes.get(name, session.CRASH)
    counts = next((line["counts"] for line in own if line["kind"] == "target"), {})
    return {
        "code": code,
        "outcome": OUTCOMES[code],
        "counts": counts,
        "failed": sorted({line["property"] for line in own if line["kind"] == "failure"}),
        "reason": next(
            (line["reason"] for line in own if line["kind"] in ("crash", "usage")), None if codes else SILENT
        ),
    }


def refusal(verdict: dict | None) -> str | None:
    """Return None for what passed, otherwise why it is not ranked."""
    if verdict is None:
        return "not judged yet: the time box ran out"
    if verdict["code"] == session.PASS:
        return None
    return told(verdict)


def told(verdict: dict) -> str:
    """Say how a verification ended, and over what."""
    what = verdict["reason"] or ", ".join(verdict["failed"]) or "see what it printed"
    return f"python -m verify: {verdict['outcome']}: {what}"
