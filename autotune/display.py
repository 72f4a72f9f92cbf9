"""What a person sees: the table of times and ratios, and a line for whatever is missing from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autotune.contest import MEASURED
from autotune.judge import told

WIDE = 150
"""Columns where nobody watches: a table folded at 80 cannot be read in a log."""
DISAGREES = 0.05
"""Relative difference from ours behind which two outputs are not the same function in bfloat16."""
NOISY = 0.25
"""Quartiles further apart than this share of the median: something else was running, and a time says little."""
HEADINGS = {"launched": "launched from Python", "graph": "CUDA graph"}


def console() -> Console:
    """Return the terminal, or a wide page where there is none."""
    here = Console()
    return here if here.is_terminal else Console(width=WIDE)


@contextmanager
def progress(page: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar over the cases on a terminal; yields a function of (what is going on, cases finished by it)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=page, transient=True, disable=not page.is_terminal) as bars:
        task = bars.add_task("starting", total=total)
        yield lambda doing, finished=0: bars.update(task, description=escape(doing), advance=finished)


def provenance(data: dict) -> str:
    """Say in two lines what was measured with what."""
    identity, commit = data["identity"], data["git"]
    device = identity["device"]
    versions = ", ".join(f"{name} {x}" for name, x in identity["versions"].items() if x)
    driver = f", driver {device['driver']}" if device["driver"] else ""
    changed = " with changes" if commit and commit["changed"] else ""
    at = f", commit {commit['commit'][:12]}{changed}" if commit else ""
    note = f"\n{escape(data['note'])}" if data["note"] else ""
    text = f"{driver}; {versions}{at}; {data['updated']}"
    return f"[bold]{escape(device['name'])}[/]{escape(text)}{note}"


def ceilings(data: dict) -> str:
    """Say what the floor is counted in."""
    measured = data["ceilings"]
    rates = (f"{name} {x['flops_per_second'] / 1e12:,.3g} TFLOP/s" for name, x in measured["matmul"].items())
    copied = measured["copy"]["bytes_per_second"] / 1e9
    return f"measured ceilings: copy {copied:,.4g} GB/s, matrix product {', '.join(rates)}"


def case_line(case: dict) -> str:
    """Say in one line how a case went."""
    parts = []
    for entry in case["implementations"]:
        times = (f"{mode} {_ms(x['median'])}" for mode, x in entry["ms"].items())
        parts.append(f"{entry['name']} " + (", ".join(times) if entry["ms"] else entry["status"]))
    return f"{case['name']}: {'; '.join(parts)} ({case['seconds']:.0f} s)"


def table(data: dict, cases: list[dict]) -> Table:
    """Build the table: one row per implementation and case, times, ratios to the floor and to each of ours."""
    modes = data["method"]["modes"]
    ours = list(dict.fromkeys(entry["ours"] for case in cases for entry in case["ratios"]))
    page = Table(
        title="median \\[quartiles] in ms; x floor; time over that of ours in the same round (above 1: ours is faster)"
    )
    page.title_justify = "left"
    page.add_column("case, implementation", no_wrap=True)
    for mode in modes:
        page.add_column(f"{HEADINGS[mode]}, ms", justify="right")
        page.add_column("x floor", justify="right")
        for name in ours:
            page.add_column(f"over {escape(name)}", justify="right")
    page.add_column("error", justify="right")
    for case in cases:
        page.add_section()
        page.add_row(f"[bold]{escape(case['name'])}[/]", *_floor(case, len(modes) * (2 + len(ours))), "")
        for entry in case["implementations"]:
            page.add_row(f"  {escape(entry['name'])}", *_cells(case, entry, modes, ours), _error(entry))
    return page


def _floor(case: dict, cells: int) -> list[str]:
    floor = case["floor"]
    bound = "bytes" if floor["bytes_ms"] >= floor["flops_ms"] else "FLOPs"
    return [f"[dim]floor {_ms(floor['ms'])} ({bound})", *[""] * (cells - 1)]


def _cells(case: dict, entry: dict, modes: list[str], ours: list[str]) -> Iterator[str]:
    ratios = {
        (x["ours"], x["mode"]): x["other_over_ours"]["median"] for x in case["ratios"] if x["other"] == entry["name"]
    }
    for mode in modes:
        spread = entry["ms"].get(mode)
        if spread is None:
            status = entry["status"] if entry["status"] != MEASURED else "failed"
            yield from (f"[yellow]{status}[/]", *["-"] * (1 + len(ours)))
            continue
        yield f"{_ms(spread['median'])} [dim]\\[{_ms(spread['low'])}, {_ms(spread['high'])}][/]"
        yield f"{entry['over_floor'][mode]:.2f}"
        yield from (_quotient(ratios.get((name, mode)), name == entry["name"]) for name in ours)


def _quotient(found: float | None, itself: bool) -> str:
    if found is None:
        return "1" if itself else "-"
    return f"[bold {'green' if found > 1 else 'red'}]{found:.2f}"


def _error(entry: dict) -> str:
    if not entry["errors"]:
        return "-"
    worst = _worst(entry)
    return f"{worst:.1e}" if worst <= DISAGREES else f"[bold red]{worst:.1e}"


def _worst(entry: dict) -> float:
    found = [float(x) for outputs in entry["errors"].values() for x in outputs.values()]
    return max(found, key=lambda x: (x != x, x))  # NaN is worse than anything


def _ms(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def remarks(data: dict, cases: list[dict], missing: list[str]) -> Iterator[str]:
    """Say what is not in the table and why, and whose outputs are not ours."""
    for name, verdict in data["verification"].items():
        if verdict["code"]:
            yield f"[bold red]NOT VERIFIED[/] {escape(name)}: {escape(told(verdict))}"
    for entry in data["not_compared"]:
        yield f"not compared: {escape(entry['name'])}: {escape(entry['reason'])}"
    for case in cases:
        for entry in case["implementations"]:
            yield from (f"  {escape(case['name'])}, {escape(entry['name'])}: {line}" for line in _complaints(entry))
    if missing:
        yield f"[yellow]not measured[/] (the time box ran out): {escape(', '.join(missing))}"


def _complaints(entry: dict) -> Iterator[str]:
    if entry["message"] and entry["status"] != "not verified":
        yield f"[yellow]{entry['status']}[/]: {escape(entry['message'])}"
    yield from (f"[yellow]{mode} failed[/]: {escape(message)}" for mode, message in entry["failures"].items())
    for mode, spread in entry["ms"].items():
        if (apart := (spread["high"] - spread["low"]) / spread["median"]) > NOISY:
            yield f"[yellow]noisy[/]: {mode}, quartiles {apart:.0%} of the median apart"
    if entry["errors"] and not _worst(entry) <= DISAGREES:
        yield f"[bold red]OUTPUTS DIFFER[/] from ours by {_worst(entry):.1e}: one of the two is wrong"
