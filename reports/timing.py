"""Figures of what was timed: benchmarks on any device, those of CPUs, the yardstick, and the model."""

from collections import defaultdict
from dataclasses import replace

from reports import style
from reports.figure import Figure, Table, plural, short, times
from reports.load import Result

MARKERS = "osD^vPX*"
FEW = 2
"""Points that make a line."""


def figures(results: list[Result]) -> list[Figure]:
    """Return the figures of all benchmarks of the operations."""
    found = []
    for i, result in enumerate((x for x in results if x.kind == "bench"), 1):
        modes = result.data["method"]["modes"]
        drawn = [make(result, mode) for mode in modes for make in (latency, over_tokens, roofline)]
        found += [replace(x, name=f"{x.name}-{i}") for x in drawn if x]
    for i, result in enumerate((x for x in results if x.kind == "cpu prefill and decode"), 1):
        found += [replace(x, name=f"{x.name}-{i}") for x in (cpu_ratios(result),) if x]
    for i, result in enumerate((x for x in results if x.kind == "benchmarks"), 1):
        found += [replace(x, name=f"{x.name}-{i}") for x in (benchmarked(result),) if x]
    return found


def _measured(case: dict, mode: str) -> dict[str, dict]:
    return {x["name"]: x for x in case["implementations"] if mode in x["ms"]}


def _colours(names) -> dict[str, tuple[str, str]]:
    return {name: (style.SERIES[i % len(style.SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def latency(result: Result, mode: str) -> Figure | None:
    """Draw the time of everybody on every case, and the floor of the device under each."""
    cases = [case for case in result.data["cases"] if _measured(case, mode)]
    if not cases:
        return None
    names = list(dict.fromkeys(name for case in cases for name in _measured(case, mode)))
    looks = _colours(names)
    with style.drawing():
        page, axes = style.new(0.9 + 0.3 * len(cases))
        for name in names:
            at = [(_measured(x, mode)[name]["ms"][mode], y) for y, x in enumerate(cases) if name in _measured(x, mode)]
            colour, marker = looks[name]
            axes.hlines([y for _, y in at], [x["low"] for x, _ in at], [x["high"] for x, _ in at], color=colour)
            axes.plot([x["median"] for x, _ in at], [y for _, y in at], marker, color=colour, label=name)
        floors = [x["floor"]["ms"] for x in cases]
        axes.plot(floors, range(len(cases)), "|", color=style.LIGHT[style.INK], markersize=13, label="floor")
        style.logarithmic(axes)
        axes.set(xlabel=f"milliseconds, {mode}")
        style.name_rows(axes, [x["name"] for x in cases])
        style.legend(page, axes, 3)
    title = f"Time against each peer and the floor of the device, {mode}"
    absent = ", ".join(f"{x['name']} ({x['reason']})" for x in result.data["not_compared"])
    closest = min(
        (x["over_floor"][mode], name, case["name"])
        for case in cases
        for name, x in _measured(case, mode).items()
        if mode in x["over_floor"]
    )
    alt = (
        f"{title}: {plural(len(cases), 'case')}, {', '.join(names)}. Closest to the floor is {closest[1]} on "
        f"{closest[2]}, {short(closest[0])} times it." + (f" Not compared: {absent}." if absent else "")
    )
    rows = [row for case in cases for row in _rows(case, mode)]
    columns = ("case", "implementation", "ms", "over the floor", "slower than ours by", "outcome")
    rows += [("all", x["name"], "", "", "", f"not compared: {x['reason']}") for x in result.data["not_compared"]]
    return Figure(f"latency-{mode}", title, alt, Table.of(columns, rows), result.origin, page)


def _rows(case: dict, mode: str):
    ratios = {x["other"]: x["other_over_ours"] for x in case["ratios"] if x["mode"] == mode}
    floor = case["floor"]
    by = "bytes" if floor["bytes_ms"] >= floor["flops_ms"] else "products"
    yield case["name"], f"floor, by {by}", short(floor["ms"]), "1", "", ""
    for x in case["implementations"]:
        over = x["over_floor"].get(mode)
        spread, ratio = x["ms"].get(mode), ratios.get(x["name"])
        said = x["failures"].get(mode) or x["message"] or ""
        outcome = x["status"] + (f": {said}" if said else "")
        yield (
            case["name"], x["name"], times(spread) if spread else "-", short(over) if over else "-",
            times(ratio) if ratio else "", outcome,
        )  # fmt: skip


def _alike(case: dict) -> tuple:
    """Return what two cases share that differ in the number of tokens only."""
    sizes = tuple(x for name, x in case["sizes"].items() if name != "T")
    return sizes, case["dtype"], case["lower_bound"], case["lengths"] is None


def over_tokens(result: Result, mode: str) -> Figure | None:
    """Draw time over the number of tokens, where cases differ in nothing else."""
    groups = defaultdict(list)
    for case in result.data["cases"]:
        if _measured(case, mode) and case["lengths"] is None:
            groups[_alike(case)].append(case)
    groups = {key: sorted(x, key=lambda case: case["sizes"]["T"]) for key, x in groups.items() if len(x) >= FEW}
    if not groups:
        return None
    names = list(dict.fromkeys(n for cases in groups.values() for case in cases for n in _measured(case, mode)))
    looks, rows = _colours(names), []
    with style.drawing():
        page, panels = style.new(0.5 + 2.5 * len(groups), nrows=len(groups), squeeze=False)
        for axes, cases in zip(panels[:, 0], groups.values(), strict=True):
            for name in names:
                at = [
                    (x["sizes"]["T"], _measured(x, mode)[name]["ms"][mode]) for x in cases if name in _measured(x, mode)
                ]
                colour, marker = looks[name]
                axes.plot([T for T, _ in at], [x["median"] for _, x in at], marker + "-", color=colour, label=name)
            tokens = [x["sizes"]["T"] for x in cases]
            axes.plot(tokens, [x["floor"]["ms"] for x in cases], "--", color=style.LIGHT[style.INK], label="floor")
            style.logarithmic(axes, y=True)
            axes.set(xlabel="tokens", ylabel="ms")
            axes.set_title(_called(cases[0]))
            rows += [(case["name"], case["sizes"]["T"], *row[1:3]) for case in cases for row in _rows(case, mode)]
        style.legend(page, panels[0, 0], 3)
    title = f"Time over the number of tokens, {mode}"
    lengths = sorted({case["sizes"]["T"] for cases in groups.values() for case in cases})
    alt = f"{title}: {', '.join(names)} and the floor, from {lengths[0]:,} to {lengths[-1]:,} tokens."
    return Figure(
        f"tokens-{mode}", title, alt, Table.of(("case", "tokens", "implementation", "ms"), rows), result.origin, page
    )


def _called(case: dict) -> str:
    sizes, bound = case["sizes"], case["lower_bound"]
    return f"H={sizes['HV']} K={sizes['K']} V={sizes['V']} N={sizes['N']} {case['dtype']}, " + (
        "unbounded gate" if bound is None else f"gate above {bound:g}"
    )


def _ceilings(axes, ceilings: dict, shown: list[float]) -> None:
    """Draw what copies and products allow, over FLOPs a byte, beyond all points that are shown."""
    copy = ceilings["copy"]["bytes_per_second"]
    ridges = [x["flops_per_second"] / copy for x in ceilings["matmul"].values()]
    low, high = min(*shown, *ridges) / 2, max(*shown, *ridges) * 2
    for (dtype, product), dash in zip(ceilings["matmul"].items(), ("-", "--", ":", "-.") * 2, strict=False):
        top = product["flops_per_second"]
        xs, ys = [low, top / copy, high], [low * copy / 1e9, top / 1e9, top / 1e9]
        axes.plot(xs, ys, dash, color=style.LIGHT[style.MUTED], label=f"ceiling, {dtype}")


def roofline(result: Result, mode: str) -> Figure | None:
    """Draw the FLOPs that everybody reaches under the ceilings that were measured in the same process."""
    ceilings = result.data["ceilings"]
    points = [
        (floor["flops"] / floor["bytes"], floor["flops"] / x["ms"][mode]["median"] / 1e6, name, case)
        for case in result.data["cases"]
        for name, x in _measured(case, mode).items()
        for floor in (case["floor"],)
    ]
    if not ceilings or not points:
        return None
    names = list(dict.fromkeys(x[2] for x in points))
    looks, copy = _colours(names), ceilings["copy"]["bytes_per_second"]
    with style.drawing():
        page, axes = style.new(3.1)
        _ceilings(axes, ceilings, [x[0] for x in points])
        for name in names:
            colour, marker = looks[name]
            at = [x for x in points if x[2] == name]
            axes.plot([x[0] for x in at], [x[1] for x in at], marker, color=colour, label=name, alpha=0.85)
        style.logarithmic(axes, y=True)
        axes.set(xlabel="least FLOPs / least bytes", ylabel="GFLOP/s")
        style.legend(page, axes)
    title = f"Roofline: useful FLOPs a second under the device's ceilings, {mode}"
    best = max(points, key=lambda x: x[1])
    alt = (
        f"{title}. Copies run at {copy / 1e9:,.0f} GB/s. The highest point is {best[2]} on {best[3]['name']}, "
        f"{best[1]:,.0f} GFLOP/s."
    )
    rows = [(case["name"], name, short(x), short(y)) for x, y, name, case in points]
    rows += [
        ("ceiling", f"products in {dtype}", "", short(x["flops_per_second"] / 1e9))
        for dtype, x in ceilings["matmul"].items()
    ]
    columns = ("case", "implementation", "FLOPs / byte", "GFLOP/s")
    return Figure(f"roofline-{mode}", title, alt, Table.of(columns, rows), result.origin, page)


def cpu_ratios(result: Result) -> Figure | None:
    """Draw how many times longer everybody else takes than ours, on a CPU."""
    cases = result.data["cases"]
    if not cases:
        return None
    names = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    looks = _colours(names)
    with style.drawing():
        page, axes = style.new(0.9 + 0.42 * len(cases))
        for i, name in enumerate(names):
            colour, marker = looks[name]
            at = [(x["ratios"][name], y) for y, x in enumerate(cases) if name in x["ratios"]]
            ys = [y - 0.3 + 0.6 * i / max(1, len(names) - 1) for _, y in at]
            axes.hlines(ys, [x["low"] for x, _ in at], [x["high"] for x, _ in at], color=colour, linewidth=1)
            axes.plot([x["median"] for x, _ in at], ys, marker, color=colour, label=name)
        axes.axvline(1, color=style.LIGHT[style.INK], linewidth=1)
        style.logarithmic(axes)
        axes.set(xlabel="time / ours, in common rounds")
        style.name_rows(axes, [x["name"] for x in cases])
        style.legend(page, axes)
    title = "Prefill and decode on a CPU: how many times longer the others take"
    least = min((x["median"], name, case["name"]) for case in cases for name, x in case["ratios"].items())
    alt = f"{title}; 1 is ours, compiled. The smallest ratio is {short(least[0])}, {least[1]} on {least[2]}."
    rows = [
        (case["name"], name, times(x), times(case["ratios"][name]) if name in case["ratios"] else "")
        for case in cases
        for name, x in case["ms"].items()
    ]
    topics = ("machine", "growth", "memory", "compiling")
    rows += [(topic, name, short(x), "") for topic in topics for name, x in result.data.get(topic, {}).items()]
    return Figure(
        "cpu", title, alt, Table.of(("case", "who", "ms, or as named", "time / ours"), rows), result.origin, page
    )


def benchmarked(result: Result) -> Figure | None:
    """Draw how many times quicker ours is than what was timed beside every benchmark."""
    rows = result.data["rows"]
    shown = [row for row in rows if row["peers"] and not row["rate"]]  # a rate is held against work of another kind
    if not rows:
        return None
    title, page = "Benchmarks: how many times quicker ours is than its first peer", None
    if shown:
        with style.drawing():
            page, axes = style.new(0.7 + 0.25 * len(shown))
            ratios = [row["peers"][0]["ratio"] for row in shown]
            ys = range(len(shown))
            axes.hlines(ys, [x["low"] for x in ratios], [x["high"] for x in ratios], color=style.SERIES[0])
            axes.plot([x["median"] for x in ratios], ys, "o", color=style.SERIES[0])
            axes.axvline(1, color=style.LIGHT[style.INK], linewidth=1)
            style.logarithmic(axes)
            axes.set(xlabel="peer's time / ours")
            style.name_rows(axes, [row["name"] for row in shown])
    said = ", ".join(f"{x['name']}: {short(x['peers'][0]['ratio']['median'])}" for x in shown)
    alt = f"{title}; {plural(len(rows), 'benchmark')}. {said or 'None has a peer.'}"
    cells = [cell for row in rows for cell in _beside(row)]
    columns = ("benchmark", "ours", "peer", "theirs", "ratio")
    return Figure("benchmarks", title, alt, Table.of(columns, cells), result.origin, page)


def _beside(row: dict):
    ours = f"{times(row['ours'])} {row['unit']}"
    if not row["peers"]:
        yield row["name"], ours, "", "", ""
    for peer in row["peers"]:
        yield row["name"], ours, peer["name"], times(peer["theirs"]), times(peer["ratio"])
