"""Figures of the model: prefill, decoding and caches over the context, and beside transformers'."""

from collections.abc import Sequence
from dataclasses import replace

from reports import style
from reports.figure import Figure, Table, short
from reports.load import Result

COLUMNS = {"prefill_s": ("prefill", "seconds"), "step_ms": ("a step", "ms"), "cache_bytes": ("cache", "MiB")}


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
    with style.drawing():
        page, panels = style.new(6.1, nrows=len(COLUMNS), sharex=True)
        for axes, (field, (title, unit)) in zip(panels, COLUMNS.items(), strict=True):
            for i, name in enumerate(names):
                at = sorted(
                    (x["context"], x[field] / (1 << 20 if field == "cache_bytes" else 1))
                    for x in rows
                    if x["model"] == name
                )
                axes.plot(
                    [x for x, _ in at], [y for _, y in at], "osD^"[i % 4] + "-", color=style.SERIES[i % 7], label=name
                )
            style.logarithmic(axes, y=True)
            axes.set(ylabel=f"{title}, {unit}")
        panels[-1].set_xlabel("tokens of context")
        style.legend(page, panels[0], 3)
    asked = result.data["arguments"]
    title = f"Model over context: {asked.get('preset', 'a checkpoint')}, {asked.get('layers') or 'all'} layers"
    alt = f"{title}: prefill, a decoding step and the cache of {', '.join(names)}. {_longest(rows, names)}"
    cells = [
        (
            x["model"],
            f"{x['context']:,}",
            short(x["prefill_s"]),
            short(x["step_ms"]),
            short(x["cache_bytes"] / (1 << 20)),
        )
        for x in rows
    ]
    columns = ("model", "context", "prefill s", "step ms", "cache MiB")
    return Figure("model", title, alt, Table.of(columns, cells), result.origin, page)


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
