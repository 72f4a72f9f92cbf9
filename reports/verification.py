"""Figures of what the judge said: records of `python -m verify --json`."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

from matplotlib.patches import Rectangle

from reports import style
from reports.figure import Figure, Table, number, plural, short
from reports.load import RECORDS, SELF_TEST, Result

INFINITE = "@-inf"
TESTED = 1.0
"""Units of legal error by which leaving a term out has to change a case, so that the case tests the term."""
FARTHEST = 100.0
"""Where an axis ends."""
BINS = ((0.25, "up to 0.25"), (0.5, "up to 0.5"), (0.75, "up to 0.75"), (1.0, "up to 1"))
FAMILIES = ("gates", "keys", "betas", "values", "activation", "dtype")
"""Fields of a recipe that say of what kind a case is."""
ROW = re.compile(r"row \((\d+), (\d+), (\d+)\)")


def figures(results: list[Result]) -> list[Figure]:
    """Return the figures of all runs: matrix, error by kind and by token, term coverage."""
    found = []
    for i, result in enumerate((x for x in results if x.kind == RECORDS and _cases(x)), 1):
        made = (matrix, by_limit, by_family, by_position, coverage)
        drawn = (make(result) for make in made)
        found += [replace(figure, name=f"{figure.name}-{i}") for figure in drawn if figure]
    return found


def mutants(results: list[Result]) -> list[Figure]:
    """Return the matrix of planted bugs and the properties that found them, of every self-test."""
    tests = [x for x in results if x.kind == SELF_TEST]
    return [_mutants(x, f"mutants-{i}") for i, x in enumerate(tests, 1)]


def _cases(result: Result, kind: str = "case") -> list[dict]:
    return [line for line in result.data if line["kind"] == kind]


def worst(result: Result) -> dict[tuple[str, str], tuple[float, int, bool]]:
    """Return by (property, target): worst ratio to the limit, number of cases, and whether the claim is of bits."""
    found: dict[tuple[str, str], tuple[float, int, bool]] = {}
    for line in _cases(result):
        for name, outcome in line["results"].items():
            name = "with gates of -inf" if name.endswith(INFINITE) else name
            ratio, count, exact = found.get((name, line["target"]), (0.0, 0, True))
            exact &= number(outcome["allowed"]) == 0
            found[name, line["target"]] = _larger(ratio, number(outcome["ratio"])), count + 1, exact
    for line in _cases(result, "failure"):
        name = line["property"].removesuffix(INFINITE)
        ratio, count, exact = found.get((name, line["target"]), (0.0, 0, False))
        found[name, line["target"]] = _larger(ratio, number(line["ratio"])), max(count, 1), exact
    return found


def _larger(x: float, y: float) -> float:
    """Return the larger of two ratios; NaN is a failure, and infinitely large."""
    return max(float("inf") if z != z else z for z in (x, y))


def verdicts(result: Result) -> dict[str, str]:
    """Return what became of every target, in a word."""
    words = {0: "pass", 1: "FAIL", 2: "usage", 3: "nothing ran", 5: "not deterministic", 6: "crash"}
    found = {line["target"]: "not finished" for line in _cases(result)}
    for line in _cases(result, "summary"):
        found |= {target: words.get(code, str(code)) for target, code in line["targets"].items()}
    return found | {line["target"]: "not run" for line in _cases(result, "not-run")}


def matrix(result: Result) -> Figure:
    """Draw implementation x property, the worst error in units of its limit in each cell."""
    cells, ended = worst(result), verdicts(result)
    targets, names = list(dict.fromkeys(x for _, x in cells)), list(dict.fromkeys(x for x, _ in cells))
    shown = {key: _cell(*cell) for key, cell in cells.items()}
    text = [[shown.get((name, target), "not asked") for target in targets] for name in names]
    with style.drawing():
        width = max(style.WIDTH, 1.7 + 0.6 * len(targets))
        page, axes = style.new(1.1 + 0.19 * len(names), width)
        for y, name in enumerate(names):
            for x, target in enumerate(targets):
                cell = cells.get((name, target))
                square(
                    axes, x, y, colour(cell[0]) if cell else None, shown[name, target].split(" ")[0] if cell else "-"
                )
        grid(axes, targets, names)
    bad = sorted({f"{target}: {name}" for (name, target), cell in cells.items() if cell[0] > 1})
    runs = ", ".join(f"{target} {ended.get(target, '')}" for target in targets)
    count = len(_cases(result))
    alt = (
        f"Matrix of {plural(len(names), 'property').replace('propertys', 'properties')} by "
        f"{plural(len(targets), 'implementation')}: {runs}. "
        + (f"Over the limit: {', '.join(bad)}." if bad else "No cell is over its limit.")
    )
    rows = [(name, *line) for name, line in zip(names, text, strict=True)]
    rows.append(("verdict", *(ended.get(target, "not finished") for target in targets)))
    rows += [(f"{target}: {ended[target]}", *([""] * len(targets))) for target in ended if target not in targets]
    whose = f"{targets[0]}: worst" if len(targets) == 1 else "Worst"
    title = f"{whose} error in units of its limit, {plural(count, 'case')}; above 1 fails"
    return Figure(
        "verification", title, alt, Table.of(("property", *targets), rows), result.origin, page, wide=len(targets) > 5
    )


def _cell(ratio: float, count: int, exact: bool) -> str:
    return f"{'exact' if exact and ratio == 0 else short(round(ratio, 2))} ({count})"


def square(axes, x: int, y: int, colour: str | None, text: str) -> None:
    """Draw one cell of a matrix; None: without a colour, for what is not there."""
    if colour:
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=colour, edgecolor="none"))
    ink = style.LIGHT[style.INK if colour else style.MUTED]
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7.5)


def colour(ratio: float) -> str:
    """Return the colour of an error in units of its limit."""
    return next((style.LEVELS[i] for i, (most, _) in enumerate(BINS) if ratio <= most), style.LIGHT["bad"])


def grid(axes, columns: list[str], rows: list[str]) -> None:
    """Name the columns above and the rows beside a matrix of squares."""
    axes.set(xlim=(-0.5, len(columns) - 0.5))
    axes.set_xticks(range(len(columns)), map(style.brief, columns), rotation=30, ha="left")
    style.name_rows(axes, rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _dots(result: Result, name: str, title: str, what: str, values: dict, columns: tuple[str, str]) -> Figure | None:
    """Draw the worst values by label and target as dots in rows, the limit at 1."""
    if not values:
        return None
    labels, targets = list(dict.fromkeys(x for x, _ in values)), list(dict.fromkeys(x for _, x in values))
    with style.drawing():
        page, axes = style.new(0.9 + 0.2 * len(labels))
        for i, target in enumerate(targets):
            side = 0.5 * ((i + 0.5) / len(targets) - 0.5)  # equal values of two targets stay visible
            at = [(_drawn(values[x, target]), y + side) for y, x in enumerate(labels) if (x, target) in values]
            xs, ys = zip(*at, strict=True)
            axes.plot(xs, ys, "osD^vPX"[i % 7], color=style.SERIES[i % 7], label=target, alpha=0.85)
        axes.axvline(1, color=style.LIGHT["series-5"], linestyle="--", linewidth=1)
        axes.set(xlabel=_cut(what, values), xlim=(0, max(1.05, *(1.05 * _drawn(x) for x in values.values()))))
        style.name_rows(axes, labels)
        style.legend(page, axes)
    label, target = max(values, key=values.get)
    alt = f"{title}. The largest is {short(values[label, target])}, {target} on {label}; 1 is the limit."
    rows = [(label, *(short(values[label, t]) if (label, t) in values else "-" for t in targets)) for label in labels]
    return Figure(name, title, alt, Table.of((columns[0], *targets), rows), result.origin, page)


def _drawn(x: float) -> float:
    """Return where a value is drawn: what is far too large stands at the end of the axis."""
    return x if x <= FARTHEST else FARTHEST


def _cut(what: str, values: dict) -> str:
    """Return the label of an axis, which says where it ends short of some value."""
    return f"{what} (beyond {FARTHEST:g} at the end)" if any(not x <= FARTHEST for x in values.values()) else what


def _bars(what: str, values: dict[tuple[str, str], float]):
    """Draw values by label and target as bars, those of a label beside each other; returns page and axes."""
    labels, targets = list(dict.fromkeys(x for x, _ in values)), list(dict.fromkeys(x for _, x in values))
    height = 0.8 / len(targets)
    with style.drawing():
        page, axes = style.new(0.8 + 0.12 * len(labels) * (len(targets) + 1))
        for i, target in enumerate(targets):
            at = [(values[x, target], y) for y, x in enumerate(labels) if (x, target) in values]
            ys = [y - 0.4 + height * (i + 0.5) for _, y in at]
            axes.barh(ys, [_drawn(x) for x, _ in at], height * 0.9, color=style.SERIES[i % 7], label=target)
        axes.set(xlabel=_cut(what, values))
        style.name_rows(axes, labels)
        axes.grid(False, axis="y")
        style.legend(page, axes)
    return page, axes


def by_limit(result: Result) -> Figure | None:
    """Draw the largest observation under each calibrated limit."""
    values: dict[tuple[str, str], float] = defaultdict(float)
    for line in _cases(result):
        for limit, found in line["gates"].items():
            key = limit, line["target"]
            values[key] = max(values[key], number(found["observed"]))
    if not values:
        return None
    title = "Largest error by the kind of comparison, in units of legal rounding"
    page, _ = _bars("error / what rounding may do", values)
    labels, targets = list(dict.fromkeys(x for x, _ in values)), list(dict.fromkeys(x for _, x in values))
    label, target = max(values, key=values.get)
    alt = f"{title}, by implementation. The largest is {short(values[label, target])}, {target} under '{label}'."
    rows = [(label, *(short(values[label, t]) if (label, t) in values else "-" for t in targets)) for label in labels]
    return Figure("error-by-limit", title, alt, Table.of(("limit", *targets), rows), result.origin, page)


def _grouped(result: Result, labels: Callable[[dict, dict], Iterable[str]]) -> dict[tuple[str, str], float]:
    """Return the worst ratio of tolerance properties by label and target."""
    values: dict[tuple[str, str], float] = {}
    for line in _cases(result):
        for outcome in line["results"].values():
            for label in labels(line, outcome):
                key = label, line["target"]
                values[key] = _larger(values.get(key, 0.0), number(outcome["ratio"]))
    return values


def by_family(result: Result) -> Figure | None:
    """Draw the worst error by what the inputs of a case are."""
    values = _grouped(result, lambda line, _: (f"{x}: {line['recipe'][x]}" for x in FAMILIES if x in line["recipe"]))
    order = {x: i for i, x in enumerate(FAMILIES)}
    values = dict(sorted(values.items(), key=lambda item: (order[item[0][0].split(":")[0]], item[0][0])))
    title = "Worst error by the kind of inputs, in units of its limit"
    return _dots(result, "error-by-inputs", title, "error / limit", values, ("inputs", ""))


def by_position(result: Result) -> Figure | None:
    """Draw the worst error by the token at which it was found."""

    def labels(line: dict, outcome: dict) -> Iterable[str]:
        found = ROW.search(outcome["where"])
        if found and outcome["what"].split()[-1] == "o":
            token = int(found[2])
            yield next(name for name, last in SPANS.items() if token <= last)

    values = _grouped(result, labels)
    values = dict(sorted(values.items(), key=lambda item: SPANS[item[0][0]]))
    title = "Worst error of outputs by the token where it was largest"
    return _dots(result, "error-by-token", title, "error / limit", values, ("token", ""))


LAST = (0, 3, 7, 15, 31, 63, 127)
SPANS = {"0": 0} | {f"{low + 1} to {high}": high for low, high in pairwise(LAST)} | {"128 on": 1 << 62}
"""The last of the tokens that are shown together: short sequences are most."""


def coverage(result: Result) -> Figure | None:
    """Draw in what share of the cases each term of the recurrence was tested at all."""
    shares: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for line in _cases(result):
        for term, change in line["coverage"].items():
            shares[term, line["target"]].append(change > TESTED)
    if not shares:
        return None
    cases = {target: sum(line["target"] == target for line in _cases(result)) for _, target in shares}
    terms, targets = list(dict.fromkeys(x for x, _ in shares)), list(cases)
    part = {key: sum(found) / cases[key[1]] for key, found in shares.items()}
    page, axes = _bars("% of cases that the term changes", {key: 100 * share for key, share in part.items()})
    axes.set_xlim(0, 100)
    term, target = min(part, key=part.get)
    title = "Share of the cases in which leaving a term out would show"
    alt = f"{title}. The least tested is '{term}' of {target}, in {part[term, target]:.0%} of its cases."
    rows = [(x, *(f"{sum(shares[x, t])} of {cases[t]}" for t in targets)) for x in terms]
    return Figure("coverage", title, alt, Table.of(("term", *targets), rows), result.origin, page)


def _mutants(result: Result, name: str) -> Figure:
    found = result.data["matrix"]
    killers = sorted({x for names in found.values() for x in names}, key=lambda x: -sum(x in y for y in found.values()))
    columns, rows = {x: i for i, x in enumerate(killers)}, list(found)
    survivors = [mutant for mutant, names in found.items() if not names]
    with style.drawing():
        page, axes = style.new(1.9 + 0.175 * len(rows), 2.8 + 0.175 * len(columns))
        hits = [(columns[x], y) for y, mutant in enumerate(rows) for x in found[mutant]]
        axes.plot([x for x, _ in hits], [y for _, y in hits], "s", markersize=8)
        axes.set(xlim=(-0.5, max(len(columns), 1) - 0.5))
        axes.set_xticks(range(len(columns)), list(columns), rotation=90)
        style.name_rows(axes, rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    dead = len(rows) - len(survivors)
    title = f"Planted bugs and the properties that found them: {dead} of {len(rows)} found"
    control = result.data["control"]
    alt = (
        f"Matrix of {len(rows)} planted bugs by {len(columns)} properties. "
        + (f"Survivors: {', '.join(survivors)}. " if survivors else "Every bug was found by at least one property. ")
        + (f"The clean control FAILS {', '.join(control)}." if control else "The clean control passes.")
    )
    table = Table.of(("mutant", "found by"), [(x, ", ".join(names) or "SURVIVED") for x, names in found.items()])
    return Figure(name, title, alt, table, result.origin, page, wide=True)
