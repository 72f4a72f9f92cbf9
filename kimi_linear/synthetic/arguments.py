"""The command lines of `python -m kimi_linear.synthetic`: what they take, and the runs that they mean."""

import argparse
from dataclasses import replace
from pathlib import Path

from kimi_linear.commands.arguments import UsageError, add_device
from kimi_linear.synthetic.mixers import MIXERS, OUTPUT_GATES
from kimi_linear.synthetic.runs import DTYPES, RATES, SETTINGS, Run
from kimi_linear.synthetic.tasks import TASKS

FOLDER = Path("synthetic-runs")
SIZES = {
    "length": "tokens of a sequence",
    "heads": "heads of a mixer",
    "head_dim": "channels of a head",
    "hidden": "channels of the residual stream",
    "layers": "blocks of a mixer and an MLP",
    "batch": "sequences of a step",
    "steps": "at most so many",
    "warmup": "steps in which the rate rises from 0",
    "window": "steps of a point of the curve, and between checkpoints",
}


def add_run(p: argparse.ArgumentParser) -> None:
    """Add what a run is made of beside task, mixer and seed: a setting, and what is to be other in it."""
    p.add_argument("--setting", choices=SETTINGS, default="small", help="all sizes (default small; see below)")
    sizes = p.add_argument_group("sizes, instead of the setting's")
    for name, text in SIZES.items():
        values = ", ".join(f"{_either(runs, name)} in {setting}" for setting, runs in SETTINGS.items())
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{text} ({values})")
    sizes.add_argument(
        "--stop", type=float, metavar="X", help="accuracy of a window that ends a run (0.99 in small, 0.999 in paper)"
    )
    text = "palindrome's letters, stack's elements (the length); mqar's keys, and as many values (twice the length)"
    sizes.add_argument("--alphabet", type=int, metavar="N", help=text)
    ablations = p.add_argument_group("ablations of the paper's Table 1")
    ablations.add_argument("--no-conv", action="store_true", help="no short convolution")
    ablations.add_argument("--output-gate", choices=OUTPUT_GATES, help="instead of the sigmoid's")
    p.add_argument("--dtype", choices=DTYPES, help="of products; float32 in small, bfloat16 in paper")
    rates = ",".join(f"{rate:g}" for rate in RATES)
    p.add_argument("--rate", default=rates, metavar="X,...", help=f"learning rates; of several the best ({rates})")


def _either(runs: dict[str, Run], name: str) -> str:
    """Say a size of a setting: of all tasks, or one after the other."""
    return " or ".join(f"{value:,}" for value in sorted({getattr(run, name) for run in runs.values()}))


def add_place(p: argparse.ArgumentParser) -> None:
    """Add where a run happens, for how long, and what is written."""
    add_device(p)
    p.add_argument("--minutes", type=float, metavar="N", help="stop after so many; the same command goes on")
    text = f"folder of all runs, each below it in a folder of its own (default {FOLDER})"
    p.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=text)
    p.add_argument("--json", type=Path, metavar="FILE", help="write what came of it there too")


def run_of(args: argparse.Namespace, task: str, mixer: str, seed: int) -> Run:
    """Return the run that the arguments of `add_run` mean."""
    names = (*SIZES, "alphabet", "stop", "dtype", "output_gate")
    other = {name: value for name in names if (value := getattr(args, name)) is not None}
    conv = {"conv": 0} if args.no_conv else {}
    run = SETTINGS[args.setting][task]
    letters = TASKS[task].letters * other.get("length", run.length)
    return replace(run, **{"task": task, "mixer": mixer, "seed": seed, "alphabet": letters} | other | conv)


def rates_of(args: argparse.Namespace) -> tuple[float, ...]:
    """Return the learning rates; UsageError where they are none."""
    try:
        rates = tuple(float(part) for part in args.rate.split(","))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise UsageError(f"--rate must be positive numbers with commas between them, each once, got {args.rate!r}")
    return rates


def minutes_of(args: argparse.Namespace) -> float | None:
    """Return the time box; UsageError for one of nothing."""
    if args.minutes is not None and not args.minutes > 0:
        raise UsageError(f"--minutes must be positive, got {args.minutes:g}")
    return args.minutes


def names_of(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a list with commas; UsageError for one that is not known."""
    names = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{flag}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UsageError(f"{flag} must name each once, got {text}")
    return names


def add_task(p: argparse.ArgumentParser) -> None:
    """Add what one run is: task, mixer, seed."""
    p.add_argument("--task", choices=TASKS, required=True, help="what is to be learnt")
    p.add_argument("--mixer", choices=MIXERS, default="kda", help="what learns it (default kda)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data (default 0)")
