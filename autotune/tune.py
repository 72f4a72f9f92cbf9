"""Choose the launch configuration of an operation on this machine, and write it where the operation finds it.

1. Points that cannot run, or would run the same, are left out (python -m autotune space).
2. Candidates that Optuna proposes are compared with the default's outputs, then timed beside it in common rounds.
3. The quickest race the default in a new process; what cannot be told from it, or gains less than 1%, does not win.
4. python -m verify judges the winner, with exactly this configuration; one that fails is passed over for the next.

Every trial is on the disk when it ends: after Ctrl-C or a crash the same command goes on. --budget bounds 2; the race
takes half a minute more, the judge 15 seconds, or a minute for what is compiled.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from autotune import clock, display, judge, provenance, replay, tuned_files
from autotune.arguments import DTYPES, fixed_of, seconds_of
from autotune.cases import Case
from autotune.outcomes import FAILED, PASS, BoxOver, UsageError
from autotune.replay import Recorded
from autotune.search import MEASURED, Outcome, Search
from autotune.space import Setting, Space, space_of
from autotune.store import now
from autotune.timing import Box
from impls import tuned
from impls.devices import named, slug
from impls.plan import Problem
from impls.table import IMPLEMENTATIONS, Impl
from verify.session import PASS as VERIFIED

SUMMARY = "choose the configuration of an operation on this machine"
OPS = {"chunk_kda": "chunk", "fused_recurrent_kda": "recurrent"}
"""Public operation -> form of the implementations behind it."""
WITHIN, FINALISTS = 0.10, 5
PROFILE = "tune"
EPILOG = """\
exit code  0 tuned, or the default stays; 1 nothing passed verification; 2 usage; 130 interrupted

examples   python -m autotune tune --op chunk_kda --tokens 4096 --heads 16 --budget 120s
           python -m autotune tune --op chunk_kda --fix compile=false --budget 60s
           KDA_CONFIG_DIR=. python -m autotune tune --out . ...           keep the file elsewhere, and use it
"""


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    implementation: Impl
    device: str
    case: Case
    dtype: str
    seconds: float
    fixed: dict[str, object]
    out: Path
    name: str
    """The device's name, or the one that the file is written for."""
    default_row: bool
    seed: int
    trials: int | None
    """At most so many new trials."""
    fresh: bool
    json: bool
    replay: Recorded | None

    @property
    def default(self) -> object:
        """Return the configuration that a call has which nothing was tuned for."""
        return self.replay.default if self.replay else self.implementation.config(**self.fixed)

    @property
    def about(self) -> dict:
        """Describe the device that times are of."""
        return self.replay.device if self.replay else named(self.device)

    @property
    def origin(self) -> dict:
        """Return the provenance of the times."""
        return self.replay.provenance if self.replay else _provenance()

    @property
    def shape(self) -> tuned.Shape:
        """Return the shape in the terms of a lookup."""
        sizes = self.case.sizes
        return tuned.Shape(sizes.T, sizes.N, sizes.HV, sizes.K, sizes.V, self.dtype, self.case.lengths is not None)

    @property
    def problem(self) -> Problem:
        """Return the shape in the terms of a plan."""
        s = self.case.sizes
        return Problem(
            B=s.B, T=s.T, N=s.N, H=s.H, HV=s.HV, K=s.K, V=s.V, dtype=self.dtype, packed=self.case.lengths is not None
        )


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    names = [*OPS, *(row.name for row in IMPLEMENTATIONS)]
    p.add_argument("--op", default="chunk_kda", metavar="NAME", help=f"{', '.join(names)}; default %(default)s")
    p.add_argument("--device", default="cpu", help="cpu, the only one so far")
    p.add_argument("--tokens", type=int, default=4096, metavar="T", help="tokens of a sequence (default %(default)s)")
    p.add_argument("--heads", type=int, default=16, metavar="H", help="default %(default)s")
    p.add_argument("--sequences", type=int, default=1, metavar="N", help="batch size (default %(default)s)")
    p.add_argument("--head-dim", type=int, default=128, metavar="K", help="K = V (default %(default)s)")
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="default %(default)s")
    p.add_argument("--budget", default="120s", metavar="N[s|m]", help="time for the search (default %(default)s)")
    fixed = "do not search this field; may be repeated"
    p.add_argument("--fix", action="append", default=[], metavar="FIELD=VALUE", help=fixed)
    p.add_argument("--out", type=Path, metavar="FOLDER", help="folder of tuned files (default the user's cache)")
    p.add_argument("--as", dest="name", metavar="DEVICE", help="write the file for a device of this name")
    row = "let what is chosen be the row for all other shapes of the file, too"
    p.add_argument("--default-row", action="store_true", help=row)
    p.add_argument("--seed", type=int, default=0, help="of the search (default %(default)s)")
    p.add_argument("--trials", type=int, metavar="N", help="at most so many new trials")
    p.add_argument("--record", type=Path, metavar="TABLE", help="write all trials of the study to a file")
    played = "take every time from a recorded table, which says the shape as well; with --out"
    p.add_argument("--replay", type=Path, metavar="TABLE", help=played)
    p.add_argument("--fresh", action="store_true", help="forget the trials of earlier runs")
    p.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    options, page = _options(args), display.console()
    page.quiet = options.json
    path = tuned.path_of(options.out, options.implementation.name, options.name)
    tuned_files.opened(path)
    tuned_files.check_writable(path)
    space = space_of(options.implementation, Setting(options.problem), options.fixed)
    search, timer = _search(options, space), options.replay or _clock(options)
    _searched(search, timer, options, page)
    if args.record:
        _record(options, search, args.record)
    page.print("the quickest race the default in a new process")
    # what is in use comes first: within a tie it stays
    standings = timer.raced(list(dict.fromkeys((*_in_use(options, space), *search.best(WITHIN, FINALISTS)))))
    winner, verdict = _verified(options, standings, page)
    if winner is None:
        page.print("[bold red]nothing passed verification[/]: no file was written", soft_wrap=True)
        return FAILED
    entry = _entry(options, winner, standings, verdict, len(search.outcomes))
    kept = tuned_files.save(path, _file(options, entry))["entries"]
    _told(options, page, entry, path, search, entry in kept)
    return PASS


def _options(args: argparse.Namespace) -> Options:
    if args.device != "cpu":
        raise UsageError(f"--device must be cpu: GPUs are not tuned yet, got {args.device}")
    for name in ("tokens", "heads", "sequences", "head_dim"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.head_dim > 256:
        raise UsageError(f"--head-dim must be at most 256, got {args.head_dim}")
    if args.replay and not args.out:
        raise UsageError("--replay needs --out FOLDER: what was measured elsewhere is not for this machine")
    table = Recorded(args.replay) if args.replay else None
    implementation = _implementation(table.implementation if table else args.op, args.device)
    K = args.head_dim
    case = _case(table.shape) if table else Case("tune", args.sequences, args.tokens, args.heads, K, K)
    return Options(
        implementation=implementation,
        device=args.device,
        case=case,
        dtype=table.shape.dtype if table else args.dtype,
        seconds=seconds_of(args.budget, "--budget"),
        fixed=dict(fixed_of(x) for x in args.fix),
        out=args.out or tuned.user_folder(),
        name=args.name or (table.device if table else named(args.device))["name"],
        default_row=args.default_row,
        seed=args.seed,
        trials=args.trials,
        fresh=args.fresh,
        json=args.json,
        replay=table,
    )


def _case(shape: tuned.Shape) -> Case:
    return Case("replay", shape.N, shape.T, shape.HV, shape.K, shape.V)


def _implementation(op: str, device: str) -> Impl:
    rows = [row for row in IMPLEMENTATIONS if device in row.devices and op in (row.name, _op_of(row))]
    if not rows:
        known = [*OPS, *(row.name for row in IMPLEMENTATIONS if device in row.devices)]
        raise UsageError(f"--op must be one of {', '.join(known)} on {device}, got {op}")
    return rows[0]


def _op_of(row: Impl) -> str:
    return next(op for op, form in OPS.items() if form == row.form)


def _search(options: Options, space: Space) -> Search:
    """Open the study of this device, shape, space and these sources; its first points are those in use."""
    shape = "-".join(str(x).lower() for x in options.shape)
    where = f"{slug(named(options.device)['name'])}-{torch.__version__}-{torch.get_num_threads()}"
    name = f"{where}-{space.implementation}-{shape}-{space.fingerprint}"
    folder = options.out / "replayed" if options.replay else tuned.user_folder().with_name("studies")
    path = folder / f"{name}-{provenance.kernels()}.journal"
    if options.fresh:
        path.unlink(missing_ok=True)
    first = (options.default, *_in_use(options, space))
    return Search(space, path, name, options.seed, tuple(x for x in first if space.admits(x)))


def _in_use(options: Options, space: Space) -> list[object]:
    """Return the configuration that a call of this shape runs with now, if the search covers it."""
    found = None if options.replay else tuned.looked_up(space.implementation, options.device, options.shape)
    return [found.config] if found and space.admits(found.config) else []


def _clock(options: Options) -> clock.Clock:
    bench = clock.Bench(
        options.implementation.name, options.case, options.dtype, options.device, torch.get_num_threads()
    )
    return clock.Clock(bench, options.default, Box(options.seconds))


def _searched(search: Search, timer: clock.Clock | Recorded, options: Options, page: Console) -> None:
    """Try configurations until the box is over, everything is known, or the trials that were asked for are done."""
    known, timer.box = len(search.outcomes), Box(options.seconds)
    page.print(f"{len(search.points)} points, {known} known from earlier runs", highlight=False)
    most = len(search.points) if options.trials is None else known + options.trials
    with display.progress(page, len(search.points)) as show:
        show("searching", known)
        while timer.box.left and len(search.outcomes) < most and (config := search.next(timer.box.left)) is not None:
            show(_short(config, timer), 0)
            try:
                outcome = timer.outcome(config)
            except BoxOver:
                break
            search.tell(config, outcome)
            show(_best(search), 1)
            page.print(_line(config, outcome), markup=False, highlight=False, soft_wrap=True)


def _record(options: Options, search: Search, path: Path) -> None:
    made = options.implementation.name, options.shape, options.default, search.outcomes, options.origin, options.about
    replay.save(path, replay.recorded(*made))


def _short(config, timer: clock.Clock | Recorded) -> str:
    return f"{timer.box.left:.0f} s left: {', '.join(str(x) for x in asdict(config).values())}"


def _best(search: Search) -> str:
    best = search.best(0, 1)
    return f"best {search.outcomes[best[0]].ratio.median:.2f} of the default" if best else "nothing measured yet"


def _line(config, outcome: Outcome) -> str:
    told = _told_config(asdict(config))
    if outcome.status != MEASURED:
        return f"  {outcome.status:8} {told}: {outcome.message}"
    return f"  {outcome.ratio.median:8.3f} {told}: {outcome.ms.median:.2f} ms"


def _verified(options: Options, standings: list[clock.Standing], page: Console) -> tuple[clock.Standing | None, dict]:
    """Return the first choice that verify lets pass, and its verdict; behind one that fails the others are ranked anew.

    Where the default itself fails nobody is chosen: then more is wrong than a configuration.
    """
    row, K = options.implementation.name, options.case.K
    while standings:
        standing = clock.ranked(standings)[0]
        page.print(f"python -m verify judges {_told_config(asdict(standing.config))}", soft_wrap=True, markup=False)
        verdict = judge.verified_config(row, standing.config, options.device, PROFILE, (K,), page.quiet)
        if verdict["code"] == VERIFIED:
            return standing, verdict
        page.print(f"[red]not chosen[/]: {escape(judge.told(verdict))}", soft_wrap=True)
        standings = [x for x in standings if x is not standing] if standing is not standings[0] else []
    return None, {}


def _told_config(config: dict) -> str:
    return ", ".join(f"{name}={x}" for name, x in config.items())


def _entry(options: Options, winner: clock.Standing, standings: list, verdict: dict, trials: int) -> dict:
    tied = [
        asdict(x.config)
        for x in standings
        if x is not winner and abs(x.over_default.median / winner.over_default.median - 1) <= clock.TIE
    ]
    return {
        "shape": options.shape._asdict(),
        "config": asdict(winner.config),
        "provenance": options.origin,
        "verified": {"profile": PROFILE, "outcome": verdict["outcome"], "counts": verdict["counts"]},
        "timing": {
            "ms": winner.ms.to_json(),
            "over_default": winner.over_default.to_json(),
            "ties": tied,
            "noise": winner.config == options.default,
            "default": asdict(options.default),
            "trials": trials,
            "load": os.getloadavg()[0],
        },
    }


def _provenance() -> dict:
    return {
        "versions": provenance.versions(("torch", "triton")),
        "sources": provenance.kernels(),
        "date": now(),
        "git": provenance.git(),
        "environment": provenance.environment() | {"threads": str(torch.get_num_threads())},
    }


def _file(options: Options, entry: dict) -> dict:
    return {
        "schema": 1,
        "kind": "tuned",
        "implementation": options.implementation.name,
        "device": options.about | {"name": options.name},
        "provenance": entry["provenance"],
        "entries": [entry],
        "default": entry["config"] if options.default_row else None,
    }


def _told(options: Options, page: Console, entry: dict, path: Path, search: Search, kept: bool) -> None:
    timing = entry["timing"]
    if options.json:
        print(json.dumps({"path": str(path), "trials": timing["trials"], "kept": kept, "entry": entry}, indent=1))
        return
    gain = {name: 1 / x for name, x in timing["over_default"].items() if name != "count"}
    what = f"{gain['median']:.2f} times as fast as the default ({gain['high']:.2f} to {gain['low']:.2f})"
    what = "nothing is quicker beyond noise, the default stays" if timing["noise"] else what
    page.print(f"[bold]{escape(_told_config(entry['config']))}[/]: {what}", soft_wrap=True, highlight=False)
    done = f"written: {path}" if kept else f"not written: a better entry of this shape stays in {path}"
    page.print(f"{len(search.outcomes)} of {len(search.points)} points tried; {done}", soft_wrap=True, markup=False)
