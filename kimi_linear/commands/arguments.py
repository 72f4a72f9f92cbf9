"""What several commands take and print: models, dtypes, presets, a bar while bytes are read."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_linear.config import DTYPES, ConfigError, KimiConfig
from kimi_linear.presets import BASELINES, PRESETS, preset

DONE, BROKEN, USAGE, CRASH, INTERRUPTED = 0, 1, 2, 6, 130
UNWATCHED = 120
"""Columns where nobody watches."""


class UsageError(ValueError):
    """A command line that asks for nothing that there is."""


def launched() -> bool:
    """Tell whether torchrun has started this process, without loading torch.distributed to ask."""
    return "RANK" in os.environ


def console(stderr: bool = False) -> Console:
    """Return a console, without colours and of a fixed width where nobody watches."""
    watched = Console(stderr=stderr).is_terminal
    unwatched = {} if watched else {"width": UNWATCHED, "color_system": None}
    return Console(stderr=stderr, markup=False, highlight=False, **unwatched)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of bytes done and bytes in all that draws a bar, where somebody watches."""
    own = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=own, transient=True, disable=not own.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def add_device(p: argparse.ArgumentParser, text: str = "") -> None:
    """Add --device."""
    p.add_argument("--device", default="cpu", help=f"{text}cpu or cuda:N (default cpu)")


def check_device(name: str) -> None:
    """Raise UsageError for a device that this machine does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


def add_dtype(p: argparse.ArgumentParser, default: str) -> None:
    """Add --dtype."""
    p.add_argument("--dtype", choices=DTYPES, help=f"{default}; A_log, dt_bias and the states stay float32")


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return torch's dtype of a name."""
    return None if name is None else getattr(torch, name)


def add_preset(p: argparse.ArgumentParser, required: bool = False) -> None:
    """Add what names a configuration: --preset, --layers, --ratio."""
    p.add_argument("--preset", choices=PRESETS, required=required, help="sizes of a model")
    p.add_argument("--layers", type=int, metavar="N", help="so many layers instead of the preset's")
    p.add_argument("--ratio", metavar="KDA:MLA", help="layers of each kind, in turn (default 3:1)")


def add_baseline(p: argparse.ArgumentParser) -> None:
    """Add --baseline."""
    text = "mla: MLA layers only; gdn-hybrid: one decay per head, as Gated DeltaNet has (default hybrid)"
    p.add_argument("--baseline", choices=BASELINES, help=text)


def preset_of(args: argparse.Namespace, baseline: str | None = None) -> KimiConfig:
    """Return the configuration that the arguments of `add_preset` name; UsageError for a ratio that is none."""
    parts = (args.ratio or "3:1").split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--ratio must be two numbers as in 3:1, got {args.ratio!r}")
    baseline = baseline or args.baseline or "hybrid"
    try:
        return preset(args.preset, baseline=baseline, layers=args.layers, ratio=tuple(map(int, parts)))
    except ConfigError as error:
        raise UsageError(str(error)) from error


def refuse_preset(args: argparse.Namespace) -> None:
    """Raise UsageError where --model is named and a preset is, too, which would be left unheard."""
    given = [f"--{name}" for name in ("preset", "layers", "ratio", "baseline") if getattr(args, name) is not None]
    if args.model and given:
        raise UsageError(f"--model says what the model is: expected it without {', '.join(given)}")


def numbers(flag: str, text: str) -> list[int]:
    """Return the numbers of a list with commas; UsageError where it is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{flag} must be numbers with commas between them, got {text!r}")
    return list(map(int, parts))


def size(count: float, unit: str = "B") -> str:
    """Return a count with three digits and a prefix: 98.2 GB."""
    for prefix in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"
