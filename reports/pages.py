"""Write a report: one page of HTML that asks for nothing, Markdown for a pull request, pictures for slides."""

from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from reports import style
from reports.claims import MISSING
from reports.figure import Figure, Section, Table
from reports.load import Result
from reports.sections import claimed, collections, pictures, sections, sources

PAGE, SUMMARY = "report.html", "report.md"
CELLS = 400
"""Rows of a table in Markdown: a comment has 65,536 characters."""


def build(results: list[Result], out: Path, markdown: bool = False, png: Path | None = None) -> list[Path]:
    """Write the page to a folder, and what else is asked for; returns the files. Raises OSError."""
    found, now = sections(results), datetime.now(UTC).isoformat(timespec="minutes")
    texts: dict[Path, bytes] = {out / PAGE: html(results, found, now).encode()}
    if markdown:
        texts[out / SUMMARY] = summary(results, found, now).encode()
    if png:
        texts |= {png / f"{figure.name}.png": style.png(figure.drawing) for figure in pictures(found)}
    for path, content in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(texts)


def html(results: list[Result], found: list[Section], now: str) -> str:
    """Return the page: everything that stands in a file is escaped, all it shows is inside it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("page.html.j2")
    return template.render(
        sections=found, sources=sources(results), collections=collections(results), claims=claimed(results),
        now=now, picture=_picture, missing=MISSING,
        light=Markup(style.variables(style.LIGHT)), dark=Markup(style.variables(style.DARK)),
    )  # fmt: skip


def _picture(figure: Figure) -> Markup:
    """Return a figure's SVG with its alternative text; matplotlib has escaped what is written in it."""
    picture = style.svg(figure.drawing, figure.name)
    attributes = Markup('role="img" aria-label="{}" class="picture"').format(figure.alt)
    return Markup(picture.replace("<svg ", f"<svg {attributes} ", 1))


def summary(results: list[Result], found: list[Section], now: str) -> str:
    """Return the report in Markdown: every figure in words, its table folded."""
    lines = ["# KDA Forge: report", "", f"Built {now} from {len(results)} results.", ""]
    for section in found:
        lines += [f"## {section.title}", "", section.lead, ""]
        if not section.figures:
            lines += [f"**Missing**: `{section.command}` writes it.", ""]
        for figure in section.figures:
            lines += [
                f"**{_plain(figure.title)}**",
                "",
                _plain(figure.alt),
                "",
                f"<sub>{_plain(str(figure.origin))}</sub>",
                "",
            ]
            lines += ["<details><summary>Table</summary>", "", *markdown_table(figure.table), "", "</details>", ""]
    lines += ["## The paper, checked", "", *markdown_table(claimed(results)), ""]
    lines += ["## Results", "", *markdown_table(sources(results)), ""]
    if steps := collections(results):
        lines += markdown_table(steps)
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a table, at most so many rows; it says how many are left out."""
    rows = [f"| {' | '.join(_plain(cell) or ' ' for cell in row)} |" for row in table.rows[:CELLS]]
    head = [f"| {' | '.join(_plain(x) or ' ' for x in table.columns)} |", "|---" * len(table.columns) + "|"]
    left = len(table.rows) - CELLS
    return head + rows + ([f"\n{left} more rows"] if left > 0 else [])


def _plain(text: str) -> str:
    """Return text that neither Markdown nor HTML takes for its own."""
    escaped = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "|*_`[]":
        escaped = escaped.replace(sign, "\\" + sign)
    return " ".join(escaped.split())
