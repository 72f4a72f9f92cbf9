"""What the command does when it judges: plans and their parts, the records as they come, what is shown and written."""

import contextlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from verify import display, distributed, junit, page, parts, records, remembered, replay, session, sources
from verify.arguments import Options
from verify.choice import own
from verify.peers import PEERS
from verify.plan import PROFILES, Plan

SHOWN = 5
"""Failures of one target that are printed in full; every one is kept in a file."""


def judge(options: Options, console: Console) -> int:
    """Judge what was asked for; returns the exit code."""
    plans = [_plan(options, name, device) for name, device in options.choice.devices.items()]
    about = _identity(options, plans)
    before = parts.finished(options.json, about) if options.resume else []
    database = remembered.opened(options.database) if options.database else None
    if database:
        plans = [replace(plan, first=remembered.recalled(database, plan.target)) for plan in plans]
    expected = {plan.target: sum(len(plan.numbers(d)) for d in plan.dtypes) for plan in plans}
    with _stream(options.json) as stream, display.progress(console, expected) as show:
        if stream:
            _begin(stream, options, about, before)

        def listen(record: dict) -> None:
            if stream:
                stream.write(records.line(record))
                stream.flush()
            show(record)

        cases = [x for x in before if x["kind"] == "case"]
        for case in cases:
            show(case)
        judged = _run(options, plans, cases, listen)
    for case in cases:
        judged[case["target"]].add(case)
    verdicts = [judged[plan.target] for plan in plans]
    if database:
        _remember(database, verdicts, plans)
    return conclude(options, verdicts, console)


def _run(options: Options, plans: list[Plan], cases: list[dict], listen: session.Listener) -> dict:
    workers = options.workers or session.SIDE_BY_SIDE
    remote, many = options.scheduler, 1 if options.workers is None else options.workers
    batches = parts.parts(plans, distributed.slots(remote, workers) if remote else many)
    batches = [[_continued(plan, cases) for plan in batch] for batch in batches]
    if remote:
        return distributed.run_on(remote, batches, listen, workers, options.timeout)
    return session.run(batches, listen, workers=workers, silence=options.timeout)


def _continued(plan: Plan, cases: list[dict]) -> Plan:
    own_cases = [case for case in cases if parts.of_part(case, plan)]
    return replace(plan, earlier=parts.earlier(own_cases, plan.target))


def _identity(options: Options, plans: list[Plan]) -> dict:
    """Say what a run is: what must be the same for another one to go on, or to be joined with."""
    plan = plans[0] if plans else None
    return {
        "targets": dict(options.choice.devices),
        "profile": options.profile,
        "seed": options.seed,
        "examples": plan.examples if plan else 0,
        "properties": list(options.properties),
        "dtypes": list(options.dtypes),
        "head_dims": list(options.head_dims),
        "inputs": options.inputs,
        "config": options.config,
        "contract": options.contract,
        "adapter": options.adapter and list(options.adapter),
        "shard": [options.shard[0] + 1, options.shard[1]],
        "sources": sources.digest(),
        "versions": records.versions(),
    }


def _begin(stream: TextIO, options: Options, identity: dict, before: list[dict]) -> None:
    """Write the head of the records: anew, or what is kept of a killed run."""
    if before:
        for record in before:
            stream.write(records.line(record))
        stream.flush()
        return
    records.write(
        stream,
        "run",
        date=records.now(),
        versions=records.versions(),
        device=options.device or "default",
        profile=options.profile,
        seed=options.seed,
        arguments=sys.argv[1:],
        identity=identity,
    )
    for name, reason in options.choice.absent.items():
        records.write(stream, "not-run", target=name, reason=reason)


def _plan(options: Options, name: str, device: str) -> Plan:
    of_adapter = options.adapter is not None and options.adapter[0] == name
    return Plan(
        target=name,
        device=device,
        profile=options.profile,
        dtypes=options.dtypes,
        seed=options.seed,
        examples=options.examples or PROFILES[options.profile].examples,
        budgeted=options.examples is None,
        properties=options.properties,
        config=options.config,
        contract=options.contract,
        adapter=options.adapter[1] if of_adapter else None,
        head_dims=options.head_dims or (PEERS[name].head_dims if name in PEERS else ()),
        inputs=options.inputs,
        shard=options.shard,
        restarts=options.restarts,
    )


def _stream(path: Path | None):
    return contextlib.nullcontext() if path is None else path.open("w")


def _remember(database, verdicts: list[session.Verdict], plans: list[Plan]) -> None:
    for verdict, plan in zip(verdicts, plans, strict=True):
        failing = [x["recipe"] for x in verdict.failures]
        passed = [recipe for recipe in plan.first if recipe not in failing and recipe not in verdict.failing]
        remembered.remember(database, verdict.target, verdict.failures, passed)


def conclude(options: Options, verdicts: list[session.Verdict], console: Console) -> int:
    """Show verdicts, write the reports that were asked for, and return the exit code."""
    heard = [v for v in verdicts if v.code != session.NOTHING or v.target in options.named]
    codes = [v.strict_code if options.strict else v.code for v in heard]
    code = session.exit_code(codes)
    commands = show(verdicts, options, console)
    for name, reason in options.choice.absent.items():
        console.print(display.not_run(name, reason), soft_wrap=True)
    if options.json:
        with options.json.open("a") as stream:
            records.write(stream, "summary", code=code, targets={v.target: v.code for v in verdicts})
    if options.junit:
        junit.write(options.junit, verdicts, commands, options.strict)
    if options.html:
        page.write(options.html, verdicts, commands, options.choice.absent)
    return code


def show(verdicts: list[session.Verdict], options: Options, console: Console) -> dict[str, list[str]]:
    """Print what was found, keep the failing cases, and return the commands that show them again, by target."""
    judged = [v for v in verdicts if v.cells]
    if judged:
        console.print(display.verdict_table(judged))
    if not verdicts:
        nothing = f"nothing ran: no implementation in the table runs on {options.device or 'this machine'}"
        console.print(f"{nothing} (--list shows devices)", soft_wrap=True)
    commands = {}
    for verdict in verdicts:
        commands[verdict.target] = [command_for(options.out, x, options.adapter) for x in verdict.failures]
        _show_one(verdict, options, commands[verdict.target], console)
    return commands


def _show_one(verdict: session.Verdict, options: Options, commands: list[str], console: Console) -> None:
    if verdict.broken:
        console.print(display.broken(verdict), soft_wrap=True)
    if verdict.seen:
        console.print(display.counts(verdict, options.choice.devices[verdict.target]), soft_wrap=True)
        console.print(display.terms(verdict, options.strict), soft_wrap=True)
    if verdict.done and verdict.done["not_asked"]:
        console.print(display.not_asked(verdict), soft_wrap=True)
    if verdict.probes and verdict.target not in PEERS:
        console.print(display.contract(options.contract), soft_wrap=True)
    for line in display.probes(verdict):
        console.print(line, soft_wrap=True)
    if verdict.code == session.NOTHING and verdict.probes:
        console.print(f"  nothing ran: {verdict.target} was asked nothing, and this is no pass", soft_wrap=True)
    for failure, command in list(zip(verdict.failures, commands, strict=True))[:SHOWN]:
        console.print(display.failure(failure, command), soft_wrap=True)
    if rest := [failure["property"] for failure in verdict.failures[SHOWN:]]:
        console.print(f"  and {len(rest)} more in {options.out}: {', '.join(rest)}", soft_wrap=True)


def command_for(out: Path, failure: dict, adapter: tuple[str, str] | None = None) -> str:
    """Keep a failing case in a folder, and return the command that shows it again."""
    target, file = failure["target"], None
    named = "" if own(target) else f"{target} "
    if adapter and adapter[0] == target:
        file = adapter[1]
        named = f"--adapter {shlex.quote(file + ':' + target.partition(':')[2])} "
    path = replay.save(out, failure, file)
    return f"python -m verify {named}--replay {shlex.quote(str(path))}"
