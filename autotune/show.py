"""Say which tuned configuration a call would run with, from which file and row, and what was looked for before it."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from autotune import display, provenance
from autotune.arguments import shape_of
from autotune.outcomes import NOTHING, PASS, UsageError
from impls import tuned
from impls.devices import named

SUMMARY = "explain which tuned configuration is used"
EPILOG = """\
exit code  0 a tuned row is used; 3 there is none, the default runs; 2 usage

examples   python -m autotune show                                          every implementation at the usual shape
           python -m autotune show --op chunk_torch --shape T=100,HV=8,dtype=bfloat16
"""
COMMAND = {
    "cpu": "python -m autotune tune --op {op} --tokens {T} --heads {HV} --sequences {N} --head-dim {K} --dtype {dtype}"
}
"""Kind of device -> the command that would tune it for a shape."""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--op", metavar="NAME", help=f"{', '.join(tuned.KINDS)}; default all")
    p.add_argument("--device", default="cpu", help="cpu or cuda:N; default cpu")
    shape = "T, N, HV, K, V, dtype, packed; default T=4096,N=1,HV=16,K=128,V=128,dtype=float32"
    p.add_argument("--shape", default="", metavar="T=N,...", help=shape)
    p.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    provenance.check_device(args.device)
    shape = shape_of(args.shape)
    kind, page = args.device.split(":")[0], display.console()
    if args.op and args.op not in tuned.KINDS:
        raise UsageError(f"--op must be one of {', '.join(tuned.KINDS)}, which look tuned files up, got {args.op}")
    asked = [args.op] if args.op else list(tuned.KINDS)
    found = {name: explained(name, args.device, shape) for name in asked}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, told in found.items():
            _print(page, name, told, shape, kind)
    return PASS if all(told["config"] for told in found.values()) else NOTHING


def explained(implementation: str, device: str, shape: tuned.Shape) -> dict:
    """Return in JSON values what is looked up for a shape, and what every folder holds of the device."""
    tuned.forget()
    found = tuned.looked_up(implementation, device, shape)
    looked = []
    for folder in tuned.folders():
        path = tuned.path_of(folder, implementation, named(device)["name"])
        looked.append({"path": str(path), "state": _state(path)})
    return {
        "looked_for": looked,
        "config": asdict(found.config) if found else None,
        "path": str(found.path) if found else None,
        "row": found.row if found else None,
        "nearest": found.nearest if found else None,
        "stale": _stale(found) if found else [],
        "entry": found.entry if found else None,
    }


def _state(path: Path) -> str:
    if not os.path.isfile(path):
        return "missing"
    try:
        return f"{len(tuned.read(path)['entries'])} entries"
    except (OSError, ValueError) as error:
        return f"not used: {error}"


def _stale(found: tuned.Found) -> list[str]:
    """Say what has changed since the row was measured: it is still used."""
    there = (found.entry or tuned.read(found.path))["provenance"]
    here = provenance.versions(tuple(there["versions"])) | {"python": None}
    changed = [
        f"{name} was {x}, is {here[name]}" for name, x in there["versions"].items() if here[name] not in (x, None)
    ]
    return changed + (["sources of the kernels changed"] if there["sources"] != provenance.kernels() else [])


def _print(page: Console, name: str, told: dict, shape: tuned.Shape, kind: str) -> None:
    page.print(f"[bold]{name}[/] at {', '.join(f'{x}={y}' for x, y in shape._asdict().items())}", highlight=False)
    for line in told["looked_for"]:
        page.print(f"  {line['state']:>12}  {line['path']}", markup=False, highlight=False, soft_wrap=True)
    for line in _lines(told) or _missing(name, shape, kind):
        page.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _lines(told: dict) -> list[str]:
    if not told["config"]:
        return []
    rows = {"exact": "the entry of this shape", "bucket": "an entry of this bucket", "default": "the default row"}
    whose = ", of the nearest device," if told["nearest"] else ""
    lines = [f"used: {rows[told['row']]}{whose} in {told['path']}"]
    lines.append(", ".join(f"{x}={y}" for x, y in told["config"].items()))
    if told["entry"]:
        timing, shape = told["entry"]["timing"], told["entry"]["shape"]
        sizes = ", ".join(f"{x}={y}" for x, y in shape.items())
        gain = (
            "as the default, within noise"
            if timing["noise"]
            else f"{1 / timing['over_default']['median']:.2f} x the default"
        )
        lines.append(f"measured at {sizes}: {timing['ms']['median']:.3g} ms, {gain}, {len(timing['ties'])} ties")
    return lines + [f"stale: {change}" for change in told["stale"]]


def _missing(name: str, shape: tuned.Shape, kind: str) -> list[str]:
    command = COMMAND.get(kind)
    lines = ["nothing tuned: the default runs"]
    return lines + ([f"to tune it: {command.format(op=name, **shape._asdict())}"] if command else [])
