"""Judge the judge: every mutant, a right implementation with one real bug planted, must fail the quick profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify import display, records, session
from verify.claims import Property
from verify.mutants import CLEAN, MUTANTS
from verify.plan import PROFILES, Plan
from verify.properties import PROPERTIES

KILLS = 3
"""Failing recipes after which a mutant counts as dead: more would only lengthen the list of properties that see it."""


@dataclass(frozen=True)
class Suite:
    """What is judged: mutants and the clean control, named behind a prefix, and the properties that judge them."""

    prefix: str
    clean: object
    mutants: Sequence
    properties: Sequence[Property]
    dtypes: tuple[str, ...]

    def target(self, mutant) -> str:
        """Return the name of a mutant as a target."""
        return self.prefix + mutant.name

    def killers(self, verdict: session.Verdict) -> list[str]:
        """Name the properties that a mutant failed."""
        failing = {name.removesuffix(records.INFINITE) for name, cell in verdict.cells.items() if cell.ratio > 1}
        return [p.name for p in self.properties if p.name in failing]


def operations() -> Suite:
    """Return the suite of implementations of the op."""
    return Suite("mutant:", CLEAN, MUTANTS, PROPERTIES, PROFILES["quick"].dtypes)


def run(console: Console, seed: int, path: Path | None, suite: Suite | None = None) -> int:
    """Judge all mutants of a suite, by default of the op, and the clean control; print the matrix.

    Returns 4 if a mutant survives, 1 if the control fails.
    """
    suite = suite or operations()
    plans = [_plan(suite, mutant, seed) for mutant in (suite.clean, *suite.mutants)]
    expected = {plan.target: plan.examples * len(plan.dtypes) for plan in plans}
    with display.progress(console, expected) as listen:
        verdicts = session.run([plans[0::2], plans[1::2]], listen)
    control = verdicts.pop(plans[0].target)
    console.print(_matrix(suite, verdicts))
    killers = {name for verdict in verdicts.values() for name in suite.killers(verdict)}
    idle = [p.name for p in suite.properties if p.name not in killers]
    console.print(f"properties that killed no mutant: {', '.join(idle) or 'none'}")
    for verdict in (control, *verdicts.values()):
        if verdict.broken:
            console.print(display.broken(verdict))
    passed = control.code == session.PASS
    shown = "passes" if passed else "FAILS: " + ", ".join(suite.killers(control))
    console.print(f"the clean control {shown} ({control.seen} cases)")
    dead = sum(bool(suite.killers(v)) for v in verdicts.values())
    _record(path, suite, verdicts, control)
    console.print(f"{len(suite.mutants)} mutants, {dead} killed")
    crashed = any(v.broken for v in (control, *verdicts.values()))
    return session.exit_code(
        [
            session.PASS if passed else session.FAILED,
            session.PASS if dead == len(suite.mutants) else session.SURVIVOR,
            session.CRASH if crashed else session.PASS,
        ]
    )


def _plan(suite: Suite, mutant, seed: int) -> Plan:
    return Plan(
        target=suite.target(mutant),
        device="cpu",
        profile="quick",
        dtypes=suite.dtypes,
        seed=seed,
        examples=PROFILES["quick"].examples,
        kills=0 if mutant is suite.clean else KILLS,
    )


def _matrix(suite: Suite, verdicts: dict[str, session.Verdict]) -> Table:
    table = Table(title="mutants and the properties that killed them", title_justify="left", pad_edge=False)
    for column in ("mutant", "imitates", "cases", "killed by"):
        table.add_column(column, overflow="fold")
    for mutant in suite.mutants:
        verdict = verdicts[suite.target(mutant)]
        killers = suite.killers(verdict)
        shown = ", ".join(killers[:4]) + (f" and {len(killers) - 4} more" if len(killers) > 4 else "")
        table.add_row(mutant.name, escape(mutant.imitates), str(verdict.seen), shown or "[bold red]SURVIVED")
    return table


def _record(path: Path | None, suite: Suite, verdicts: dict[str, session.Verdict], control: session.Verdict) -> None:
    if path is None:
        return
    with path.open("w") as stream:
        matrix = {target.removeprefix(suite.prefix): suite.killers(v) for target, v in verdicts.items()}
        about = {"date": records.now(), "versions": records.versions()}
        records.write(stream, "self-test", **about, matrix=matrix, control=suite.killers(control))
