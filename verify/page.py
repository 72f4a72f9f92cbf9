"""One self-contained HTML page of a run: no scripts, no fonts, nothing from a network. Everything is escaped."""

from html import escape
from pathlib import Path

from verify import coverage, records
from verify.claims import KINDS
from verify.properties import PROPERTIES
from verify.recipes import from_json, words
from verify.records import INFINITE
from verify.session import Cell, Verdict

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7d4f; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; font-size: 14px; }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .quiet { opacity: .6; }
.bar { display: inline-block; height: .6em; background: var(--good); } .bar.bad { background: var(--bad); }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); } .scroll { overflow-x: auto; }
"""


def write(path: Path, verdicts: list[Verdict], commands: dict[str, list[str]], absent: dict[str, str]) -> None:
    """Write the page. `commands`: by target what shows its failures again; `absent`: by target why it was not run."""
    versions = ", ".join(f"{name} {version}" for name, version in records.versions().items())
    body = [
        "<h1>python -m verify</h1>",
        f"<p>{escape(records.now())}; {escape(versions)}</p>",
        "<p>Worst error in units of its limit; 1.00 fails. No counterexample is no proof.</p>",
        _matrix(verdicts),
        *(f"<p class=quiet>not run: {escape(name)}: {escape(reason)}</p>" for name, reason in absent.items()),
        *(_target(verdict, commands.get(verdict.target, [])) for verdict in verdicts),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>python -m verify</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    path.write_text(head + "\n".join(body) + "</html>\n", encoding="utf-8")


def _matrix(verdicts: list[Verdict]) -> str:
    names = [name for p in PROPERTIES for name in (p.name, p.name + INFINITE) if any(name in v.cells for v in verdicts)]
    kinds = {p.name: p.kind for p in PROPERTIES}
    rows = [
        f'<tr><td title="{escape(KINDS[kinds[name.removesuffix(INFINITE)]])}">{escape(name)}</td>'
        + "".join(_cell(v.cells.get(name)) for v in verdicts)
        + "</tr>"
        for name in names
    ]
    head = "".join(f"<th>{escape(v.target)}" for v in verdicts)
    ends = "".join(f"<td>{_verdict(v)}</td>" for v in verdicts)
    table = f"<table><tr><th>property{head}</tr>{''.join(rows)}<tr><td>verdict{ends}</tr></table>"
    return f"<div class=scroll>{table}</div>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td class=quiet>-</td>"
    kind = "bad" if cell.ratio > 1 else "good"
    width = 100 if cell.ratio > 1 else round(100 * cell.ratio)
    bar = f'<span class="bar {kind}" style="width:{width * 0.06:.2f}rem"></span>'
    return f"<td class={kind}>{bar} {cell.ratio:.2f} <span class=quiet>({cell.cases})</span></td>"


def _verdict(verdict: Verdict) -> str:
    if verdict.broken:
        return '<span class="bad">not judged</span>' if verdict.code == 2 else '<span class="bad">crash</span>'
    text = {0: "pass", 1: "FAIL", 3: "nothing ran", 5: "NONDETERMINISTIC"}.get(verdict.code, f"code {verdict.code}")
    return f'<span class="{"good" if verdict.code == 0 else "bad"}">{text}</span>'


def _target(verdict: Verdict, commands: list[str]) -> str:
    spent = (verdict.done or {}).get("seconds", {})
    counts = verdict.counts
    told = [
        f"<h2>{escape(verdict.target)}: {_verdict(verdict)}</h2>",
        f"<p>{verdict.seen} cases, {counts.get('rows', 0):,} values compared, {counts.get('runs', 0):,} calls, "
        f"{spent.get('all', 0):.1f} s of work, {spent.get('target', 0):.1f} of it in the target and "
        f"{spent.get('definition', 0):.1f} in the definition and its simulators</p>",
    ]
    if verdict.broken:
        ends = "\n".join(x["reason"] for x in verdict.crashes)
        told.append(f"<pre>{escape(ends)}\n{escape(verdict.broken.get('trace', ''))}</pre>")
    told += [_terms(verdict)] if verdict.coverage else []
    closed = [p for p in verdict.probes if p["outcome"] != "supported"]
    if closed:
        rows = "".join(
            f"<tr><td>{escape(p['axis'])}<td>{escape(p['outcome'])}<td>{escape(p['reason'])}<td class=number>"
            f"{'' if p['share'] is None else format(p['share'], '.0%')}</tr>"
            for p in closed
        )
        told.append(f"<table><tr><th>axis<th>what it does<th>reason<th>share of the recipes</tr>{rows}</table>")
    for failure, command in zip(verdict.failures, commands, strict=True):
        told.append(_failure(failure, command))
    for name, reason in (verdict.done or {}).get("not_asked", {}).items():
        told.append(f"<p class=quiet>not asked: {escape(name)}: {escape(reason)}</p>")
    return "\n".join(told)


def _terms(verdict: Verdict) -> str:
    rows = []
    for term in coverage.TERMS:
        seen = sum(change > coverage.SEEN for change in verdict.coverage.get(term, []))
        kind = "" if seen else " class=bad"
        rows.append(f"<tr><td>{escape(term)}<td class=number><span{kind}>{seen} of {verdict.seen}</span></tr>")
    return f"<table><tr><th>term<th>cases in which leaving it out shows</tr>{''.join(rows)}</table>"


def _failure(failure: dict, command: str) -> str:
    figures = f"observed {failure['observed']}, allowed {failure['allowed']}"
    case = words(from_json(failure["recipe"]))
    what = escape(f"{failure['what']} {failure['where']}: {figures}")
    name = f"<span class=bad>{escape(failure['property'])}</span>"
    return f"<p>{name}: {what}</p><pre>{escape(case)}\n{escape(command)}</pre>"
