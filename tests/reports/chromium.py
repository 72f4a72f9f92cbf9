"""Opens pages in a real browser, Debian's chromium without a screen, over its debugging pipe."""

import base64
import contextlib
import itertools
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PATIENCE = 60.0
"""Seconds that an answer may take on a busy machine."""

START = 120.0
"""Seconds until the first answer: an idle machine took 20 to read a browser just installed, a busy one more than 60."""

STARTS = 3
"""How often a browser is started that says nothing."""

# Nothing of the browser's own looks for a network: what a page asks for is counted, and some machines have none.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    "--remote-debugging-pipe",
]


def executable() -> str | None:
    """Return the browser of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of one browser; a context manager. `events` holds what the browser reported, in its order."""

    def __init__(self):
        self.events: list[dict] = []

    def __enter__(self) -> "Browser":
        for left in reversed(range(STARTS)):
            self._start()
            try:
                self._attach()
                return self
            except BaseException as error:
                self.__exit__()
                if not left or not isinstance(error, (AssertionError, BrokenPipeError)):
                    raise

    def _start(self) -> None:
        self._numbers, self._unread, self._session = itertools.count(1), b"", None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._said = Path(self._profile.name, "stderr")
        commands, self._in = os.pipe()
        self._out, answers = os.pipe()
        command = shlex.join([executable(), *FLAGS, f"--user-data-dir={self._profile.name}"])
        line = f"exec {command} 3<&{commands} 4>&{answers} 2>{shlex.quote(str(self._said))}"
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(commands, answers), stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(commands)
        os.close(answers)

    def _attach(self) -> None:
        page = self.ask("Target.createTarget", url="about:blank", patience=START)["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __exit__(self, *error) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def ask(self, method: str, *, patience: float = PATIENCE, **params) -> dict:
        """Send a command and return its answer, which may take so many seconds."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda x: x.get("id") == number, patience)
        assert "result" in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of so many pixels and a theme, and wait until all of it is there."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Page.navigate", url=page.resolve().as_uri())
        if not self.named("Page.loadEventFired"):
            self._until(lambda x: x.get("method") == "Page.loadEventFired")

    def value(self, expression: str):
        """Return what an expression of JavaScript gives."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def named(self, method: str) -> list[dict]:
        """Return the events of a name, what they carry."""
        return [x["params"] for x in self.events if x.get("method") == method]

    def _until(self, wanted, patience: float = PATIENCE) -> dict:
        end = time.monotonic() + patience
        while True:
            while b"\0" in self._unread:
                text, self._unread = self._unread.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._out, 1 << 20) if ready else b""
            assert chunk, (
                f"chromium gave no answer in {patience:.0f} s, or ended ({self._process.poll()}); it said "
                f"{self._said.read_text(errors='replace')[-2000:]!r}"
            )
            self._unread += chunk
