"""Judge the judge: every mutant, a right implementation with one real bug planted, must fail the quick profile."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify import display, records, session
from verify.mutants import CLEAN, MUTANTS
from verify.plan import PROFILES, Plan
from verify.properties import PROPERTIES

KILLS = 3
"""Failing recipes after which a mutant counts as dead: more would only lengthen the list of properties that see it."""


def run(console: Console, seed: int, path: Path | None) -> int:
    """Judge all mutants and the clean control; print the matrix; returns 4 if one survives, 1 if the control fails."""
    names = [f"mutant:{m.name}" for m in (CLEAN, *MUTANTS)]
    plans = [_plan(name, seed) for name in names]
    quick = PROFILES["quick"]
    expected = {plan.target: quick.examples * len(quick.dtypes) for plan in plans}
    with display.progress(console, expected) as listen:
        verdicts = session.run([plans[0::2], plans[1::2]], listen)
    control = verdicts.pop(names[0])
    console.print(_matrix(verdicts))
    killers = {name for verdict in verdicts.values() for name in _killers(verdict)}
    idle = [p.name for p in PROPERTIES if p.name not in killers]
    console.print(f"properties that killed no mutant: {', '.join(idle) or 'none'}")
    for verdict in (control, *verdicts.values()):
        if verdict.broken:
            console.print(display.broken(verdict))
    passed = control.code == session.PASS
    console.print(
        f"the clean control {'passes' if passed else 'FAILS: ' + ', '.join(_killers(control))} ({control.seen} cases)"
    )
    dead = sum(bool(_killers(v)) for v in verdicts.values())
    _record(path, verdicts, control)
    console.print(f"{len(MUTANTS)} mutants, {dead} killed")
    crashed = any(v.broken for v in (control, *verdicts.values()))
    return session.exit_code(
        [
            session.PASS if passed else session.FAILED,
            session.PASS if dead == len(MUTANTS) else session.SURVIVOR,
            session.CRASH if crashed else session.PASS,
        ]
    )


def _plan(name: str, seed: int) -> Plan:
    quick = PROFILES["quick"]
    kills = 0 if name == f"mutant:{CLEAN.name}" else KILLS
    return Plan(
        target=name, device="cpu", profile="quick", dtypes=quick.dtypes, seed=seed, examples=quick.examples, kills=kills
    )


def _killers(verdict: session.Verdict) -> list[str]:
    failing = {name.removesuffix(records.INFINITE) for name, cell in verdict.cells.items() if cell.ratio > 1}
    return [p.name for p in PROPERTIES if p.name in failing]


def _matrix(verdicts: dict[str, session.Verdict]) -> Table:
    table = Table(title="mutants and the properties that killed them", title_justify="left", pad_edge=False)
    for column in ("mutant", "imitates", "cases", "killed by"):
        table.add_column(column, overflow="fold")
    for mutant in MUTANTS:
        verdict = verdicts[f"mutant:{mutant.name}"]
        killers = _killers(verdict)
        shown = ", ".join(killers[:4]) + (f" and {len(killers) - 4} more" if len(killers) > 4 else "")
        table.add_row(mutant.name, escape(mutant.imitates), str(verdict.seen), shown or "[bold red]SURVIVED")
    return table


def _record(path: Path | None, verdicts: dict[str, session.Verdict], control: session.Verdict) -> None:
    if path is None:
        return
    with path.open("w") as stream:
        matrix = {target.removeprefix("mutant:"): _killers(v) for target, v in verdicts.items()}
        records.write(stream, "self-test", versions=records.versions(), matrix=matrix, control=_killers(control))
