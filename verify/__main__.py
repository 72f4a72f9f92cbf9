"""Judge implementations of Kimi Delta Attention against the float64 definition."""

import argparse
import importlib
import sys
import traceback

from rich.console import Console

from impls.table import IMPLEMENTATIONS
from verify import adapters, display, judging, replay, session
from verify.arguments import alone, check_files, names, options, parser
from verify.choice import UsageError, adapter_target, own
from verify.models.targets import is_model
from verify.peers import PEERS
from verify.plan import Plan
from verify.properties import PROPERTIES
from verify.records import INFINITE

UNWATCHED = 140
"""Columns where nobody watches: a table with names cut off cannot be read in a log."""

COMMANDS = {
    "merge": "verify.merging:merge",
    "diff": "verify.merging:diff",
    "calibrate": "verify.calibrate:main",
    "peers": "verify.peers_report:main",
}
"""Words that are no targets, and what they run: a function of the arguments behind them, and a console."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    console = console if console.is_terminal else Console(width=UNWATCHED)
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            module, _, function = COMMANDS[argv[0]].partition(":")
            return getattr(importlib.import_module(module), function)(argv[1:], console)
        return _command(parser().parse_args(argv), console)
    except UsageError as error:
        print(f"python -m verify: {error}", file=sys.stderr)
        return session.USAGE
    except KeyboardInterrupt:
        print("interrupted: records written so far are kept", file=sys.stderr)
        return session.INTERRUPTED
    except Exception:
        traceback.print_exc()
        return session.CRASH


def _command(args: argparse.Namespace, console: Console) -> int:
    if any(is_model(name) for name in args.targets):
        return _model(args, console)
    if args.list:
        return _list(console)
    if args.explain:
        return _explain(args.explain, console)
    if args.replay:
        alone(args, "replay", "targets", "adapter", "timeout")
        return _replay(args, console)
    if args.self_test:
        alone(args, "self_test", "seed", "json")
        check_files(args)
        from verify import selftest

        return selftest.run(console, args.seed, args.json)
    return judging.judge(options(args), console)


def _model(args: argparse.Namespace, console: Console) -> int:
    try:
        from verify.models import command
    except ModuleNotFoundError as error:
        raise UsageError(f"a model needs {error.name.split('.')[0]}: install kda-forge[model]") from error
    check_files(args)
    return command.run(args, console)


def _list(console: Console) -> int:
    console.print("[bold]implementations")
    for impl in IMPLEMENTATIONS:
        text = f"  {impl.name:18} {', '.join(impl.devices):10} {', '.join(impl.dtypes)}  {impl.summary}"
        console.print(text, soft_wrap=True)
    console.print("[bold]other people's, where their packages are installed")
    for name, peer in PEERS.items():
        there = "" if peer.installed else f" (needs {peer.distribution})"
        console.print(f"  {name:38} {', '.join(peer.devices):15} {peer.summary}{there}", markup=False, soft_wrap=True)
    for name, point in adapters.registered().items():
        console.print(f"  {name:38} {point.value}, registered", markup=False, soft_wrap=True)
    console.print("[bold]properties")
    for prop in PROPERTIES:
        console.print(
            f"  {prop.name:22} {prop.kind:10} {prop.explanation.splitlines()[0]}", markup=False, soft_wrap=True
        )
    return session.PASS


def _explain(name: str, console: Console) -> int:
    asked = names(name, tuple(p.name for p in PROPERTIES), "property")
    for prop in (p for p in PROPERTIES if p.name in asked):
        display.explain(prop, console)
    return session.PASS


def _replay(args: argparse.Namespace, console: Console) -> int:
    try:
        failure = replay.load(args.replay)
    except ValueError as error:
        raise UsageError(str(error)) from error
    target = failure["target"]
    named = [*args.targets, *([adapter_target(args.adapter)] if args.adapter else [])]
    if named != [target] and (named or not own(target)):
        raise UsageError(
            f"the file names {target}: code is imported only when you name it yourself: "
            f"python -m verify {target} --replay {args.replay}"
        )
    plan = Plan(
        target=target,
        device=failure["device"],
        profile="quick",
        dtypes=(failure["recipe"]["dtype"],),
        seed=0,
        examples=1,
        properties=(failure["property"].removesuffix(INFINITE),),
        config=failure["config"],
        contract=failure["contract"],
        adapter=args.adapter and args.adapter.rpartition(":")[0],
        recipe=failure["recipe"],
    )
    return _seen_again(plan, failure, args.timeout, console)


def _seen_again(plan: Plan, failure: dict, timeout: float, console: Console) -> int:
    verdict = session.run([[plan]], lambda record: None, silence=timeout)[plan.target]
    if verdict.broken:
        console.print(display.broken(verdict), soft_wrap=True)
    for found in verdict.failures:
        console.print(display.failure(found, None), soft_wrap=True)
    if verdict.code == session.NOTHING:
        console.print(f"{failure['property']} has nothing to compare on this case now", soft_wrap=True)
    if verdict.code == session.PASS:
        console.print(f"pass: {plan.target} :: {failure['property']} holds on this case now", soft_wrap=True)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
