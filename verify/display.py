"""What a person sees: progress while workers judge, the table of verdicts, findings with their replay commands."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verify import coverage
from verify.claims import KINDS, Property
from verify.properties import PROPERTIES
from verify.recipes import from_json, words
from verify.records import INFINITE
from verify.session import Cell, Listener, Verdict

PROMISE = "no counterexample in {cases} cases of these families, under the stated precision contracts, on {device}"


EVERY = 60.0
"""Seconds between two lines of progress of one target, where nobody watches a bar."""


class _Lines:
    """Progress in lines, for logs: of every target one a minute, none where all is over within the first."""

    def __init__(self, console: Console, expected: dict[str, int]):
        self._console, self._expected, self._begun = console, expected, time.monotonic()
        self._seen, self._said = Counter(), dict.fromkeys(expected, self._begun)

    def met(self, name: str, worst: float) -> None:
        """Count a case, and say so if the last line is a minute old."""
        self._seen[name] += 1
        now = time.monotonic()
        if self._console.is_terminal or now - self._said[name] < EVERY:
            return
        self._said[name] = now
        text = f"{now - self._begun:5.0f} s  {name}: {self._seen[name]} of {self._expected[name]} recipes, worst"
        self._console.print(f"{text} {_short(worst)}", markup=False, soft_wrap=True)


@contextmanager
def progress(console: Console, expected: dict[str, int]) -> Iterator[Listener]:
    """Show a bar for every target (recipes out of `expected`) and its worst ratio; yields a listener of records."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    lines = _Lines(console, expected)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {name: bars.add_task(escape(name), total=total, state="starting") for name, total in expected.items()}
        worst = dict.fromkeys(expected, 0.0)

        def listen(record: dict) -> None:
            name = record["target"]
            if record["kind"] == "case":
                ratios = [float(r["ratio"]) for r in record["results"].values()]
                worst[name] = max(worst[name], *ratios, 0.0) if ratios else worst[name]
                bars.update(tasks[name], advance=1, state=f"worst {_short(worst[name])}")
                lines.met(name, worst[name])
            elif record["kind"] == "failure":
                bars.update(tasks[name], state=f"shrunk {record['property']}")
            elif record["kind"] in ("target", "crash", "usage"):
                bars.update(tasks[name], completed=expected[name], state=record["kind"].replace("target", "done"))

        yield listen


def _short(ratio: float) -> str:
    # 1.00 is said to fail: what just holds is rounded down
    return "inf" if math.isinf(ratio) else f"{min(ratio, 0.99) if ratio <= 1 else ratio:.2f}"


def verdict_table(verdicts: list[Verdict], properties: Iterable[Property] = PROPERTIES) -> Table:
    """Build the table: property by implementation, worst measure in units of its limit, number of cases."""
    table = Table(
        title="worst error in units of its limit (1.00 fails), cases in brackets", title_justify="left", pad_edge=False
    )
    table.add_column("property")
    for verdict in verdicts:
        table.add_column(escape(verdict.target), justify="right")
    for prop in properties:
        cells = [v.cells.get(prop.name) for v in verdicts]
        if any(cells):
            table.add_row(prop.name, *(_cell(cell, prop.kind) for cell in cells))
    apart = [{n: c for n, c in v.cells.items() if n.endswith(INFINITE)} for v in verdicts]
    if any(apart):
        table.add_section()
        table.add_row("with gates of -inf", *(_summed(cells) for cells in apart))
    table.add_section()
    table.add_row("[bold]verdict", *(_verdict(v) for v in verdicts))
    return table


def _cell(cell: Cell | None, kind: str) -> str:
    if cell is None:
        return "[dim]-"
    if cell.ratio > 1:
        return f"[bold red]FAIL {_short(cell.ratio)}[/] [dim]({cell.cases})"
    shown = _short(cell.ratio) if kind == "tolerance" else "exact"
    return f"[green]{shown}[/] [dim]({cell.cases})"


def _summed(cells: dict[str, Cell]) -> str:
    if not cells:
        return "[dim]-"
    failing = sorted(n.removesuffix(INFINITE) for n, c in cells.items() if c.ratio > 1)
    if failing:
        more = f" and {len(failing) - 2} more" if len(failing) > 2 else ""
        return f"[bold red]FAIL {', '.join(failing[:2])}{more}"
    return f"[green]{_short(max(c.ratio for c in cells.values()))}[/] [dim]({max(c.cases for c in cells.values())})"


def _verdict(verdict: Verdict) -> str:
    if verdict.broken:
        return "[bold red]NOT JUDGED" if verdict.broken["kind"] == "usage" else "[bold red]CRASH"
    failing = sum(cell.ratio > 1 for cell in verdict.cells.values())
    if verdict.nondeterministic:
        return "[bold red]NONDETERMINISTIC"
    if failing or verdict.findings:
        return f"[bold red]FAIL ({failing + len(verdict.findings)})"
    return "[bold green]pass" if verdict.cells else "[yellow]nothing ran"


def counts(verdict: Verdict, device: str) -> str:
    """Say in one line how much was tried, and what was not."""
    done = verdict.counts or {}
    tried = f"{verdict.seen} cases, {done.get('rows', 0):,} values compared, {done.get('runs', 0):,} calls"
    text = f"[bold]{escape(verdict.target)}[/]: {tried}{_pace(verdict)}"
    if discarded := done.get("discarded"):
        text += f", {discarded} checks had nothing to compare"
    if verdict.done and verdict.done["dtypes_refused"]:
        text += f"; dtypes not taken: {', '.join(verdict.done['dtypes_refused'])}"
    if demanded := _demanded(done):
        text += f"\n  {demanded}"
    if verdict.done and verdict.done["budget"]:
        text += f"\n  {verdict.done['budget']}"
    if verdict.code == 0:
        text += f"\n  {PROMISE.format(cases=verdict.seen, device=device)}"
    return text


def _pace(verdict: Verdict) -> str:
    """Say how many cases a second were judged, and where the time went."""
    spent = (verdict.done or {}).get("seconds", {})
    if not spent.get("all"):
        return ""
    share = {name: spent[name] / spent["all"] for name in ("target", "definition")}
    pace = f"{spent['all']:.1f} s of work ({verdict.seen / spent['all']:.1f} cases a second"
    return f", {pace}; {share['target']:.0%} in the target, {share['definition']:.0%} in the definition and simulators)"


def _demanded(counts: dict[str, int]) -> str:
    """Say how often calls were repeated, whether gradients were judged, and how many programs ran at once."""
    parts = [f"gradients judged in {counts['backward']} cases"] if counts.get("backward") else []
    if "repeats" in counts:
        parts.append(f"bits compared in {counts['repeats']} equal calls")
    if "pairs" in counts:
        programs = f", launches of at least {counts['programs']:,} programs" if "programs" in counts else ""
        parts.append(f"a crowd of {counts['pairs']:,} sequences and heads{programs}")
    return "; ".join(parts)


def not_run(name: str, reason: str) -> str:
    """Say that an implementation was not judged, and why."""
    return f"[yellow]NOT RUN[/] {name}: {escape(reason)}"


def not_asked(verdict: Verdict) -> str:
    """Say which of the chosen properties no case could ask, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in verdict.done["not_asked"].items():
        reasons.setdefault(reason, []).append(name)
    parts = (f"{', '.join(names)} ({escape(reason)})" for reason, names in reasons.items())
    return f"  not asked: {', '.join(parts)}"


def contract(named: str | None) -> str:
    """Say by which precision contract a foreign target was judged: it declares none."""
    if named:
        wide = "float64" if named == "float64" else "float32"
        return f"  assumed precision contract (--contract): operands in {named}, sums and states in {wide}"
    return (
        "  assumed precision contract: operands as the inputs, sums and states in float32 (float64 for float64); "
        "--contract NAME assumes another"
    )


def probes(verdict: Verdict) -> Iterator[str]:
    """Say what a foreign target refuses or ignores, with the share of the recipe space that this takes away."""
    for p in verdict.probes:
        if p["outcome"] == "supported":
            continue
        share = "" if p["share"] is None else f", {p['share']:.0%} of the recipe space"
        words_ = {"refused": "[yellow]UNSUPPORTED", "ignored": "[bold red]IGNORED", "wrong": "[bold red]WRONG"}[
            p["outcome"]
        ]
        yield f"  {words_}[/] {escape(p['axis'])}: {escape(p['reason'] or '')}{share}"


def terms(verdict: Verdict, strict: bool = False) -> str:
    """Say in how many cases each term of the recurrence was exercised."""
    parts, failed = [], set(verdict.untested()) if strict else ()
    for term in coverage.TERMS:
        changes = verdict.coverage.get(term, [])
        seen = sum(change > coverage.SEEN for change in changes)
        untested = f"{term} NOT TESTED{' (FAIL: --strict)' if term in failed else ''}"
        parts.append(f"{term} {seen}/{verdict.seen}" if seen else f"[bold red]{untested}[/]")
    return "  term coverage (cases where leaving it out shows): " + ", ".join(parts)


def failure(record: dict, command: str | None, case: str | None = None) -> str:
    """Describe a failure: property, smallest case (in words, its recipe's by default), figures, how to see it again."""
    flaky = "" if record["steady"] else "  [bold red]NONDETERMINISTIC[/]: it passed when the same case ran again\n"
    return (
        f"[bold red]FAIL[/] {escape(record['target'])} :: {record['property']}\n"
        f"  {escape(case or words(from_json(record['recipe'])))}\n{flaky}"
        f"  {escape(record['what'])} {escape(record['where'])}: observed {_figure(record['observed'])}, "
        f"allowed {_figure(record['allowed'])}" + (f"\n  {escape(command)}" if command else "")
    )


def explain(prop: Property, console: Console) -> None:
    """Print what a property claims: its kind, equation and bugs, and when it can be asked."""
    console.print(f"{prop.name} ({prop.kind}: {KINDS[prop.kind]})\n", markup=False, soft_wrap=True)
    console.print(prop.explanation, markup=False, soft_wrap=True)
    console.print(f"\nAsked where: {prop.precondition}.", markup=False, soft_wrap=True)


def _figure(x: float | str) -> str:
    return f"{float(x):.3g}"


def broken(verdict: Verdict) -> str:
    """Describe a crash, or a target that could not be judged as named."""
    record = verdict.broken
    trace = f"\n{escape(record['trace'].strip())}" if record["kind"] == "crash" and record.get("trace") else ""
    head = f"[bold red]{record['kind'].upper()}[/] {escape(verdict.target)}"
    return "\n".join(f"{head}: {escape(x['reason'])}{_after(x)}" for x in verdict.crashes) + trace


def _after(record: dict) -> str:
    """Say of the end of a process on which case it was, and what came behind."""
    if "recipe" not in record:
        return ""
    case = "" if "layers" in record["recipe"] else f" on {words(from_json(record['recipe']))}"
    text = f", asked {record['property']}{case}"
    if "restarts" in record:
        return f"{text}; a new process went on behind it, {record['restarts']} more may (--restarts)"
    return f"{text}; the {record['left']} recipes left are NOT JUDGED (--restarts)" if record.get("left") else text
