"""The command line of models: `python -m verify kimi_linear`, with the options that mean something there."""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from rich.console import Console

from verify import display, records, selftest, session
from verify.choice import UsageError
from verify.models import mutants, replay
from verify.models.properties import PROPERTIES
from verify.models.recipes import from_json, words
from verify.models.targets import MUTANT, is_model
from verify.plan import PROFILES, Plan

UNHEARD = ("config", "contract", "head_dims", "inputs")
"""Options that speak of implementations of the op."""

MORE = 4
"""Recipes for one of an implementation's: a tiny model takes 0.3 s, all properties together, and has more forms."""

SHOWN = 4
"""Failures that are printed in full; every one is kept in a file."""

SUITE = selftest.Suite(MUTANT, mutants.CLEAN, mutants.MUTANTS, PROPERTIES, ("float32",))


def run(args: argparse.Namespace, console: Console) -> int:
    """Judge the model that the command line names; returns the exit code. Raises UsageError."""
    target = _target(args)
    if args.list or args.explain:
        return _explain(_names("property", args.explain) if args.explain else (), console)
    if args.self_test:
        return selftest.run(console, args.seed, args.json, SUITE)
    if args.replay:
        return _replay(target, args.replay, console)
    plan = Plan(
        target=target,
        device="cpu",
        profile=args.profile,
        dtypes=("float32",),
        seed=args.seed,
        examples=args.max_examples or MORE * PROFILES[args.profile].examples,
        properties=_names("property", args.property),
    )
    return _judge(plan, args.json, args.out, console)


def _target(args: argparse.Namespace) -> str:
    """Return the one model that is named, where nothing is asked that it could not hear."""
    if len(args.targets) > 1:
        model = next(name for name in args.targets if is_model(name))
        raise UsageError(f"{model} is judged alone, got {' '.join(args.targets)}")
    if given := [f"--{name.replace('_', '-')}" for name in UNHEARD if getattr(args, name) is not None]:
        raise UsageError(f"{', '.join(given)}: for implementations of the op, {args.targets[0]} is a model")
    if args.device not in (None, "cpu") or args.dtype not in (None, "float32"):
        raise UsageError(f"{args.targets[0]} is judged on cpu in float32, got {args.device or args.dtype}")
    if args.max_examples is not None and args.max_examples < 1:
        raise UsageError(f"--max-examples must be at least 1, got {args.max_examples}")
    return args.targets[0]


def _names(what: str, text: str | None) -> tuple[str, ...]:
    names, known = tuple(x for x in (text or "").split(",") if x), [p.name for p in PROPERTIES]
    if unknown := [x for x in names if x not in known]:
        raise UsageError(f"unknown {what} {', '.join(unknown)}; a model has {', '.join(known)}")
    return names


def _explain(names: tuple[str, ...], console: Console) -> int:
    """List the properties, or explain those that are named."""
    for prop in PROPERTIES:
        if not names:
            first = prop.explanation.splitlines()[0]
            console.print(f"  {prop.name:22} {prop.kind:10} {first}", markup=False, soft_wrap=True)
        elif prop.name in names:
            display.explain(prop, console)
    return session.PASS


def _judge(plan: Plan, path: Path | None, out: Path, console: Console) -> int:
    with (
        contextlib.nullcontext() if path is None else path.open("w") as stream,
        display.progress(console, {plan.target: plan.examples}) as show,
    ):
        if stream:
            about = {"device": plan.device, "profile": plan.profile, "seed": plan.seed}
            records.write(
                stream, "run", date=records.now(), versions=records.versions(), arguments=sys.argv[1:], **about
            )

        def listen(record: dict) -> None:
            if stream:
                stream.write(records.line(record))
                stream.flush()
            show(record)

        verdict = session.run([[plan]], listen)[plan.target]
        if stream:
            records.write(stream, "summary", code=verdict.code, targets={plan.target: verdict.code})
    _show(verdict, out, console)
    return verdict.code


def _show(verdict: session.Verdict, out: Path, console: Console) -> None:
    if verdict.cells:
        console.print(display.verdict_table([verdict], PROPERTIES))
    if verdict.broken:
        console.print(display.broken(verdict), soft_wrap=True)
    if verdict.seen:
        console.print(display.counts(verdict, "cpu"), soft_wrap=True)
    if verdict.done and verdict.done["not_asked"]:
        console.print(display.not_asked(verdict), soft_wrap=True)
    for axis, share in verdict.done["refused"].items() if verdict.done else ():
        console.print(f"  [yellow]UNSUPPORTED[/] {axis}, {share}", soft_wrap=True)
    for i, failure in enumerate(verdict.failures):
        path = replay.save(out, failure)
        again = f"python -m verify {failure['target']} --replay {shlex.quote(str(path))}"
        if i < SHOWN:
            console.print(display.failure(failure, again, words(from_json(failure["recipe"]))), soft_wrap=True)
    if rest := [failure["property"] for failure in verdict.failures[SHOWN:]]:
        console.print(f"  and {len(rest)} more in {out}: {', '.join(rest)}", soft_wrap=True)


def _replay(target: str, path: Path, console: Console) -> int:
    try:
        failure = replay.load(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if failure["target"] != target:
        raise UsageError(f"the file names {failure['target']}, got {target}")
    name, recipe = failure["property"], failure["recipe"]
    plan = Plan(target, "cpu", "quick", ("float32",), 0, 1, properties=(name,), recipe=recipe)
    verdict = session.run([[plan]], lambda record: None)[target]
    if verdict.broken:
        console.print(display.broken(verdict), soft_wrap=True)
    for found in verdict.failures:
        console.print(display.failure(found, None, words(from_json(recipe))), soft_wrap=True)
    said = {session.PASS: "pass: {} holds on this case now", session.NOTHING: "{} has nothing to compare on this case"}
    if verdict.code in said:
        console.print(f"{target}: {said[verdict.code].format(name)}", soft_wrap=True)
    return verdict.code
