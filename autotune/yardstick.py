"""Hold KDA against general DPLR, whose a and b it binds to k (section 6.2 of the report), in the same tree-chunk form.

Of the four matrices of a chunk A_qk, A_qa, A_bk, A_ba two are left, and of its eight products with values and states
three fall away: A_bk v, A_qa x and a'^T x. Counted are FLOPs, bytes and launches; compiled, for a GPU that need not be
here, instructions and registers; timed, on the device, both on the same tokens in common rounds.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from autotune import display, provenance
from autotune.outcomes import PASS, UNFINISHED, BoxOver, UsageError
from autotune.store import now, write
from autotune.timing import Box, Effort, Spread, race, ratio, stopwatch
from impls import dplr, find, targets, traffic
from impls.configs import ChunkTorchConfig
from impls.plan import Plan, Problem
from impls.targets import TARGETS
from kda_spec.costs import dplr_chunk_flops, tree_chunk_flops
from kda_spec.types import Sizes

SUMMARY = "hold KDA against general DPLR: counted, compiled, timed"
SCHEMA = 1
K, C = 128, 16
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
EFFORT = Effort(least=3, most=15, seconds=6.0)
IDENTITY = ("schema", "kind", "device", "versions", "sources", "heads")
"""What is the same where times of an earlier run still stand."""
EPILOG = """\
exit code  0 done; 2 usage; 7 --minutes were over before every length was timed; 130 interrupted
           every length is written to --out as soon as it is timed: the same command goes on from there

examples   python -m autotune yardstick --out results/yardstick.json
           python -m autotune yardstick --tokens 2048,8192 --heads 16 --minutes 3
           python -m autotune yardstick --device cuda:0 --heads 64
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--device", default="cpu", help="cpu or cuda:N (default %(default)s)")
    p.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="T,...", help="default %(default)s")
    p.add_argument("--heads", type=int, default=16, metavar="H", help="default %(default)s")
    p.add_argument("--target", default="sm_90", metavar="NAME", help="compiled for (default %(default)s)")
    p.add_argument("--minutes", type=float, default=10.0, metavar="N", help="time box (default 10)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write everything to a JSON file")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    tokens, page = _checked(args), display.console()
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    found = {
        "schema": SCHEMA,
        "kind": "yardstick",
        "device": provenance.described(args.device),
        "versions": provenance.versions(("torch", "triton")),
        "sources": provenance.sources(),
        "date": now(),
        "heads": args.heads,
        "counted": [counted(T, args.heads, "bfloat16", TARGETS[args.target]) for T in tokens],
        "compiled": compiled(args.heads, args.target),
    }
    found["timed"] = [x for x in _finished(args.out, found) if x["T"] in tokens]
    _keep(args.out, found)
    left, box = [T for T in tokens if T not in {x["T"] for x in found["timed"]}], Box(args.minutes * 60)
    try:
        with display.progress(page, len(left)) as show, torch.no_grad():
            for T in left:
                show(f"T = {T}")
                found["timed"].append(timed(T, args.heads, dtype, args.device, box))
                found["timed"].sort(key=lambda x: x["T"])
                _keep(args.out, found)
                show(f"T = {T}", 1)
    except BoxOver:
        page.print("[bold red]the time was over[/]: longer sequences are not timed")
    _show(page, found)
    return PASS if len(found["timed"]) == len(tokens) else UNFINISHED


def _finished(path: Path | None, found: dict) -> list[dict]:
    """Return what a run that was interrupted has timed into the file, where all else is as it was."""
    try:
        there = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return []
    same = isinstance(there, dict) and all(there.get(name) == found[name] for name in IDENTITY)
    return there.get("timed", []) if same else []


def _keep(path: Path | None, found: dict) -> None:
    if path:
        write(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _checked(args: argparse.Namespace) -> tuple[int, ...]:
    provenance.check_device(args.device)
    known = [name for name, target in TARGETS.items() if target.backend != "interpret"]
    if args.target not in known:
        raise UsageError(f"--target must be one of {', '.join(known)}, got {args.target}")
    if args.heads < 1 or not 0 < args.minutes < 1e6:
        raise UsageError(f"--heads and --minutes must be positive, got {args.heads} and {args.minutes:g}")
    parts = args.tokens.split(",")
    if not all(x.isdecimal() and int(x) for x in parts):
        raise UsageError(f"--tokens must be numbers from 1 on, as 2048,8192, got {args.tokens!r}")
    return tuple(sorted(int(x) for x in parts))


def _problem(T: int, H: int, dtype: str) -> Problem:
    return Problem(B=1, T=T, N=1, H=H, HV=H, K=K, V=K, dtype=dtype, initial=True, final=True)


def _plans(problem: Problem, target: targets.Target) -> dict[str, Plan]:
    """Return the plan of both, of chunks of C: they import triton."""
    from impls import chunk_triton, dplr_triton
    from impls.defaults import default_chunk, default_dplr

    ours = replace(default_chunk(problem.K, problem.V, problem.dtype, target, C), segments=1)
    theirs = default_dplr(problem.K, problem.V, problem.dtype, target, C)
    return {"kda": chunk_triton.plan(problem, ours, target), "dplr": dplr_triton.plan(problem, theirs, target)}


def counted(T: int, H: int, dtype: str, target: targets.Target) -> dict:
    """Count FLOPs, bytes that launches move, and launches, of both and their ratio."""
    problem, sizes = _problem(T, H, dtype), Sizes(1, T, H, H, K, K, 1)
    flops = {"kda": tree_chunk_flops(sizes, C).total, "dplr": dplr_chunk_flops(sizes, C).total}
    plans = _plans(problem, target)
    moved = {name: traffic.total(traffic.counted(plan, problem)).moved for name, plan in plans.items()}
    launches = {name: len(plan.launches) for name, plan in plans.items()}
    return {"T": T, "flops": _with_ratio(flops), "bytes": _with_ratio(moved), "launches": launches}


def _with_ratio(x: dict[str, float]) -> dict[str, float]:
    return x | {"dplr_over_kda": x["dplr"] / x["kda"]}


def compiled(H: int, name: str) -> dict:
    """Compile the launches of both ahead of time; where that cannot be the reason."""
    try:
        from impls.compiler_triton import Interpreting, check_compiling
        from impls.compiler_triton import compiled as resources

        check_compiling()
    except (ImportError, Interpreting) as error:
        return {"target": name, "reason": str(error)}
    problem, target = _problem(8192, H, "bfloat16"), TARGETS[name]
    found = {
        of: {launch.name: asdict(resources(launch, problem, target)) for launch in plan.launches}
        for of, plan in _plans(problem, target).items()
    }
    return {"target": name, "launches": found}


def timed(T: int, H: int, dtype: str, device: str, box: Box) -> dict:
    """Time both in common rounds; BoxOver where the box ends before three of them."""
    watch, calls = stopwatch(device), _calls(T, H, dtype, device)
    for call in calls.values():
        box.check()
        call()
    mode = watch.modes[-1]
    runners = {name: partial(watch.milliseconds, watch.prepare(call, mode)[0], mode) for name, call in calls.items()}
    samples, raised = race(runners, EFFORT, box)
    if raised:
        raise next(iter(raised.values()))
    spreads = {name: Spread.of(list(x.values())).to_json() for name, x in samples.items()}
    over = ratio(samples["dplr"], samples["kda"])
    return {"T": T, "dtype": dtype, "mode": mode, "ms": spreads, "dplr_over_kda": over.to_json()}


def _calls(T: int, H: int, dtype: str, device: str) -> dict[str, Callable[[], tuple]]:
    """Draw tokens of unit keys, and return both calls on them: the same function, since a and b are KDA's."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, T, H, *shape, generator=draw, device=device)

    to = getattr(torch, dtype)
    q, k, v, g = F.normalize(normal(K), dim=-1), F.normalize(normal(K), dim=-1), normal(K), -normal(K).abs()
    beta = torch.rand(1, T, H, generator=draw, device=device)
    strength = beta[..., None]
    rows = [x.to(to) for x in (q, k, strength * v, strength * k, k * g.exp())]
    q, k, v, g, beta = (x.to(to) for x in (q, k, v, g, beta))
    name, form = "chunk_triton", {"chunk_size": C}  # what is tuned for another C is not what is compared
    if device == "cpu":
        name, form = "chunk_torch", {"config": ChunkTorchConfig(chunk_size=C)}
    ours = partial(find(name).call, q, k, v, g, beta, **form, output_final_state=True)
    theirs = partial(dplr, *rows, g, output_final_state=True, chunk_size=C)
    return {"kda": ours, "dplr": theirs}


def _show(page: Console, found: dict) -> None:
    laid = Table(title=f"general DPLR over KDA, K = V = {K}, H = {found['heads']}, C = {C}", title_justify="left")
    for name in ("T", "FLOPs", "bytes", "launches", "KDA ms", "DPLR ms", "DPLR / KDA"):
        laid.add_column(name, justify="right")
    times = {x["T"]: x for x in found["timed"]}
    for x in found["counted"]:
        launches = f"{x['launches']['dplr']} / {x['launches']['kda']}"
        cells = [str(x["T"]), *(f"{x[of]['dplr_over_kda']:.2f}" for of in ("flops", "bytes")), launches]
        laid.add_row(*cells, *_times(times.get(x["T"])))
    page.print(laid)
    about, made = found["device"]["name"], found["compiled"]
    page.print(f"timed on {about}; compiled for {made['target']}:", highlight=False, soft_wrap=True, markup=False)
    if "reason" in made:
        page.print(f"  not compiled: {made['reason']}", soft_wrap=True, markup=False)
        return
    for of, launches in made["launches"].items():
        for name, x in launches.items():
            code = ", ".join(f"{count} {kind}" for kind, count in x["code"].items() if count)
            held = f"{x['registers']} registers, {x['stack']} bytes spilled"
            page.print(f"  {of:5}{name:6} {held}: {code}", soft_wrap=True, highlight=False)


def _times(x: dict | None) -> list[str]:
    if x is None:
        return ["not timed"] * 3
    over = x["dplr_over_kda"]
    spread = f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f})"
    return [f"{x['ms'][name]['median']:.1f}" for name in ("kda", "dplr")] + [spread]
