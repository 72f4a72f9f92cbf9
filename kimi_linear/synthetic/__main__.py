"""Train a toy of two layers on a synthetic task of the paper (section 5.1), with our own ops forward and backward."""

import argparse
import sys
from pathlib import Path

import optuna
from rich.table import Table

from kimi_linear.commands.arguments import BROKEN, DONE, INTERRUPTED, USAGE, UsageError, check_device, console
from kimi_linear.commands.arguments import numbers as whole_numbers
from kimi_linear.commands.ending import ended
from kimi_linear.synthetic import arguments, capture
from kimi_linear.synthetic.mixers import MIXERS, MixerError
from kimi_linear.synthetic.rates import Finished, best
from kimi_linear.synthetic.runs import RunError
from kimi_linear.synthetic.saved import SavedError
from kimi_linear.synthetic.suite import Suite, estimate, seconds_of_a_step, write
from kimi_linear.synthetic.tasks import TASKS, TaskError
from kimi_linear.synthetic.watching import Stopwatch, shown, told

UNFINISHED = 7
CODES = dict.fromkeys((UsageError, TaskError, MixerError, RunError), USAGE) | {SavedError: BROKEN}
EPILOG = """\
commands   python -m kimi_linear.synthetic [train] --task ...    one task, one mixer, one seed (this help)
           python -m kimi_linear.synthetic suite ...             tasks x mixers x seeds into one file of results
           python -m kimi_linear.synthetic capture ...           q, k, v, g, beta of a trained layer, for python -m verify
           Each has its own --help.

tasks      palindrome    letters, <sep>, the same letters backwards: at each of those the next one is asked for
           mqar          pairs of key and value, <sep>, keys: at each of those its value is asked for
           stack         pushes to and pops from 64 stacks: at the number of a popped stack its top is asked for
mixers     kda           Kimi Delta Attention: a decay per channel, delta rule
           gdn           Gated DeltaNet: a decay per head, delta rule
           deltanet      no decay, delta rule
           mamba2        a decay per head, no delta rule
           dplr          general DPLR: a decay per channel, an erase key of its own
           softmax       full attention without positions
settings   small         minutes on a CPU
           paper         2 layers, 2 heads of 128 channels, 20,000 steps; --length 256 to 2048: for a GPU

Every window of steps a run writes a line of its curve and a checkpoint, in a folder of its own below --out. Who is
killed goes on from the last window, who stops by Ctrl-C or runs out of --minutes from the last step, with the same
command: on a CPU with the same bits. A folder of another device, torch or number of threads is refused.

exit code  0 done; 1 a file that cannot be used; 2 usage; 6 crash; 7 --minutes were over; 130 interrupted

examples   python -m kimi_linear.synthetic --task mqar --mixer kda
           python -m kimi_linear.synthetic --task palindrome --mixer kda --rate 1e-3 --no-conv --seed 1
           python -m kimi_linear.synthetic --task mqar --mixer gdn --setting paper --length 256 --device cuda --minutes 60
"""  # noqa: E501 - one example in one line
SUITE_EPILOG = """\
The learning rate is chosen with the first seed, for every task and mixer; the other seeds train at that one.

examples   python -m kimi_linear.synthetic suite --json results/synthetic-small-NAME.json
           python -m kimi_linear.synthetic suite --tasks stack --mixers kda,gdn --seeds 0 --setting paper --device cuda
"""


def parser() -> argparse.ArgumentParser:
    """Build the command line of one run."""
    p = _parser("", __doc__, EPILOG)
    arguments.add_task(p)
    arguments.add_run(p)
    arguments.add_place(p)
    p.set_defaults(run=_train)
    return p


def suite_parser() -> argparse.ArgumentParser:
    """Build the command line of a suite."""
    p = _parser(" suite", "Train tasks x mixers x seeds, and write all that came of it.", SUITE_EPILOG)
    p.add_argument("--tasks", default="palindrome,mqar", metavar="NAME,...", help=f"of {', '.join(TASKS)}")
    p.add_argument("--mixers", default="kda,gdn,mamba2", metavar="NAME,...", help=f"of {', '.join(MIXERS)}")
    p.add_argument("--seeds", default="0,1,2", metavar="N,...", help="default 0,1,2")
    arguments.add_run(p)
    arguments.add_place(p)
    p.set_defaults(run=_suite)
    return p


def capture_parser() -> argparse.ArgumentParser:
    """Build the command line of a capture."""
    p = _parser(" capture", capture.__doc__, capture.EPILOG)
    capture.configure(p)
    p.set_defaults(run=capture.run)
    return p


def _parser(command: str, text: str, epilog: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    prog = f"python -m kimi_linear.synthetic{command}"
    return argparse.ArgumentParser(prog=prog, description=text, epilog=epilog, formatter_class=form)


def _train(args: argparse.Namespace) -> int:
    run = arguments.run_of(args, args.task, args.mixer, args.seed)
    return _work(args, Suite((run,), (args.seed,), arguments.rates_of(args)))


def _suite(args: argparse.Namespace) -> int:
    tasks = arguments.names_of("--tasks", args.tasks, tuple(TASKS))
    mixers = arguments.names_of("--mixers", args.mixers, tuple(MIXERS))
    seeds = tuple(whole_numbers("--seeds", args.seeds))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must name each once, got {args.seeds}")
    runs = tuple(arguments.run_of(args, task, mixer, seeds[0]) for task in tasks for mixer in mixers)
    return _work(args, Suite(runs, seeds, arguments.rates_of(args)), estimated=True)


def _work(args: argparse.Namespace, suite: Suite, estimated: bool = False) -> int:
    """Do a suite, or as much of it as there is time for."""
    check_device(args.device)
    watch, found = Stopwatch(arguments.minutes_of(args)), []
    _check_file(args.json)
    say = console(stderr=True)
    if estimated and (left := suite.pending(args.out)):
        most = estimate(suite, left, lambda run: seconds_of_a_step(run, args.device))
        say.print(f"at most {most / 60:,.0f} minutes, less what is done; solved and pruned runs end earlier")
    with watch.watching(), shown(say) as show:
        for more in suite.work(args.out, args.device, show, watch.go_on):
            found += more
            if args.json:
                write(args.json, found, args.device)
    _print(found, args.out)
    wanted = len(suite.runs) * (len(suite.rates) + len(suite.seeds) - 1)
    if len(found) == wanted:
        return DONE
    say.print(f"{len(found)} of {wanted} runs are finished; the same command goes on with the rest")
    return UNFINISHED if watch.signal is None else INTERRUPTED


def _check_file(path: Path | None) -> None:
    """Refuse a file that could not be written, before hours of training depend on it."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from error
    if path.stat().st_size == 0:
        path.unlink()


def _print(found: list[Finished], out: Path) -> None:
    if not found:
        return
    table = Table("run", "", "steps", "loss", "accuracy", "whole sequences")
    for each in found:
        last, outcome = each.curve[-1] if each.curve else None, each.outcome
        figures = ["" if x is None else f"{x:.1%}" for x in (outcome.accuracy, outcome.exact)]
        steps = (f"{last.step:,}", f"{last.loss:.3f}") if last else ("", "")
        table.add_row(told(each.run), outcome.state, *steps, *figures)
    console().print(table)
    console().print(f"best: {out / best(found).run.folder}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parsers = {"train": parser, "suite": suite_parser, "capture": capture_parser}
    name = argv.pop(0) if argv and argv[0] in parsers else "train"
    args = parsers[name]().parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study in memory
    kept = "interrupted: the last window is kept"
    return ended("python -m kimi_linear.synthetic", lambda: args.run(args), CODES, kept)


if __name__ == "__main__":
    sys.exit(main())
