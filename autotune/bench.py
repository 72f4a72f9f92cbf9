"""Compare our implementations with other people's on one device: verified first, then timed in common rounds.

1. python -m verify judges ours on the device; what does not pass is listed, and not timed.
2. Copy bandwidth and matrix rate are measured: the floor under every case.
3. Case by case everybody runs once (compilation and tuning happen there), outputs are compared, and then all are timed
   in common rounds with a cold cache, launched from Python and, on CUDA, replayed from a graph.

Every finished piece is on the disk at once. The same command with the same file goes on where it stopped.
"""

import argparse
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from autotune import display, judge, provenance
from autotune.cases import CASES, Case, selected
from autotune.contest import FAILED as RAISED
from autotune.contest import MEASURED, UNVERIFIED, Entrant, Stage, contest
from autotune.floors import ceilings
from autotune.outcomes import (
    CRASH,
    FAILED,
    MEANINGS,
    NOTHING,
    PASS,
    UNFINISHED,
    BoxOver,
    DeviceLost,
    UsageError,
    worst,
)
from autotune.store import Store, read
from autotune.timing import Box, Stopwatch, stopwatch
from impls.decode_steps import ROWS as STEPS
from impls.devices import slug
from impls.layer_steps import ROWS as LAYERS
from impls.peers import PEERS, installed
from impls.table import IMPLEMENTATIONS, Impl
from impls.training_steps import ROWS as TRAINING
from verify.plan import PROFILES

SUMMARY = "compare our implementations with other people's"
OURS = (*IMPLEMENTATIONS, *STEPS, *LAYERS, *TRAINING)
EPILOG = f"""\
exit code  {"; ".join(f"{code} {meaning}" for code, meaning in list(MEANINGS.items())[:4])};
           {"; ".join(f"{code} {meaning}" for code, meaning in list(MEANINGS.items())[4:])}

examples   python -m autotune bench --device cuda:0 --minutes 20          all cases against all peers installed
           python -m autotune bench --device cuda:0 --cases 't8192-*' --minutes 8
           python -m autotune bench --device cuda:0 --cases 'decode-*,layer-*' --minutes 6
           python -m autotune bench --device cuda:0 --cases 'train-*' --minutes 8     forward and backward
           python -m autotune bench --cases 'small-*' --minutes 5          the same code on the CPU
           python -m autotune bench --show results/FILE.json               print the table of a file again
"""


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    device: str
    minutes: float
    cases: tuple[Case, ...]
    names: tuple[str, ...] | None
    """Implementations to time, None for all."""
    profile: str
    out: Path
    fresh: bool
    note: str | None

    @property
    def kind(self) -> str:
        """Return cpu or cuda."""
        return self.device.split(":")[0]

    @property
    def dtype(self) -> str:
        """Return the dtype of the inputs: CPUs without bfloat16 units would time its emulation."""
        return "float32" if self.kind == "cpu" else "bfloat16"

    def listed(self, row: Impl) -> bool:
        """Say whether a row is asked for."""
        return self.names is None or row.name in self.names

    def ours(self, case: Case) -> list[Impl]:
        """Return the rows of ours that a case is for."""
        asked = {"device": self.kind, "dtype": self.dtype, "K": case.K, "V": case.V}
        rows = OURS if case.initial or case.training else IMPLEMENTATIONS
        rows = (row for row in rows if row.form in case.forms and row.supports(**asked) is None)
        return [row for row in rows if self.listed(row)]

    def peers(self, case: Case) -> list[Impl]:
        """Return the rows of other people that can run on the device, of the forms that a case is for."""
        rows = (row for row in installed() if self.kind in row.devices and row.form in case.forms)
        return [row for row in rows if self.listed(row)]

    def absent(self) -> list[dict[str, str]]:
        """Say who is not compared, and why."""
        reasons, here = {}, {row.name for row in installed()}
        for package, rows in PEERS.items():
            for row in filter(self.listed, rows):
                if self.kind not in row.devices:
                    reasons[row.name] = f"runs on {', '.join(row.devices)}, not on {self.device}"
                elif row.name not in here:
                    reasons[row.name] = f"the package {package} is not installed"
        return [{"name": name, "reason": reason} for name, reason in reasons.items()]


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--device", default="cpu", help="cpu or cuda:N; default cpu")
    p.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="time box (default 10); a call that runs is ended by nothing, so it is overrun by one",
    )
    p.add_argument("--cases", metavar="GLOB,...", help="only cases of these names (--list); default all but small-*")
    names = "only these, ours and peers (--list); default all that run on the device"
    p.add_argument("--implementations", metavar="NAME,...", help=names)
    profile = "profile of python -m verify that ours must pass first (default quick)"
    p.add_argument("--profile", choices=PROFILES, default="quick", help=profile)
    p.add_argument("--out", type=Path, metavar="FILE", help="file of results (default results/bench-DEVICE-DATE.json)")
    p.add_argument("--fresh", action="store_true", help="begin the file anew, whatever it holds")
    p.add_argument("--note", metavar="TEXT", help="kept with the results: what a reader must know of the machine")
    p.add_argument("--list", action="store_true", help="list cases and implementations")
    p.add_argument(
        "--show", type=Path, metavar="FILE", help="print the table of a file of results, and measure nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    page = display.console()
    if args.list:
        return _list(page)
    if args.show:
        data = read(args.show)
        _show(page, data, data["cases"], [])
        return PASS
    return _bench(_options(args), page)


def _options(args: argparse.Namespace) -> Options:
    provenance.check_device(args.device)
    if not 0 < args.minutes < 1e6:
        raise UsageError(f"--minutes must be positive, got {args.minutes:g}")
    device = provenance.described(args.device)
    today = datetime.date.today().isoformat()
    return Options(
        device=args.device,
        minutes=args.minutes,
        cases=selected(args.cases),
        names=_names(args.implementations),
        profile=args.profile,
        out=args.out or Path("results") / f"bench-{slug(device['name'])}-{today}.json",
        fresh=args.fresh,
        note=args.note,
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    known = [row.name for row in (*OURS, *(row for rows in PEERS.values() for row in rows))]
    names = tuple(x for x in text.split(",") if x)
    if unknown := [x for x in names or [text] if x not in known]:
        raise UsageError(f"--implementations {', '.join(unknown)}: known are {', '.join(known)}")
    return names


def _bench(options: Options, page: Console) -> int:
    box = Box(options.minutes * 60)
    watch = stopwatch(options.device)
    store = Store.open(options.out, _header(options, watch), options.fresh)
    store.keep("not_compared", options.absent())
    codes = set()
    try:
        _verify(options, store, box)
        _measure(options, store, box, watch, page)
    except BoxOver:
        codes.add(UNFINISHED)
    except DeviceLost as lost:
        page.print(f"[bold red]DEVICE LOST[/]: {lost}; the same command goes on without it", soft_wrap=True)
        codes.add(CRASH)
    except KeyboardInterrupt:
        store.rests()
        raise
    store.rests()
    named = [store.case(case.name) for case in options.cases]
    cases = [case for case in named if case]
    _show(page, store.data, cases, [case.name for case in options.cases if store.case(case.name) is None])
    page.print(f"results: {options.out}", markup=False, soft_wrap=True)
    return worst(codes | {_code(case) for case in cases})


def _header(options: Options, watch: Stopwatch) -> dict:
    effort = watch.effort
    return {
        "identity": {
            "device": provenance.described(options.device),
            "versions": provenance.versions(),
            "sources": provenance.sources(),
            "profile": options.profile,
            "implementations": None if options.names is None else sorted(options.names),
            "environment": provenance.environment(),
        },
        "git": provenance.git(),
        "method": {
            "flushed_bytes": watch.flushed_bytes,
            "least_rounds": effort.least,
            "most_rounds": effort.most,
            "seconds": effort.seconds,
            "modes": list(watch.modes),
        },
        "note": options.note,
    }


def _verify(options: Options, store: Store, box: Box) -> None:
    """Have ours judged, those that the unfinished cases need and that no earlier run has judged."""
    unfinished = [case for case in options.cases if store.case(case.name) is None]
    needed = dict.fromkeys(_judged(row) for case in unfinished for row in options.ours(case))
    known = store.data["verification"]
    names = [name for name in needed if name not in known]
    if names:
        box.check()
        store.keep("verification", known | judge.verified(names, options.device, options.profile, box))


def _judged(row: Impl) -> str:
    """Return the name under which ours is judged: of a layer's step that of its core."""
    return getattr(row, "judged", None) or row.name


def _measure(options: Options, store: Store, box: Box, watch: Stopwatch, page: Console) -> None:
    unfinished = [case for case in options.cases if store.case(case.name) is None]
    if not unfinished:
        return
    with display.progress(page, len(unfinished)) as show:
        if store.data["ceilings"] is None:
            show("ceilings")
            box.check()
            store.keep("ceilings", ceilings(options.device, watch))
        for case in unfinished:
            box.check()
            record = _contest(case, options, store, box, watch, show)
            store.add_case(record)
            show(case.name, 1)
            page.print(display.case_line(record), markup=False, highlight=False, soft_wrap=True)


def _contest(
    case: Case, options: Options, store: Store, box: Box, watch: Stopwatch, show: Callable[[str], None]
) -> dict:
    def begins(name: str | None) -> None:
        show(f"{case.name}: {name or 'racing'}")
        if name:
            store.begins(case.name, name)
        else:
            store.rests()

    stage = Stage(options.device, options.dtype, watch, store.data["ceilings"], box, begins)
    try:
        return contest(case, _entrants(case, options, store), stage)
    except DeviceLost as lost:
        store.lost(case.name, lost.implementation, str(lost))
        raise


def _entrants(case: Case, options: Options, store: Store) -> list[Entrant]:
    def entrant(row: Impl, ours: bool) -> Entrant:
        reason = judge.refusal(store.data["verification"].get(_judged(row))) if ours else None
        refused = (UNVERIFIED, reason) if reason else None
        if casualty := store.casualty(case.name, row.name):
            refused = (RAISED, casualty)
        return Entrant(row, ours, refused)

    return [entrant(row, True) for row in options.ours(case)] + [entrant(row, False) for row in options.peers(case)]


def _code(case: dict) -> int:
    entries = case["implementations"]
    if any(entry["ours"] and entry["status"] != MEASURED for entry in entries):
        return FAILED
    return PASS if any(entry["ms"] for entry in entries) else NOTHING


def _show(page: Console, data: dict, cases: list[dict], missing: list[str]) -> None:
    page.print(display.provenance(data), soft_wrap=True, highlight=False)
    if data["ceilings"]:
        page.print(display.ceilings(data), soft_wrap=True, highlight=False)
    if cases:
        page.print(display.table(data, cases))
    for line in display.remarks(data, cases, missing):
        page.print(line, soft_wrap=True, highlight=False)


def _list(page: Console) -> int:
    page.print("[bold]cases")
    for case in CASES:
        apart = "" if case.always else "; only when named"
        page.print(f"  {case.name:28} {case.summary}{apart}", markup=False, highlight=False, soft_wrap=True)
    page.print("[bold]implementations")
    here = {row.name for row in installed()}
    peers = [(row, "" if row.name in here else "; not installed") for rows in PEERS.values() for row in rows]
    for row, apart in [*((row, "") for row in OURS), *peers]:
        text = f"  {row.name:18} {', '.join(row.devices):16} {row.summary}{apart}"
        page.print(text, markup=False, highlight=False, soft_wrap=True)
    return PASS
