"""What a run shows while it trains, and how it is stopped: a bar or lines, Ctrl-C after the step, a time box."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_linear.synthetic.runs import Run
from kimi_linear.synthetic.saved import Point

QUIET = 30.0
"""Seconds between lines where nobody watches."""


def told(run: Run) -> str:
    """Name a run in a line."""
    return f"{run.task} {run.label} length {run.length} seed {run.seed} rate {run.rate:g}"


class Stopwatch:
    """Says when to stop: at a signal, or when the time box is over; both let the step end and be kept."""

    def __init__(self, minutes: float | None = None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal: int | None = None

    def go_on(self) -> bool:
        """Tell whether there is another step to be made."""
        return self.signal is None and (self.deadline is None or time.monotonic() < self.deadline)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM for a wish to stop; a second one stops at once."""
        names = (signal.SIGINT, signal.SIGTERM)
        before = {name: signal.getsignal(name) for name in names}

        def stop(number: int, frame) -> None:
            self.signal = number
            signal.signal(number, before[number])

        for name in names:
            signal.signal(name, stop)
        try:
            yield
        finally:
            for name in names:
                signal.signal(name, before[name])


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Run, Point], None]]:
    """Yield a function of a run and a point of its curve: a bar in a terminal, elsewhere a line every QUIET seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: dict[Run, int] = {}
        last = time.monotonic()

        def show(run: Run, point: Point) -> None:
            nonlocal last
            words = f"{told(run)}  loss {point.loss:.3f}  accuracy {point.accuracy:.1%}"
            if run not in bars:
                for bar in bars.values():
                    progress.update(bar, visible=False)
                bars[run] = progress.add_task(words, total=run.steps)
            progress.update(bars[run], completed=point.step, description=words)
            if not console.is_terminal and time.monotonic() - last > QUIET:
                last = time.monotonic()
                console.print(f"{words}  step {point.step:,} of {run.steps:,}")

        yield show
