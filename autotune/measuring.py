"""Measure in a process that may die: one for a device, started anew behind whatever took it down.

An illegal access leaves a CUDA context in which nothing runs any more, and a kernel may hang. The device is asked
behind every trial, so that no trial is blamed for what the one before has done. Compilers work while nothing is timed.
"""

import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

from autotune import clock
from autotune.clock import Bench, Clock
from autotune.outcomes import BoxOver
from autotune.search import FAILED, Outcome
from autotune.timing import Box, Stopwatch

PATIENCE = 60.0
"""Seconds that one trial may take, compilation included."""
STARTING = 120.0
"""Seconds that a new process has to import torch, draw the inputs, and compile and run the default."""


class Guarded:
    """Does what `clock.Clock` does, in a process of its own; a context manager, behind which no process is left."""

    def __init__(self, bench: Bench, default: object, box: Box):
        self.bench, self.default, self.box, self.seconds = bench, default, box, PATIENCE
        self.process, self.pipe = None, None

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def outcome(self, config) -> Outcome:
        """Compile, compare and time one configuration; BoxOver where the box ends before three rounds.

        One that ends the process, or outlasts its time, has failed. RuntimeError where the default itself does not run.
        """
        if self.process is None:
            self._start()
        begun = time.monotonic()
        self.pipe.send((config, self.box.left))
        answer = self._answer(self.seconds)
        if isinstance(answer, str):
            return Outcome(FAILED, time.monotonic() - begun, message=answer)
        if answer is None:
            raise BoxOver
        return answer

    def raced(self, configs: list) -> list[clock.Standing]:
        """Do what `clock.raced` does; the device is this race's alone."""
        self._end()
        return clock.raced(self.bench, configs, self.default)

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, self.bench, self.default), daemon=True)
        self.process.start()
        there.close()
        if (trouble := self._answer(STARTING)) is not None:
            self._end()
            raise RuntimeError(f"the default configuration does not run: {trouble}")

    def _answer(self, seconds: float) -> Outcome | str | None:
        """Return what the process says; text where it ended or was killed for its silence."""
        if not self.pipe.poll(seconds):
            self._end()
            return f"it took more than {seconds:g} s and was killed"
        try:
            answer, goes_on = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode
            self._end()
            return f"it ended its process with status {status}"
        if not goes_on:
            self._end()
        return answer

    def _end(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(pipe: Connection, bench: Bench, default: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        timer = Clock(bench, default, Box(0))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}"[:500], False))
        return
    pipe.send((None, True))
    while True:
        try:
            config, seconds = pipe.recv()
        except EOFError:
            return
        answer, goes_on = measured(timer, config, seconds)
        pipe.send((answer, goes_on))
        if not goes_on:
            return


def measured(timer: Clock, config: object, seconds: float) -> tuple[Outcome | str | None, bool]:
    """Return what became of a configuration, None where so many seconds were too few, and whether the device answers.

    Text where it does not.
    """
    timer.box = Box(seconds)
    return _survived(timer.watch, _outcome(timer, config))


def _outcome(timer: Clock, config) -> Outcome | None:
    """Return what became of a configuration, None where the box ended first."""
    try:
        return timer.outcome(config)
    except BoxOver:
        return None


def _survived(watch: Stopwatch, outcome: Outcome | None) -> tuple[Outcome | str | None, bool]:
    """Return an outcome, and whether the device still answers; where it does not the outcome is that."""
    try:
        watch.settle()
    except Exception as error:
        said = outcome.message if outcome and outcome.message else f"{type(error).__name__}: {error}"
        return f"the device was lost: {said}"[:500], False
    return outcome, True
