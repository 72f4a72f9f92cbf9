"""Time prefill and decoding of a model with random weights (tiny, where none is named), or of a checkpoint.

The paper's baselines at the same sizes are timed beside it in common rounds; medians are printed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.table import Table

from impls.devices import named
from kimi_linear.commands.arguments import (
    DONE,
    UsageError,
    add_device,
    add_dtype,
    add_preset,
    bar,
    check_device,
    console,
    dtype_of,
    numbers,
    preset_of,
    refuse_preset,
    size,
)
from kimi_linear.initial import random_model
from kimi_linear.model import KimiLinear
from kimi_linear.presets import BASELINES

SUMMARY = "time prefill and decoding over context lengths"
EPILOG = """\
examples   python -m kimi_linear bench --preset tiny --layers 8 --context 1024,16384 --baseline hybrid,mla
           python -m kimi_linear bench --model DIR --context 4096 --steps 64 --json results/decode.json
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, instead of a preset")
    add_preset(p)
    p.add_argument("--baseline", metavar="NAME,...", help=f"of {', '.join(BASELINES)}; default hybrid,mla")
    p.add_argument("--context", default="1024,4096", metavar="N,...", help="tokens (default 1024,4096)")
    p.add_argument("--steps", type=int, default=16, metavar="N", help="decoding steps of a round (default 16)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    add_device(p)
    add_dtype(p, "default float32 on a CPU, bfloat16 elsewhere")
    p.add_argument("--compile", action="store_true", help="compile the decoding step")
    p.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    refuse_preset(args)
    check_device(args.device)
    contexts = numbers("--context", args.context)
    if min(*contexts, args.steps, args.rounds) < 1:
        raise UsageError("--context, --steps and --rounds must be at least 1")
    models = _models(args)
    found = {(name, T): _Samples() for T in contexts for name in models}
    with torch.no_grad():
        for T in contexts:
            for _ in range(args.rounds + 1):  # the first one warms up
                for name, model in models.items():
                    found[name, T].add(model, T, args.steps)
    rows = [{"model": name, "context": T} | samples.medians() for (name, T), samples in found.items()]
    _print(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_about(args) | {"rows": rows}, indent=1) + "\n")
    return DONE


def _models(args: argparse.Namespace) -> dict[str, KimiLinear]:
    dtype = dtype_of(args.dtype) or (torch.float32 if args.device == "cpu" else torch.bfloat16)
    if args.model:
        with bar("reading weights") as progress:
            found = KimiLinear.from_pretrained(args.model, dtype=dtype, device=args.device, progress=progress)
        models = {args.model.name: found}
    else:
        args.preset = args.preset or "tiny"
        names = (args.baseline or "hybrid,mla").split(",")
        if unknown := [name for name in names if name not in BASELINES]:
            raise UsageError(f"--baseline: unknown {', '.join(unknown)}; known are {', '.join(BASELINES)}")
        models = {name: random_model(preset_of(args, name), dtype=dtype, device=args.device) for name in names}
    return {name: model.compile_decode() for name, model in models.items()} if args.compile else models


class _Samples:
    """What was measured of one model at one context length; the first round is not counted."""

    def __init__(self):
        self.prefill, self.step, self.bytes = [], [], 0

    def add(self, model: KimiLinear, T: int, steps: int) -> None:
        """Measure once more."""
        ids = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
        cache = model.cache(1, T + steps + 1)
        self.prefill.append(_seconds(model, lambda: model.prefill(ids, cache)))
        model.decode(ids[:, 0], cache)
        self.step += [_seconds(model, lambda: model.decode(ids[:, 0], cache)) for _ in range(steps)]
        self.bytes = cache.bytes()

    def medians(self) -> dict[str, float]:
        """Return the medians of the rounds that count."""
        rounds = len(self.prefill)
        return {
            "prefill_s": statistics.median(self.prefill[1:]),
            "step_ms": 1e3 * statistics.median(self.step[len(self.step) // rounds :]),
            "cache_bytes": self.bytes,
        }


def _seconds(model: KimiLinear, call: Callable) -> float:
    wait = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def _print(rows: list[dict]) -> None:
    table = Table("model", "context", "prefill", "tokens/s", "step", "tokens/s", "cache")
    for row in rows:
        prefill, step = row["prefill_s"], row["step_ms"]
        table.add_row(
            row["model"],
            f"{row['context']:,}",
            f"{prefill * 1e3:.1f} ms",
            f"{row['context'] / prefill:,.0f}",
            f"{step:.3f} ms",
            f"{1e3 / step:,.0f}",
            size(row["cache_bytes"]),
        )
    console().print(table)


def _about(args: argparse.Namespace) -> dict:
    """Return where and with what was measured."""
    return {
        "schema": 1,
        "kind": "model prefill and decode",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": named(args.device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "arguments": {name: str(x) for name, x in vars(args).items() if name not in ("run", "json")},
    }
