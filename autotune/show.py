"""Say which tuned configuration a call would run with, from which file and row, and what was looked for before it.

A configuration given in the call comes before any file. Then come the folder that KDA_CONFIG_DIR names, the user's
cache and what the package ships, in each the file of this device; then, for a GPU, the file of the nearest one of the
same capability, and for a CPU generic-cpu. Within a file: the entry of the shape, one of its bucket (T, N and HV up to
the same powers of two), the default row. Passed over are rows whose chunks do not divide the interval of kept states,
and those of Triton kernels that do not fit the device. Where Triton's kernels are interpreted, no file is used.
"""

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
from impls.table import YARDSTICKS

SUMMARY = "explain which tuned configuration is used"
EPILOG = """\
exit code  0 a tuned row is used; 3 there is none, the default runs; 2 usage

examples   python -m autotune show                                          every implementation at the usual shape
           python -m autotune show --op chunk_torch --shape T=100,HV=8,dtype=bfloat16
           python -m autotune show --op chunk_triton --device cuda:0 --shape T=8192,HV=64,dtype=bfloat16
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--op", metavar="NAME", help=f"{', '.join(tuned.KINDS)}; default all of the device but dplr_*")
    p.add_argument("--device", default="cpu", help="cpu or cuda:N; default cpu")
    shape = "T, N, HV, K, V, dtype, packed; default T=4096,N=1,HV=16,K=128,V=128,dtype=float32"
    p.add_argument("--shape", default="", metavar="T=N,...", help=shape)
    p.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    provenance.check_device(args.device)
    shape = shape_of(args.shape)
    found = {name: explained(name, args.device, shape) for name in _asked(args.op, args.device)}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        page = display.console()
        for name, told in found.items():
            _print(page, name, told, shape, args.device)
        page.print(f"digest of the files that {args.device} can use: {tuned.digest(args.device)}", soft_wrap=True)
    return PASS if all(told["config"] for told in found.values()) else NOTHING


def _asked(op: str | None, device: str) -> list[str]:
    """Return the implementations to explain; UsageError for one that looks nothing up on the device."""
    known = [name for name in tuned.KINDS if tuned.looks_up(name, device)]
    if op in tuned.KINDS and op not in known:
        raise UsageError(f"--op {op}: its kernels look files up on a GPU only: expected --device cuda:N, got {device}")
    if op and op not in known:
        raise UsageError(f"--op must be one of {', '.join(known)}, which look tuned files up on {device}, got {op}")
    return [op] if op else [name for name in known if name not in {row.name for row in YARDSTICKS}]


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


def _print(page: Console, name: str, told: dict, shape: tuned.Shape, device: str) -> None:
    page.print(f"[bold]{name}[/] at {', '.join(f'{x}={y}' for x, y in shape._asdict().items())}", highlight=False)
    for line in told["looked_for"]:
        page.print(f"  {line['state']:>12}  {line['path']}", markup=False, highlight=False, soft_wrap=True)
    missing = ["nothing tuned: the default runs", f"to tune it: {tuned.command(name, device, shape)}"]
    if not tuned.folders():
        missing = ["KDA_TUNED=0: no file is looked up, the default runs"]
    for line in _lines(told) or missing:
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

