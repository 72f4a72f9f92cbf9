"""Figures of the model: prefill, decoding and caches over the context, and beside transformers'."""

from collections.abc import Sequence
from dataclasses import replace

from reports import style
from reports.figure import Figure, Table, short
from reports.load import Result

COLUMNS = {
    "prefill_s": ("prefill", "seconds"), "piece_s": ("a piece", "seconds"), "step_ms": ("a step", "ms"),
    "cache_bytes": ("cache of one", "MiB"),
}  # fmt: skip
"""Figures of a row, of which a benchmark has some: what they are, and their units."""


def figures(results: list[Result]) -> list[Figure]:
    """Return the figures of all benchmarks of the model."""
    made = {"model prefill and decode": over_context, "model on a cpu": beside}
    return [
        replace(figure, name=f"{figure.name}-{i}")
        for kind, make in made.items()
        for i, result in enumerate((x for x in results if x.kind == kind), 1)
        if (figure := make(result))
    ]


def over_context(result: Result) -> Figure | None:
    """Draw prefill, a step and the cache over the context, of every model in the file."""
    rows = result.data["rows"]
    if not rows:
        return None
    names = list(dict.fromkeys(row["model"] for row in rows))
    fields = {field: of for field, of in COLUMNS.items() if any(field in row for row in rows)}
    with style.drawing():
        page, panels = style.new(0.1 + 2 * len(fields), nrows=len(fields), sharex=True)
        for axes, (field, (title, unit)) in zip(panels, fields.items(), strict=True):
            for i, name in enumerate(names):
                at = sorted((x["context"], _shown(x, field)) for x in rows if x["model"] == name)
                looks = {"color": style.SERIES[i % 7], "label": name}
                axes.plot([x for x, _ in at], [y for _, y in at], "osD^"[i % 4] + "-", **looks)
            style.logarithmic(axes, y=True)
            axes.set(ylabel=f"{title}, {unit}")
        panels[-1].set_xlabel("tokens of context")
        style.legend(page, panels[0], 3)
    asked = result.data["arguments"]
    drawn = ", drawn caches" if asked.get("filled") == "True" else ""
    title = f"Model over context: {asked.get('preset', 'a checkpoint')}, {asked.get('layers') or 'all'} layers{drawn}"
    measured = ", ".join(title for title, _ in fields.values())
    alt = f"{title}: {measured} of {', '.join(names)}. {_longest(rows, names)}"
    cells = [
        (x["model"], f"{x['context']:,}", x.get("batch", 1), *(short(_shown(x, field)) for field in fields))
        for x in rows
    ]
    columns = ("model", "context", "sequences", *(f"{title}, {unit}" for title, unit in fields.values()))
    return Figure("model", title, alt, Table.of(columns, cells), result.origin, page)


def _shown(row: dict, field: str) -> float:
    """Return a figure in the unit that it is drawn in."""
    return row[field] / (1 << 20 if field == "cache_bytes" else 1)


def _longest(rows: Sequence[dict], names: Sequence[str]) -> str:
    context = max(x["context"] for x in rows)
    steps = {x["model"]: x["step_ms"] for x in rows if x["context"] == context}
    said = ", ".join(f"{name} {short(steps[name])} ms" for name in names if name in steps)
    return f"At {context:,} tokens a step takes: {said}."


def beside(result: Result) -> Figure | None:
    """Draw the times of everybody on every question to the whole model."""
    rows = result.data["rows"]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    labels = [f"{row['model']}: {row['asked']}" for row in rows]
    with style.drawing():
        page, axes = style.new(0.9 + 0.3 * len(rows))
        for i, name in enumerate(names):
            at = [(row["ms"][name], y) for y, row in enumerate(rows) if name in row["ms"]]
            look = {"color": style.SERIES[i % 7], "label": name, "alpha": 0.85}
            axes.plot([x for x, _ in at], [y for _, y in at], "osD^vPX"[i % 7], **look)
        style.logarithmic(axes)
        axes.set(xlabel="milliseconds")
        style.name_rows(axes, labels)
        style.legend(page, axes)
    title = f"The whole model beside transformers': {result.data['model']}"
    alt = f"{title}: {', '.join(names)} on {len(rows)} questions."
    cells = [
        (label, ", ".join(f"{name} {short(x)} ms" for name, x in row["ms"].items()),
         ", ".join(f"{name}: {short(x)}" for name, x in row["ratios"].items()))
        for label, row in zip(labels, rows, strict=True)
    ]  # fmt: skip
    return Figure("model-peers", title, alt, Table.of(("asked", "times", "ratios"), cells), result.origin, page)
