"""Rank launch configurations for a GPU that is not here, by what the compiler makes of them: nothing is measured.

Every kernel of a configuration is compiled ahead of time for the target; what does not compile, spills, or needs more
shared memory than there is, is out. What is left is ordered by an estimate of its time (instructions, latency over
occupancy, bytes, the sequential walk): for ordering only, a processor decides. The search starts at the default and
changes one field at a time to the value of the least estimate, until nothing improves or the time is over.
"""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from autotune import display, fleet, provenance
from autotune.arguments import DTYPES, fixed_of, implementation_of, problem_of, seconds_of, target_of
from autotune.outcomes import NOTHING, PASS, UNFINISHED, UsageError
from autotune.space import Setting, space_of, usual_of
from autotune.store import now, write
from autotune.timing import Box
from impls.estimate import RATES
from impls.tuned import user_folder

if TYPE_CHECKING:  # it imports triton, which only this command needs
    from autotune.ranking import Ranking

SUMMARY = "rank configurations for a GPU that is not here, by the compiler"
SHOWN = 12
EPILOG = """\
exit code  0 ranked; 3 nothing compiles without spilling; 7 the time was over before nothing improved; 2 usage

examples   python -m autotune static --target sm_90 --shape T=8192,H=64
           python -m autotune static --op recurrent_triton --target gfx942 --dtype float32
           python -m autotune static --target sm_90 --scheduler tcp://HOST:8786 --budget 2m
           python -m autotune static --target sm_90 --sample 100 --budget 20m
           python -m autotune static --target sm_100 --fix recompute=false --fix segments=1 --budget 10m --out x.json
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--op", default="chunk_triton", metavar="NAME", help="chunk_triton, recurrent_triton or dplr_triton")
    p.add_argument("--target", default="sm_90", metavar="NAME", help=f"{', '.join(RATES)}; default %(default)s")
    p.add_argument("--shape", default="", metavar="T=N,H=N,...", help="as in python -m autotune space")
    p.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default %(default)s")
    p.add_argument("--fix", action="append", default=[], metavar="FIELD=VALUE", help="do not search this field")
    p.add_argument("--budget", default="5m", metavar="N[s|m]", help="time to compile in (default %(default)s)")
    p.add_argument("--processes", type=int, default=2, metavar="N", help="compilers side by side (default %(default)s)")
    p.add_argument("--scheduler", metavar="ADDRESS", help="compile on the workers of this dask scheduler instead")
    p.add_argument("--timeout", default="60s", metavar="N[s|m]", help="of one kernel (default %(default)s)")
    drawn = "compile N random points instead of searching: what share of the space does the compiler rule out?"
    p.add_argument("--sample", type=int, default=0, metavar="N", help=drawn)
    p.add_argument("--seed", type=int, default=0, help="of --sample (default %(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write everything that was compiled to a JSON file")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    implementation, page = implementation_of(args.op), display.console()
    setting = Setting(problem_of(args.shape, args.dtype), target_of(implementation, args.target))
    if setting.target is None or setting.target.name not in RATES:
        raise UsageError(f"--target must be one of {', '.join(RATES)}, whose rates are known, got {args.target}")
    for name, least in (("processes", 1), ("sample", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    budget, timeout = seconds_of(args.budget, "--budget"), seconds_of(args.timeout, "--timeout")
    fixed = dict(fixed_of(x) for x in args.fix)
    space, box = space_of(implementation, setting, fixed), Box(budget)
    cache = user_folder().with_name("compiled")
    with ExitStack() as stack:
        pool = stack.enter_context(fleet.joined(args.scheduler)) if args.scheduler else None
        compiling, Ranking = _imported()
        elsewhere = fleet.compiles(pool, timeout) if pool else None
        compiler = stack.enter_context(compiling.Compiler(cache, args.processes, timeout, elsewhere))
        ranking = Ranking(space, setting, compiler, box)
        if args.sample:
            _sampled(ranking, args.sample, args.seed, page)
        else:
            _descended(ranking, replace(usual_of(space, setting), **fixed), page)
    if args.out:
        write(args.out, json.dumps(_file(args.op, setting, ranking), indent=1) + "\n")
    _show(page, ranking, setting)
    return NOTHING if ranking.best() is None else PASS if box.left else UNFINISHED


def _imported():
    """Import what needs triton; UsageError where kernels cannot be compiled."""
    try:
        from autotune import compiling
        from autotune.ranking import Ranking
        from impls.compiler_triton import Interpreting, check_compiling
    except ImportError as error:
        raise UsageError(f"static needs triton to compile: {error}") from error
    try:
        check_compiling()
    except Interpreting as error:
        raise UsageError(str(error)) from error
    return compiling, Ranking


def _descended(ranking: "Ranking", start, page: Console) -> None:
    with display.progress(page, 0) as show:
        for best in ranking.descend(start):
            compiler = ranking.compiler
            show(
                f"{len(ranking.known)} configurations, {compiler.compiled} kernels compiled, "
                f"best {best.microseconds:,.0f} us by estimate, {ranking.box.left:.0f} s left"
            )


def _sampled(ranking: "Ranking", count: int, seed: int, page: Console) -> None:
    points, draws = set(), ranking.space.draws(str(seed))
    while len(points) < min(count, ranking.space.counted().left):
        points.add(next(draws))
    with display.progress(page, len(points)) as show:
        for point in sorted(points, key=repr):
            ranking.rank([point])
            show(f"{ranking.compiler.compiled} kernels compiled, {ranking.box.left:.0f} s left", 1)


def _file(op: str, setting: Setting, ranking: "Ranking") -> dict:
    order = sorted(ranking.known.values(), key=lambda x: x.microseconds)
    return {
        "schema": 1,
        "kind": "static",
        "implementation": op,
        "target": asdict(setting.target),
        "problem": asdict(setting.problem),
        "date": now(),
        "versions": provenance.versions(("torch", "triton")),
        "sources": provenance.kernels(),
        "ranked": [x.to_json() for x in order],
    }


def _show(page: Console, ranking: "Ranking", setting: Setting) -> None:
    order = sorted(ranking.known.values(), key=lambda x: x.microseconds)
    out = sum(bool(x.trouble) for x in order)
    title = f"{ranking.space.implementation} on {setting.target.name}, by estimate: nothing was measured"
    page.print(f"[bold]{title}", soft_wrap=True)
    laid = Table()
    laid.add_column("us", justify="right")
    for name in ("launches", "registers", "configuration"):
        laid.add_column(name)
    for x in [x for x in order if not x.trouble][:SHOWN]:
        launches = ", ".join(f"{name} {us:,.0f}" for name, us in x.launches.items())
        registers = ", ".join(str(found["registers"]) for found in x.resources.values())
        changed = {k: v for k, v in asdict(x.config).items() if v != getattr(ranking.space.kind(), k)}
        laid.add_row(f"{x.microseconds:,.0f}", launches, registers, ", ".join(f"{k}={v}" for k, v in changed.items()))
    page.print(laid)
    compiler = ranking.compiler
    page.print(
        f"{len(order)} configurations, {out} out (spills, shared memory, failures); "
        f"{compiler.compiled} kernels compiled, {compiler.recalled} recalled; "
        "fields at the default of their dataclass are not shown",
        soft_wrap=True,
        highlight=False,
    )
