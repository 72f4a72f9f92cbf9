"""Choose the launch configuration of an operation on this machine, and write it where the operation finds it.

1. Points that cannot run, or would run the same, are left out (python -m autotune space).
2. For a GPU candidates are compiled first: what spills or does not fit is out (python -m autotune static).
3. Candidates are compared with the default's outputs, then timed beside it in common rounds.
4. The quickest race the default in a new process; what cannot be told from it, or gains less than 1%, does not win.
5. python -m verify judges the winner, with exactly this configuration; one that fails is passed over for the next.

Every trial is on the disk when it ends: after Ctrl-C or a crash the same command goes on. --budget bounds 2 and 3 for
one shape; the race takes half a minute more, the judge 20 seconds, or a minute for what is compiled. --minutes bounds
everything: what has no result yet comes first, and the same command goes on with the rest.
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from autotune import display, fleet, provenance, replay, screening, study, tasks, tuned_files
from autotune.arguments import seconds_of
from autotune.outcomes import FAILED, PASS, UNFINISHED, UsageError, worst
from autotune.search import Search, forget
from autotune.study import Choice
from autotune.tasks import Task
from autotune.timing import Box
from impls import tuned
from impls.estimate import RATES
from verify.cluster import Pool

SUMMARY = "choose the configuration of an operation on this machine"
BUDGET = "120s"
AFTER = 60.0
"""Seconds of a time box that the race and the judge of one shape take; 30 and 25 were measured on two cores."""
LEAST = 5.0
"""Seconds of search below which a shape is not begun."""
EPILOG = """\
exit code  0 tuned, or the default stays; 1 nothing passed verification; 2 usage; 7 --minutes were over before every
           shape was begun; 130 interrupted

examples   python -m autotune tune --op chunk_kda --tokens 4096 --heads 16 --budget 120s
           python -m autotune tune --op chunk_kda --fix compile=false --budget 60s
           python -m autotune tune --device cuda:0 --op all --preset kimi-linear-48b --minutes 8
           python -m autotune tune --storage postgresql+psycopg://me@host/db ...     the same in every worker
           python -m autotune tune --scheduler tcp://host:8786 ...                   on every worker of a dask cluster
           KDA_CONFIG_DIR=. python -m autotune tune --out . ...           keep the file elsewhere, and use it
"""


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    tasks: tuple[Task, ...]
    seconds: float | None
    """Of search for one shape; None where the whole time is shared out."""
    minutes: float | None
    out: Path
    name: str | None
    """The device that files are written for, None for this one."""
    default_row: bool
    seed: int
    trials: int | None
    """At most so many new trials of a shape."""
    fresh: bool
    json: bool
    record: Path | None
    storage: str | None
    """URL of what keeps the trials, None for a journal in the user's cache."""

    def path(self, task: Task) -> Path:
        """Return the file that a task's entry goes to."""
        return tuned.path_of(self.out, task.implementation.name, self.name or task.about["name"])


@dataclass
class Run:
    """What a run has so far: its studies, verdicts and results, and what it may still take."""

    options: Options
    page: Console
    box: Box | None
    stack: ExitStack
    pool: Pool | None
    compilers: object | None = None
    searches: dict[str, list[Search]] = field(default_factory=dict)
    verdicts: dict = field(default_factory=dict)
    results: list[dict] = field(default_factory=list)

    def seconds(self, left: int) -> float:
        """Return the seconds of search for the next of so many shapes."""
        return self.options.seconds or max(0.0, self.box.left / left - AFTER)


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    tasks.configure(p)
    time = p.add_mutually_exclusive_group()
    time.add_argument("--budget", metavar="N[s|m]", help=f"time for the search of one shape (default {BUDGET})")
    time.add_argument("--minutes", type=float, metavar="N", help="time for everything, shared out over the shapes")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="folder of tuned files (default the user's cache)")
    p.add_argument("--as", dest="name", metavar="DEVICE", help="write the file for a device of this name")
    row = "let what is chosen be the row for all other shapes of the file, too; of several shapes the least bad for all"
    p.add_argument("--default-row", action="store_true", help=row)
    p.add_argument("--seed", type=int, default=0, help="of the search (default %(default)s)")
    p.add_argument("--trials", type=int, metavar="N", help="at most so many new trials of a shape")
    p.add_argument("--record", type=Path, metavar="TABLE", help="write all trials of the study to a file")
    played = "take every time from a recorded table, which says the shape as well; with --out"
    p.add_argument("--replay", type=Path, metavar="TABLE", help=played)
    shared = "keep the trials there, for all workers that are given it: postgresql+psycopg://..., redis://..., journal:///..."
    p.add_argument("--storage", metavar="URL", help=shared)
    measured = "measure on the workers of this dask scheduler, all at once; the race and the judge stay here"
    p.add_argument("--scheduler", metavar="ADDRESS", help=measured)
    p.add_argument("--fresh", action="store_true", help="forget the trials of earlier runs")
    p.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    options, page = _options(args), display.console()
    page.quiet = options.json
    for task in options.tasks:
        tuned_files.opened(options.path(task))
        tuned_files.check_writable(options.path(task))
    todo = sorted(options.tasks, key=lambda task: _has_entry(options, task))
    with ExitStack() as stack:
        pool = stack.enter_context(fleet.joined(args.scheduler)) if args.scheduler else None
        now = Run(options, page, Box(options.minutes * 60) if options.minutes else None, stack, pool)
        codes = set()
        while todo and now.seconds(len(todo)) >= (0 if options.seconds else LEAST):
            task = todo.pop(0)
            codes.add(_tuned(task, now, now.seconds(len(todo) + 1)))
    return _ended(now, todo, codes)


def _options(args: argparse.Namespace) -> Options:
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise UsageError(f"--minutes must be positive, got {args.minutes:g}")
    if args.scheduler and args.replay:
        raise UsageError("--scheduler measures, --replay takes every time from a table: expected one of them")
    found = tasks.tasks_of(args)
    if args.record and len(found) > 1:
        raise UsageError(f"--record keeps the trials of one shape, {len(found)} are asked for")
    return Options(
        tasks=found,
        seconds=None if args.minutes else seconds_of(args.budget or BUDGET, "--budget"),
        minutes=args.minutes,
        out=args.out or tuned.user_folder(),
        name=args.name,
        default_row=args.default_row,
        seed=args.seed,
        trials=args.trials,
        fresh=args.fresh,
        json=args.json,
        record=args.record,
        storage=args.storage,
    )


def _has_entry(options: Options, task: Task) -> bool:
    """Tell whether the file has an entry of this shape that these kernels gave."""
    there = tuned_files.opened(options.path(task)) or {"entries": []}
    shape, sources = task.shape._asdict(), provenance.kernels()
    return any(x["shape"] == shape and x["provenance"]["sources"] == sources for x in there["entries"])


def _tuned(task: Task, now: Run, seconds: float) -> int:
    """Tune one task and write its entry; returns the exit code."""
    options, page = now.options, now.page
    page.print(f"[bold]{escape(str(task))}", soft_wrap=True, highlight=False)
    with study.timer_of(task, now.pool) as timer:
        search = _search(task, now, timer)
        study.searched(search, timer, seconds, options.trials, page)
        if options.record:
            made = task.implementation.name, task.shape, task.default, search.outcomes, task.origin, task.about
            replay.save(options.record, replay.recorded(*made))
        choice = study.chosen(task, search, timer, page, now.verdicts)
    if choice is None:
        page.print("[bold red]nothing passed verification[/]: no file was written", soft_wrap=True)
        return FAILED
    now.searches.setdefault(task.implementation.name, []).append(search)
    entry, path = choice.entry(task), options.path(task)
    kept = entry in tuned_files.save(path, _file(task, now, entry, choice))["entries"]
    now.results.append({"path": str(path), "trials": choice.trials, "kept": kept, "entry": entry})
    _told(page, now.results[-1], search)
    return PASS


def _search(task: Task, now: Run, timer: study.Timer) -> Search:
    """Open the study of a task; its first points are the default, those in use, and what won for other shapes."""
    options, path = now.options, study.path_of(task, now.options.out)
    if options.fresh:
        forget(path, path.stem, options.storage)
    winners = [best for x in now.searches.get(task.implementation.name, []) for best in x.best(0, 1)]
    first = [x for x in (task.default, *study.in_use(task), *winners) if task.space.admits(x)]
    known, screen = tuple(dict.fromkeys(first)), _screen(task, now, timer)
    return Search(task.space, path, path.stem, options.seed, known, screen, options.storage)


def _screen(task: Task, now: Run, timer: study.Timer):
    """Return the compiler's stage for what runs on a GPU whose rates are known, None elsewhere."""
    target = task.setting.target
    if target is None or target.name not in RATES or "interpret" not in task.implementation.devices:
        return None
    if now.compilers is None:
        now.compilers = now.stack.enter_context(screening.compiler(tuned.user_folder().with_name("compiled")))
    return screening.screen(task.space, task.setting, now.compilers, lambda: timer.box)


def _file(task: Task, now: Run, entry: dict, choice: Choice) -> dict:
    options = now.options
    row = entry["config"] if options.default_row else None
    if len(options.tasks) > 1 and (found := study.least_worst(now.searches[task.implementation.name])):
        row = asdict(found)
    return {
        "schema": 1,
        "kind": "tuned",
        "implementation": task.implementation.name,
        "device": task.about | ({"name": options.name} if options.name else {}),
        "provenance": entry["provenance"],
        "entries": [entry],
        "default": row,
    }


def _told(page: Console, result: dict, search: Search) -> None:
    timing = result["entry"]["timing"]
    gain = {name: 1 / x for name, x in timing["over_default"].items() if name != "count"}
    what = f"{gain['median']:.2f} times as fast as the default ({gain['high']:.2f} to {gain['low']:.2f})"
    what = "nothing is quicker beyond noise, the default stays" if timing["noise"] else what
    config = ", ".join(f"{name}={x}" for name, x in result["entry"]["config"].items())
    page.print(f"[bold]{escape(config)}[/]: {what}", soft_wrap=True, highlight=False)
    kept = "written: {path}" if result["kept"] else "not written: a better entry of this shape stays in {path}"
    done = kept.format(path=result["path"])
    statuses = Counter(outcome.status for outcome in search.outcomes.values())
    became = ", ".join(f"{count} {status}" for status, count in statuses.items())
    page.print(f"of {search.size:,} points {became}; {done}", soft_wrap=True, markup=False, highlight=False)


def _ended(now: Run, todo: list[Task], codes: set[int]) -> int:
    """Say what was not begun; returns the exit code of everything."""
    for task in todo:
        now.page.print(f"not begun: {task}; the same command goes on", soft_wrap=True, markup=False, highlight=False)
    if now.options.json:
        print(json.dumps({"results": now.results, "not_begun": [str(task) for task in todo]}, indent=1))
    return worst(codes | ({UNFINISHED} if todo else set()))
