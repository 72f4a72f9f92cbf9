"""Figures of toys trained on the paper's synthetic tasks: accuracy and loss over the steps, every seed a line."""

from dataclasses import replace

from reports import style
from reports.figure import Figure, Table
from reports.load import Result

OVER = "over"
PANELS = {"accuracy": "accuracy, %", "loss": "loss"}


def figures(results: list[Result]) -> list[Figure]:
    """Return a figure for each task, with its sizes, of each file."""
    found = [result for result in results if result.kind == "synthetic tasks"]
    tasks = [(result, about) for result in found for about in dict.fromkeys(map(_about, result.data["runs"]))]
    return [replace(curves(result, about), name=f"synthetic-{i}") for i, (result, about) in enumerate(tasks, 1)]


def _about(run: dict) -> tuple[str, int, str]:
    """Return what runs have in common that stand in one figure."""
    return run["run"]["task"], run["run"]["length"], run["task"]


def chosen(runs: list[dict]) -> list[dict]:
    """Return the runs at the rate that was chosen: of each seed the one with the best accuracy on unseen answers."""
    best: dict[tuple[str, int], dict] = {}
    for run in runs:
        key = run["label"], run["run"]["seed"]
        if run["state"] == OVER and (key not in best or _rank(run) > _rank(best[key])):
            best[key] = run
    return list(best.values())


def _rank(run: dict) -> tuple[float, int]:
    return run["accuracy"], -run["curve"][-1]["step"]


def curves(result: Result, about: tuple[str, int, str]) -> Figure:
    """Draw accuracy and loss of a task over the steps; a run that solved it ends where it did."""
    runs = [run for run in result.data["runs"] if _about(run) == about]
    drawn = chosen(runs)
    labels = list(dict.fromkeys(run["label"] for run in drawn))
    with style.drawing():
        page, panels = style.new(4.4, nrows=2, sharex=True)
        for axes, (field, title) in zip(panels, PANELS.items(), strict=True):
            _draw(axes, drawn, labels, field)
            axes.set(ylabel=title)
        panels[0].set_ylim(-3, 103)
        panels[1].set_ylim(bottom=0)
        panels[1].set_xlabel("training steps")
        style.legend(page, panels[0], 3)
    task, length, sizes = about
    title = f"{task}, length {length}: {sizes}"
    alt = (
        f"{title}. Accuracy on unseen answers, by seed: {'; '.join(_said(drawn, label) for label in labels) or 'none'}."
    )
    return Figure("synthetic", title, alt, _table(runs), result.origin, page if drawn else None)


def _draw(axes, runs: list[dict], labels: list[str], field: str) -> None:
    """Draw one line for each run, in the colour of its mixer; a dot where it ends."""
    factor = 100 if field == "accuracy" else 1
    for i, label in enumerate(labels):
        look = {"color": style.SERIES[i % len(style.SERIES)], "linestyle": ("-", "--", ":")[i // len(style.SERIES) % 3]}
        for n, run in enumerate(run for run in runs if run["label"] == label):
            steps, values = zip(*((point["step"], factor * point[field]) for point in run["curve"]), strict=True)
            axes.plot(steps, values, linewidth=1.1, alpha=0.85, label=None if n else label, **look)
            axes.plot(steps[-1:], values[-1:], "o", markersize=3, color=look["color"])


def _said(runs: list[dict], label: str) -> str:
    own = [run for run in runs if run["label"] == label]
    return f"{label} " + ", ".join(f"{run['accuracy']:.1%} after {run['curve'][-1]['step']:,} steps" for run in own)


def _table(runs: list[dict]) -> Table:
    columns = ("mixer", "seed", "rate", "parameters", "outcome", "steps", "minutes", "accuracy", "whole sequences")
    rows = []
    for each in runs:
        last = each["curve"][-1] if each["curve"] else None
        figures = ["" if x is None else f"{x:.1%}" for x in (each["accuracy"], each["exact"])]
        spent = (f"{last['step']:,}", f"{last['seconds'] / 60:.1f}") if last else ("", "")
        about = each["label"], each["run"]["seed"], f"{each['run']['rate']:g}", f"{each['parameters']:,}", each["state"]
        rows.append((*about, *spent, *figures))
    return Table.of(columns, rows)
