"""Join files of tuned configurations of one device and implementation: of two entries of a shape the better one stays.

Better is what beats the default more, where both were measured with the same kernels, versions, environment and
default; otherwise the newer one. Only verified entries are in files at all.
"""

import argparse
from functools import reduce
from pathlib import Path

from autotune import display, tuned_files
from autotune.outcomes import PASS, UsageError
from impls.tuned import Shape

SUMMARY = "join files of tuned configurations"
EPILOG = """\
examples   python -m autotune merge mine/chunk_torch.json theirs/chunk_torch.json --out both/chunk_torch.json
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files of one device and implementation")
    out = "file to write; what it holds takes part"
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=out)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if missing := [path for path in args.files if not path.is_file()]:
        raise UsageError(f"{missing[0]} is no file")
    whole = reduce(tuned_files.merged, (tuned_files.opened(path) for path in args.files), None)
    kept = tuned_files.save(args.out, whole)
    page = display.console()
    for entry in kept["entries"]:
        shape = ", ".join(f"{name}={x}" for name, x in Shape(**entry["shape"])._asdict().items())
        config = ", ".join(f"{name}={x}" for name, x in entry["config"].items())
        page.print(f"  {shape}: {config}", markup=False, highlight=False, soft_wrap=True)
    page.print(f"{len(kept['entries'])} entries; written: {args.out}", markup=False, highlight=False, soft_wrap=True)
    return PASS
