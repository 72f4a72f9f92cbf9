"""Where the time of a worker goes: calls of the target, the definition with its simulators, and all."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by name; of nested names only the innermost counts."""

    def __init__(self):
        self.spent: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count what happens in here under a name."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.spent[self._running[-1]] += now - self._since
        self._since = now


WATCH = Stopwatch()
"""That of this process: a worker has one thread, and judges one target after the other."""
