"""Join the records of shards into one run, and compare two runs: `python -m verify merge`, `python -m verify diff`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from verify import display, records, session
from verify.choice import UsageError
from verify.parts import differences


def merge(argv: list[str], console: Console) -> int:
    """Join shards; returns the exit code of the whole. Raises UsageError where a shard is missing, or unlike others."""
    parser = argparse.ArgumentParser(prog="python -m verify merge", description=merge.__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="records of --shard 1/N, ..., N/N")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="where the joined records go")
    args = parser.parse_args(argv)
    shards = {path: _read(path) for path in args.files}
    _check(shards)
    lines = _joined(list(shards.values()))
    verdicts = verdicts_of(lines)
    code = session.exit_code([v.code for v in verdicts.values()])
    summary = {"code": code, "targets": {name: v.code for name, v in verdicts.items()}}
    lines.append({"schema": records.SCHEMA, "kind": "summary", **summary})
    try:
        args.output.write_text("".join(map(records.line, lines)))
    except OSError as error:
        raise UsageError(f"-o {args.output}: {error.strerror}") from error
    console.print(display.verdict_table([v for v in verdicts.values() if v.cells]))
    for verdict in verdicts.values():
        devices = {x["device"] for x in lines if x["kind"] == "case" and x["target"] == verdict.target}
        if verdict.broken:
            console.print(display.broken(verdict), soft_wrap=True)
        if verdict.seen:
            console.print(display.counts(verdict, ", ".join(sorted(devices))), soft_wrap=True)
            console.print(display.terms(verdict), soft_wrap=True)
        for failure in verdict.failures:
            console.print(display.failure(failure, None), soft_wrap=True)
    console.print(f"{len(shards)} shards joined in {args.output}", soft_wrap=True)
    return code


def verdicts_of(lines: list[dict]) -> dict[str, session.Verdict]:
    """Return the verdicts of a run's records, by target."""
    found: dict[str, session.Verdict] = {}
    for record in lines:
        if "target" in record and record["kind"] != "not-run":
            found.setdefault(record["target"], session.Verdict(record["target"])).add(record)
    return found


def _read(path: Path) -> list[dict]:
    try:
        lines = records.read(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not lines or lines[0]["kind"] != "run":
        raise UsageError(f"{path}: expected the records of a run (--json FILE)")
    return lines


def _check(shards: dict[Path, list[dict]]) -> None:
    """Refuse what is no complete set of shards of one run."""
    for path, lines in shards.items():
        if "identity" not in lines[0]:
            raise UsageError(f"{path}: written before runs said what they are; run it again")
        if lines[-1]["kind"] != "summary":
            raise UsageError(f"{path}: not finished; go on with --resume")
    (first, lines), *others = shards.items()
    for path, other in others:
        unlike = [x for x in differences(lines[0]["identity"], other[0]["identity"]) if not x.startswith("shard ")]
        if unlike:
            raise UsageError(f"{path} is of another run than {first}: {'; '.join(unlike)}")
    found = sorted(tuple(lines[0]["identity"]["shard"]) for lines in shards.values())
    count = found[0][1]
    if found != [(i, count) for i in range(1, count + 1)]:
        missing = [f"{i}/{count}" for i in range(1, count + 1) if (i, count) not in found]
        have = ", ".join(f"{i}/{n}" for i, n in found)
        lacks = f"; missing {', '.join(missing)}" if missing else ""
        raise UsageError(f"expected every shard once, got {have}{lacks}")


def _joined(shards: list[list[dict]]) -> list[dict]:
    head = shards[0][0]
    run = head | {"identity": head["identity"] | {"shard": [1, 1]}}
    return [run, *(x for lines in shards for x in lines if x["kind"] not in ("run", "summary"))]


def diff(argv: list[str], console: Console) -> int:
    """Compare two files of records; returns 1 where the newer is worse: a property fails, it or a target is gone."""
    parser = argparse.ArgumentParser(prog="python -m verify diff", description=diff.__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", type=Path)
    parser.add_argument("new", metavar="NEW", type=Path)
    parser.add_argument("--more", type=float, default=0.1, metavar="X", help="say so where a ratio rose by X (0.1)")
    args = parser.parse_args(argv)
    lines = {"old": _read(args.old), "new": _read(args.new)}
    old, new = (verdicts_of(lines[name]) for name in ("old", "new"))
    for text in differences(*(lines[x][0].get("identity", {"versions": lines[x][0]["versions"]}) for x in lines)):
        console.print(f"runs differ: {text}", markup=False, soft_wrap=True)
    rows = [row for target in sorted(old.keys() | new.keys()) for row in _changes(target, old, new, args.more)]
    if not rows:
        console.print("no difference")
        return session.PASS
    table = Table("target", "property", "old", "new", "", title=f"{args.old} -> {args.new}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    worse = [row for row in rows if row[4] in ("FAILS", "GONE", "NOT ASKED", "WORSE CODE")]
    console.print(f"{len(worse)} regressions, {len(rows) - len(worse)} other differences")
    return session.FAILED if worse else session.PASS


def _changes(target: str, old: dict, new: dict, more: float) -> list[tuple[str, str, str, str, str]]:
    """List what changed of one target, worst first: exit codes, properties that fail or pass now, larger errors."""
    if target not in new:
        return [(target, "", f"code {old[target].code}", "-", "GONE")]
    if target not in old:
        return [(target, "", "-", f"code {new[target].code}", "new")]
    before, after = old[target], new[target]
    rows = []
    if before.code != after.code:
        worse = session.exit_code([before.code, after.code]) == after.code
        rows.append((target, "", f"code {before.code}", f"code {after.code}", "WORSE CODE" if worse else "better code"))
    for name in sorted(before.cells.keys() | after.cells.keys()):
        a, b = before.cells.get(name), after.cells.get(name)
        shown = tuple("-" if x is None else f"{x.ratio:.2f} ({x.cases})" for x in (a, b))
        if what := _change(a, b, more):
            rows.append((target, name, *shown, what))
    return rows


def _change(a: session.Cell | None, b: session.Cell | None, more: float) -> str | None:
    if a is None or b is None:
        return "NOT ASKED" if b is None else "FAILS" if b.ratio > 1 else "new"
    if (a.ratio > 1) != (b.ratio > 1):
        return "FAILS" if b.ratio > 1 else "passes now"
    return "larger error" if b.ratio <= 1 and b.ratio - a.ratio > more else None
