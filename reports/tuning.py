"""Figures of what the tuner tried and chose: tables of trials, tuned files, static rankings, what tuning costs."""

import contextlib
import io
import logging
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import optuna
from matplotlib.figure import Figure as Drawing
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial
from optuna.visualization import matplotlib as plots

from reports import style
from reports.figure import Figure, Table, plural, short, times
from reports.load import Result

MEASURED, PRUNED = "measured", "pruned"
SHOWN = 15
"""Rows of a long ranking that are drawn; its table holds all."""


def figures(results: list[Result]) -> list[Figure]:
    """Return history and importance of every table of trials, then what was chosen, rankings and costs."""
    made = {
        "trials": (history, importance),
        "tuned": (chosen,),
        "static": (ranking,),
        "cost of tuning": (cost,),
    }
    found = []
    for kind, makers in made.items():
        for i, result in enumerate((x for x in results if x.kind == kind), 1):
            drawn = (make(result) for make in makers)
            found += [replace(figure, name=f"{figure.name}-{i}") for figure in drawn if figure]
    return found


def study(table: dict) -> optuna.Study:
    """Return the trials of a table as a study of Optuna's, in the order in which they were tried."""
    points = table["points"]
    values = {name: sorted({x["config"].get(name) for x in points}, key=repr) for name in table["default"]}
    fields = {name: CategoricalDistribution(x) for name, x in values.items() if len(x) > 1}
    with _quiet():
        made = optuna.create_study()
    for point in points:
        outcome = point["outcome"]
        params = {name: point["config"].get(name) for name in fields}
        states = {MEASURED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}
        value = {"value": outcome["ratio"]["median"]} if outcome["status"] == MEASURED else {}
        state = states.get(outcome["status"], TrialState.FAIL)
        made.add_trial(create_trial(state=state, params=params, distributions=fields, **value))
    return made


@contextlib.contextmanager
def _quiet():
    """Keep Optuna's news of studies in memory, and that its plots are experimental, off the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    optuna.logging.set_verbosity(before)


def _plotted(plot, height: float, *arguments, **keywords) -> tuple[Drawing, object]:
    """Return a plot of Optuna's in the page's size, type and colours."""
    with style.drawing(), _quiet():
        axes = plot(*arguments, **keywords)
        page = axes.figure
        plt.close(page)
        page.set_size_inches(style.WIDTH, height)
        page.set_layout_engine("constrained")
        _ours(page, axes)
    return page, axes


def _ours(page: Drawing, axes) -> None:
    """Give a plot the page's look: Optuna applies a style of its own, and a title, which the page has already."""
    axes.set_title("", loc="left")
    axes.set_title("")
    axes.set_facecolor("none")
    page.patch.set_facecolor("none")
    axes.grid(color=style.LIGHT[style.GRID])
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        label.set(color=style.LIGHT[style.INK], fontsize=9)
    axes.tick_params(which="both", colors=style.LIGHT[style.MUTED], labelcolor=style.LIGHT[style.INK], labelsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), edgecolor=style.LIGHT[style.MUTED])


def about(table: dict) -> str:
    """Return the implementation and shape of a table or an entry."""
    shape = table["shape"]
    sizes = f"T={shape['T']} N={shape['N']} H={shape['HV']} K={shape['K']} V={shape['V']} {shape['dtype']}"
    return sizes + (", packed" if shape["packed"] else "")


def changed(config: dict, default: dict | None) -> str:
    """Return a configuration in words, of which the default's fields are left out."""
    found = ", ".join(f"{name}={x}" for name, x in config.items() if default is None or default.get(name) != x)
    return found or "the default"


def history(result: Result) -> Figure | None:
    """Draw the trials of a study in their order, by Optuna."""
    table = result.data
    measured = [x for x in table["points"] if x["outcome"]["status"] == MEASURED]
    if not measured:
        return None
    page, axes = _plotted(plots.plot_optimization_history, 3.2, study(table), target_name="time / default's")
    axes.set(xlabel="trial")
    style.logarithmic(axes, x=False, y=True)
    points, best = axes.collections[0], axes.lines[0]
    points.set(color=style.SERIES[0], alpha=0.7)
    best.set_color(style.SERIES[1])
    if axes.get_legend():
        axes.get_legend().remove()
    with style.drawing():
        names = ["a trial", "the best so far"]
        page.legend(
            handles=[points, best], labels=names, loc="outside lower center", ncols=2, labelcolor=style.LIGHT[style.INK]
        )
    quickest = min(measured, key=lambda x: x["outcome"]["ratio"]["median"])
    at, gain = table["points"].index(quickest) + 1, quickest["outcome"]["ratio"]["median"]
    title = f"Tuning history of {table['implementation']}, {about(table)}"
    alt = (
        f"{title}: {plural(len(table['points']), 'trial')}, {len(measured)} measured. The quickest is trial {at}, "
        f"{changed(quickest['config'], table['default'])}, with {short(gain)} times the default's time."
    )
    rows = [
        (i, changed(x["config"], table["default"]), x["outcome"]["status"], *_timed(x["outcome"]))
        for i, x in enumerate(table["points"], 1)
    ]
    columns = ("trial", "what differs from the default", "outcome", "ms", "time / default's")
    return Figure("tuning-history", title, alt, Table.of(columns, rows), result.origin, page)


def _timed(outcome: dict) -> tuple[str, str]:
    if outcome["status"] != MEASURED:
        return outcome["message"] or "", ""
    return short(outcome["ms"]["median"]), times(outcome["ratio"])


def importance(result: Result) -> Figure | None:
    """Draw how much of the spread of times each field explains, by Optuna; it needs trials that differ."""
    table = result.data
    made = study(table)
    done = made.get_trials(states=(TrialState.COMPLETE,))
    if len(done) < 4 or len({x.value for x in done}) < 2 or not done[0].params:
        return None
    with _quiet():
        shares = optuna.importance.get_param_importances(made)
    page, axes = _plotted(plots.plot_param_importances, 0.9 + 0.35 * len(shares), made)
    for bar in axes.patches:
        bar.set_color(style.SERIES[0])
    if axes.get_legend():
        axes.get_legend().remove()
    axes.set(xlabel="share of the spread of times", ylabel="")
    axes.grid(False, axis="y")
    title = f"What decides the time of {table['implementation']}, {about(table)}"
    first = next(iter(shares))
    alt = f"{title}: importance of each field of the configuration. The largest is {first}, {shares[first]:.0%}."
    rows = [(name, f"{x:.1%}") for name, x in shares.items()]
    return Figure("importance", title, alt, Table.of(("field", "share"), rows), result.origin, page)


def chosen(result: Result) -> Figure | None:
    """Draw the time of every chosen configuration over the default's."""
    entries = result.data["entries"]
    if not entries:
        return None
    ratios = [x["timing"]["over_default"] for x in entries]
    labels = [about(x).replace(" K=", "\nK=") for x in entries]
    with style.drawing():
        page, axes = style.new(1.0 + 0.45 * len(entries))
        for y, x in enumerate(ratios):
            axes.plot([x["low"], x["high"]], [y, y], color=style.LIGHT[style.MUTED])
            axes.plot(x["median"], y, "o", color=style.SERIES[0])
        axes.axvline(1, color=style.LIGHT[style.MUTED], linestyle="--", linewidth=1)
        axes.set(ylim=(len(entries) - 0.5, -0.5), xlabel="time / default's", xlim=(0, None))
        axes.set_yticks(range(len(entries)), labels)
    name = result.data["implementation"]
    title = f"Configurations chosen for {name}"
    better = sum(not x["timing"]["noise"] for x in entries)
    alt = f"{title}: {plural(len(entries), 'shape')}, {better} with another configuration than the default."
    rows = [
        (about(x), changed(x["config"], None), "kept" if x["timing"]["noise"] else "chosen", times(x["timing"]["ms"]),
         times(x["timing"]["over_default"]), x["verified"]["outcome"], x["provenance"]["date"][:10])
        for x in entries
    ]  # fmt: skip
    columns = ("shape", "configuration", "", "ms", "time / default's", "verified", "date")
    return Figure("chosen", title, alt, Table.of(columns, rows), result.origin, page)


def ranking(result: Result) -> Figure | None:
    """Draw the estimates of a static ranking, the least first."""
    data = result.data
    ranked = [x for x in data["ranked"] if x["microseconds"] is not None]
    best = sorted(ranked, key=lambda x: x["microseconds"])[:SHOWN]
    if not best:
        return None
    default = best[0]["config"]
    with style.drawing():
        page, axes = style.new(0.9 + 0.24 * len(best))
        axes.barh(range(len(best)), [x["microseconds"] for x in best], 0.7, color=style.SERIES[0])
        axes.set(ylim=(len(best) - 0.5, -0.5), xlabel="microseconds, by estimate", ylabel="rank")
        axes.set_yticks(range(len(best)), range(1, len(best) + 1))
        axes.grid(False, axis="y")
    out, problem = len(data["ranked"]) - len(ranked), data["problem"]
    title = f"{data['implementation']} for {data['target']['name']}, T={problem['T']} H={problem['HV']}, by estimate"
    alt = f"{title}: {len(ranked)} configurations ranked, {out} ruled out by the compiler. Nothing was measured."
    rows = [
        (i, changed(x["config"], None if i == 1 else default), short(x["microseconds"]), "")
        for i, x in enumerate(sorted(ranked, key=lambda x: x["microseconds"]), 1)
    ]
    rows += [("-", changed(x["config"], default), "", x["trouble"]) for x in data["ranked"] if x not in ranked]
    columns = ("rank", "configuration; below the first what differs from it", "us, estimate", "trouble")
    return Figure("static", title, alt, Table.of(columns, rows), result.origin, page)


def cost(result: Result) -> Figure | None:
    """Draw how long a trial is in each stage of the tuner."""
    stages = result.data["stages"]
    if not stages:
        return None
    with style.drawing():
        page, axes = style.new(0.9 + 0.3 * len(stages))
        for y, x in enumerate(stages.values()):
            axes.plot([x["seconds"]["low"], x["seconds"]["high"]], [y, y], color=style.LIGHT[style.MUTED])
            axes.plot(x["mean_s"], y, "o", color=style.SERIES[0])
        axes.set(xlabel="seconds of a trial")
        style.logarithmic(axes)
        style.name_rows(axes, list(stages))
    slowest = max(stages, key=lambda name: stages[name]["mean_s"])
    title = "What a trial costs in each stage of the tuner"
    alt = f"{title}: the longest is '{slowest}', {short(stages[slowest]['mean_s'])} seconds."
    rows = [
        (name, short(x["mean_s"]), times(x["seconds"]), short(x["trials_per_minute"])) for name, x in stages.items()
    ]
    columns = ("stage", "mean s", "median s (quartiles)", "trials a minute")
    return Figure("tuning-cost", title, alt, Table.of(columns, rows), result.origin, page)
