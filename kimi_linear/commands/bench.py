"""Time prefill and decoding of a model with random weights (tiny, where none is named), or of a checkpoint.

The paper's baselines at the same sizes are timed beside it in common rounds; medians are printed. With --filled nothing
is read: caches of such contexts are drawn, and a piece of a prompt and steps behind them are timed.
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
from kimi_linear.filled import filled
from kimi_linear.initial import random_model
from kimi_linear.model import KimiLinear
from kimi_linear.presets import BASELINES

SUMMARY = "time prefill and decoding over context lengths"
EPILOG = """\
examples   python -m kimi_linear bench --preset tiny --layers 8 --context 1024,16384 --baseline hybrid,mla
           python -m kimi_linear bench --model DIR --context 4096 --steps 64 --json results/decode.json
           python -m kimi_linear bench --preset tiny --layers 8 --context 1048576 --filled --piece 64
           python -m kimi_linear bench --preset tiny --layers 8 --context 1048576 --filled --cache-gib 2.2
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
    p.add_argument("--filled", action="store_true", help="draw caches of such contexts instead of reading tokens")
    piece = "with --filled: tokens of a prompt that is read behind the context (default none)"
    p.add_argument("--piece", type=int, default=0, metavar="N", help=piece)
    fits = "with --filled: as many sequences as have caches of so many GiB together (default one)"
    p.add_argument("--cache-gib", type=float, metavar="X", help=fits)
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
    _check_filled(args)
    rows, models = [], _models(args)
    with torch.no_grad():
        for T in contexts:
            found = {name: _Filled(model, T, args) if args.filled else _Samples() for name, model in models.items()}
            for _ in range(args.rounds + 1):  # the first one warms up
                for name, model in models.items():
                    found[name].add(model, T, args.steps)
            rows += [{"model": name, "context": T} | samples.medians() for name, samples in found.items()]
    _print(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_about(args) | {"rows": rows}, indent=1) + "\n")
    return DONE


def _check_filled(args: argparse.Namespace) -> None:
    gib = args.cache_gib
    if args.piece < 0 or (gib is not None and not 0 < gib < 1e6):
        raise UsageError(f"--piece and --cache-gib must be positive, got {args.piece} and {gib}")
    if not args.filled and (args.piece or gib):
        raise UsageError("--piece and --cache-gib go with --filled: contexts that are read have whole prefills")


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


class _Filled:
    """What was measured of one model behind a context that is drawn; the first round is not counted."""

    def __init__(self, model: KimiLinear, T: int, args: argparse.Namespace):
        room, self.piece = (args.rounds + 1) * (args.piece + args.steps), args.piece
        one = model.cache(1, T + room).bytes()
        self.batch = max(1, int(args.cache_gib * 2**30 / one)) if args.cache_gib else 1
        self.cache, self.pieces, self.step = filled(model, T, room, self.batch), [], []

    def add(self, model: KimiLinear, T: int, steps: int) -> None:
        """Measure once more, behind what was measured before."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (self.batch, self.piece + 1), generator=generator)
        if self.piece:
            self.pieces.append(_seconds(model, lambda: model.prefill(ids[:, 1:], self.cache)))
        self.step.append([_seconds(model, lambda: model.decode(ids[:, 0], self.cache)) for _ in range(steps)])

    def medians(self) -> dict[str, float]:
        """Return the medians of the rounds that count; bytes of one sequence."""
        found = {"step_ms": 1e3 * statistics.median(x for steps in self.step[1:] for x in steps), "batch": self.batch}
        found["cache_bytes"] = self.cache.bytes() // self.batch
        return found | ({"piece": self.piece, "piece_s": statistics.median(self.pieces[1:])} if self.piece else {})


def _seconds(model: KimiLinear, call: Callable) -> float:
    wait = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def _print(rows: list[dict]) -> None:
    table = Table("model", "context", "sequences", "prefill", "tokens/s", "step", "tokens/s", "cache of one")
    for row in rows:
        seconds, tokens = row.get("prefill_s", row.get("piece_s")), row.get("piece", row["context"])
        step, batch = row["step_ms"], row.get("batch", 1)
        table.add_row(
            row["model"],
            f"{row['context']:,}",
            str(batch),
            f"{seconds * 1e3:.1f} ms" + (f" for {tokens}" if "piece" in row else "") if seconds else "",
            f"{batch * tokens / seconds:,.0f}" if seconds else "",
            f"{step:.3f} ms",
            f"{1e3 * batch / step:,.0f}",
            size(row["cache_bytes"]),
        )
    console().print(table)


def _about(args: argparse.Namespace) -> dict:
    """Return where and with what was measured."""
    return {
        "schema": 2,
        "kind": "model prefill and decode",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": named(args.device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "arguments": {name: str(x) for name, x in vars(args).items() if name not in ("run", "json")},
    }
