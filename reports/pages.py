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
COMMENT = 64_000
"""Characters of the Markdown: GitHub takes comments of 65,536. The longest tables are left to the page."""


def build(
    results: list[Result], out: Path, markdown: bool = False, png: Path | None = None, dark: bool = False
) -> list[Path]:
    """Write the page to a folder, and what else is asked for; returns the files. Raises OSError.

    dark: every picture once more in the dark theme's colours.
    """
    found, now = sections(results), datetime.now(UTC).isoformat(timespec="minutes")
    texts: dict[Path, bytes] = {out / PAGE: html(results, found, now).encode()}
    if markdown:
        texts[out / SUMMARY] = summary(results, found, now).encode()
    if png:
        themes = {"": style.LIGHT} | ({"-dark": style.DARK} if dark else {})
        texts |= {
            png / f"{figure.name}{suffix}.png": style.png(figure.drawing, figure.title, str(figure.origin), theme)
            for figure in pictures(found)
            for suffix, theme in themes.items()
        }
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
    """Return the report in Markdown: every figure in words, its table folded where a comment has room for it."""
    figures = [figure for section in found for figure in section.figures]
    tables = {figure.name: "\n".join(markdown_table(figure.table)) for figure in figures}
    room = COMMENT - len(_composed(results, found, now, {}))
    kept = {}
    for name, text in sorted(tables.items(), key=lambda item: len(item[1])):
        room -= len(_folded(text))
        if room > 0:
            kept[name] = text
    return _composed(results, found, now, kept)


def _composed(results: list[Result], found: list[Section], now: str, tables: dict[str, str]) -> str:
    parts = ["# KDA Forge: report", f"Built {now} from {len(results)} results."]
    for section in found:
        parts += [f"## {section.title}", section.lead]
        if not section.figures:
            parts.append(f"**Missing**: `{section.command}` writes it.")
        for figure in section.figures:
            origin = f"<sub>{_plain(str(figure.origin))}</sub>"
            table = _folded(tables[figure.name]) if figure.name in tables else f"(The table is in {PAGE}.)"
            parts += [f"**{_plain(figure.title)}**", _plain(figure.alt), origin, table]
    parts += ["## The paper, checked", "\n".join(markdown_table(claimed(results)))]
    parts += ["## Results", "\n".join(markdown_table(sources(results)))]
    if steps := collections(results):
        parts.append("\n".join(markdown_table(steps)))
    return "\n\n".join(parts) + "\n"


def _folded(table: str) -> str:
    return f"<details><summary>Table</summary>\n\n{table}\n\n</details>"


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a table."""
    head = [f"| {' | '.join(_plain(x) or ' ' for x in table.columns)} |", "|---" * len(table.columns) + "|"]
    return head + [f"| {' | '.join(_plain(cell) or ' ' for cell in row)} |" for row in table.rows]


def _plain(text: str) -> str:
    """Return text that neither Markdown nor HTML takes for its own."""
    escaped = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "|*_`[]":
        escaped = escaped.replace(sign, "\\" + sign)
    return " ".join(escaped.split())
