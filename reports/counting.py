"""Figures of what needs no GPU: KDA held against general DPLR, and what the compiler makes of every kernel."""

from dataclasses import replace

from reports import style
from reports.figure import Figure, Table, short, times
from reports.load import COMPILE, Result
from reports.verification import grid, square

BYTES = 1 << 10


def yardsticks(results: list[Result]) -> list[Figure]:
    """Return the figure of every yardstick."""
    found = (x for x in results if x.kind == "yardstick" and x.data["counted"])
    return [replace(yardstick(x), name=f"yardstick-{i}") for i, x in enumerate(found, 1)]


def yardstick(result: Result) -> Figure:
    """Draw FLOPs, bytes and time of general DPLR over KDA's, over the number of tokens."""
    data = result.data
    counted, timed = data["counted"], data["timed"]
    with style.drawing():
        page, axes = style.new(2.8)
        for i, of in enumerate(("flops", "bytes")):
            name = f"{'FLOPs' if of == 'flops' else of}, counted"
            at = [(x["T"], x[of]["dplr_over_kda"]) for x in counted]
            axes.plot([x for x, _ in at], [y for _, y in at], "sD"[i] + "--", color=style.SERIES[i + 1], label=name)
        if timed:
            over = [x["dplr_over_kda"] for x in timed]
            gap = [[x["median"] - x["low"] for x in over], [x["high"] - x["median"] for x in over]]
            axes.errorbar(
                [x["T"] for x in timed], [x["median"] for x in over], gap, fmt="o-", color=style.SERIES[0], capsize=3,
                label="time, measured",
            )  # fmt: skip
        axes.axhline(1, color=style.LIGHT[style.INK], linewidth=1)
        style.logarithmic(axes)
        axes.set(xlabel="tokens", ylabel="general DPLR / KDA", ylim=(0, None))
        axes.set_xticks(
            [x["T"] for x in counted], [f"{x['T'] // 1024}k" if x["T"] >= 1024 else x["T"] for x in counted]
        )
        axes.minorticks_off()
        style.legend(page, axes, 3)
    title = f"General DPLR over KDA, {data['heads']} heads of 128"
    last = timed[-1] if timed else None
    flops, moved = (short(counted[-1][of]["dplr_over_kda"]) for of in ("flops", "bytes"))
    time = f"{short(last['dplr_over_kda']['median'])} times at {last['T']:,} tokens" if last else "not measured"
    alt = f"{title}: FLOPs {flops} times, bytes {moved} times, time {time}."
    clock = {x["T"]: x for x in timed}
    rows = [
        (f"{x['T']:,}", short(x["flops"]["dplr_over_kda"]), short(x["bytes"]["dplr_over_kda"]),
         f"{x['launches']['dplr']} / {x['launches']['kda']}", *_clocked(clock.get(x["T"])))
        for x in counted
    ]  # fmt: skip
    columns = ("tokens", "FLOPs", "bytes", "launches", "KDA ms", "DPLR ms", "DPLR / KDA")
    return Figure("yardstick", title, alt, Table.of(columns, rows), result.origin, page)


def _clocked(x: dict | None) -> tuple[str, str, str]:
    if x is None:
        return ("not timed",) * 3
    return short(x["ms"]["kda"]["median"]), short(x["ms"]["dplr"]["median"]), times(x["dplr_over_kda"])


def compiled(results: list[Result]) -> list[Figure]:
    """Return the figure of every compile report."""
    found = [x for x in results if x.kind == COMPILE and x.data["rows"]]
    return [replace(registers(x), name=f"compile-{i}") for i, x in enumerate(found, 1)]


def registers(result: Result) -> Figure:
    """Draw kernel x target, registers in the cells, coloured by what went wrong."""
    rows = result.data["rows"]
    targets = list(dict.fromkeys(x["target"] for x in rows))
    kernels = list(dict.fromkeys(f"{x['kernel']}, K={x['K']}" for x in rows))
    with style.drawing():
        page, axes = style.new(1.0 + 0.24 * len(kernels), max(style.WIDTH, 1.3 + 0.7 * len(targets)))
        for x in rows:
            at = targets.index(x["target"]), kernels.index(f"{x['kernel']}, K={x['K']}")
            square(axes, *at, style.LIGHT[_colour(x)], str(x["resources"]["registers"]) if x["resources"] else "no")
        grid(axes, targets, kernels)
    spilled = [f"{x['kernel']} on {x['target']} at K={x['K']}" for x in rows if x["spilled"]]
    failed = [f"{x['kernel']} on {x['target']} at K={x['K']}" for x in rows if x["failed"]]
    title = f"Registers of each kernel in {result.data['dtype']}, compiled ahead of time"
    alt = (
        f"{title}: {len(rows)} kernels. "
        + (f"Spilling: {', '.join(spilled)}. " if spilled else "None spills. ")
        + (f"Failing: {', '.join(failed)}." if failed else "None fails.")
    )
    columns = ("target", "kernel", "K", "registers", "spilled bytes", "shared KiB of", "instructions", "trouble")
    return Figure("compile", title, alt, Table.of(columns, map(_row, rows)), result.origin, page, wide=len(targets) > 6)


def _colour(row: dict) -> str:
    return "bad" if row["failed"] else "warn" if row["spilled"] else "level-1"


def _row(x: dict) -> tuple:
    limit, found = f"{x['shared_memory_limit'] / BYTES:.0f}", x["resources"]
    trouble = x["error"] or ("spills" if x["spilled"] else "" if x["fits"] else "does not fit")
    if found is None:
        return x["target"], x["kernel"], x["K"], "-", "-", f"- of {limit}", "-", trouble
    shared = f"{found['shared_memory'] / BYTES:.1f} of {limit}"
    return (
        x["target"],
        x["kernel"],
        x["K"],
        found["registers"],
        found["stack"],
        shared,
        found["code"]["instructions"],
        trouble,
    )
