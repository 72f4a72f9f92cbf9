"""Show what the compiler makes of every kernel on every target, with no GPU: `python -m impls.compile_report --help`.

Exit status: 0, or 1 where a kernel spills at K = V in {64, 128}, does not fit the target's shared memory or cannot be
compiled, or 2 for wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from impls.configs import ChunkTritonConfig, RecurrentTritonConfig, invalid
from impls.defaults import default_chunk, default_recurrent, recomputing
from impls.plan import Problem
from impls.targets import TARGETS, Target

SCHEMA = 1
RECOMPUTE = "recompute"
"""The walk that computes the decayed rows again, as `defaults.recomputing` configures it."""
BACKWARD = ("within", "replay", "walk_back", "token_gradients", "parameters")
"""The backward of chunk_triton, all gradients wanted; its tiles are its own."""
SAVING = "replay_saving"
"""The walk of a forward that saves: `replay` of the backward, with outputs."""
KERNELS = ("intra", "walk", "summary", "combine", "recurrent", RECOMPUTE, *BACKWARD, SAVING)
LAUNCHES = {RECOMPUTE: "walk", SAVING: "replay"}
"""Kernel -> its name in a plan, where that is another."""
SEGMENTED = ("summary", "combine")
"""Kernels that only a plan with segments has."""
SEGMENTS = 4
HEAD_DIMS = (64, 128, 256)
MAY_SPILL = 256
"""Head dimensions from here on may spill: the state of a walk alone takes half of the registers."""
WIDE = 170
"""Columns where nobody watches: a folded table cannot be read in a log."""


class UsageError(Exception):
    """Say what is wrong with the command line."""


@dataclass(frozen=True)
class Row:
    """One kernel for one target and one head dimension: what the compiler made of it, or why there is nothing."""

    target: str
    kernel: str
    K: int
    config: dict
    resources: dict | None
    shared_memory_limit: int
    error: str | None

    @property
    def fits(self) -> bool:
        """Tell whether one program finds its shared memory on the target."""
        return self.resources is not None and self.resources["shared_memory"] <= self.shared_memory_limit

    @property
    def trouble(self) -> str:
        """Say what is wrong with it; empty where nothing is."""
        if self.resources is None:
            return self.error
        if not self.fits:
            return f"needs {self.resources['shared_memory']} bytes of {self.shared_memory_limit}"
        return "spills" if self.spilled else ""

    @property
    def spilled(self) -> bool:
        """Tell whether registers went to memory."""
        return self.resources is not None and (self.resources["stack"] > 0 or self.resources["code"]["local"] > 0)

    @property
    def failed(self) -> bool:
        """Tell whether the command fails by this row."""
        return not self.fits or (self.spilled and self.K < MAY_SPILL)


def reference(K: int, dtype: str) -> Problem:
    """Return the problem that is compiled: a layer of Kimi-Linear's prefill with its state carried over."""
    return Problem(
        B=1, T=8192, N=1, H=64, HV=64, K=K, V=K, dtype=dtype, l2norm=True, gate="softplus", sigmoid="once",
        A_log=True, dt_bias=True, initial=True, final=True,
    )  # fmt: skip


def configured(kernel: str, problem: Problem, target: Target, given: dict):
    """Return the configuration of a kernel's implementation: as given, else the default of the target; None back."""
    if kernel in BACKWARD:
        return None
    if kernel == "recurrent":
        return given.get("recurrent_triton") or default_recurrent(problem.K, problem.V, problem.dtype, target)
    if kernel == SAVING:
        from impls.chunk_triton_backward import saving_tiling

        return saving_tiling(problem, target)
    chunk = given.get("chunk_triton") or default_chunk(problem.K, problem.V, problem.dtype, target)
    chunk = recomputing(chunk) if kernel == RECOMPUTE else chunk
    return replace(chunk, segments=SEGMENTS if kernel in SEGMENTED else 1)


def report(targets: Sequence[str], kernels: Sequence[str], head_dims: Sequence[int], dtype: str, given: dict) -> list:
    """Compile everything that is asked for: a Row each. Raises `compiler_triton.Interpreting`."""
    from impls.compiler_triton import Job, outcomes

    jobs = []
    for K in head_dims:
        for target in map(TARGETS.__getitem__, targets):
            problem = reference(K, dtype)
            for kernel in kernels:
                config = configured(kernel, problem, target, given)
                jobs.append(Job(problem, config, target, LAUNCHES.get(kernel, kernel)))
    return [
        Row(
            target=job.target.name,
            kernel=_kernel(job),
            K=job.problem.K,
            config=asdict(job.config) if job.config else {"value_tile": job.launch.constants.get("BV")},
            resources=None if isinstance(result, str) else asdict(result),
            shared_memory_limit=job.target.shared_memory,
            error=result if isinstance(result, str) else None,
        )
        for job, result in zip(jobs, outcomes(jobs), strict=True)
    ]


def _kernel(job) -> str:
    """Return what the report calls a job."""
    if job.kernel == "walk" and job.config.recompute:
        return RECOMPUTE
    return SAVING if job.kernel == "replay" and job.config else job.kernel


def stored(rows: list[Row], dtype: str) -> dict:
    """Return the report as JSON values, with what it hangs on."""
    from impls.compiler_triton import ptxas_version

    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "triton": metadata.version("triton"),
        "ptxas": ptxas_version(),
        "dtype": dtype,
        "rows": [asdict(row) | {"spilled": row.spilled, "fits": row.fits, "failed": row.failed} for row in rows],
    }


COLUMNS = ("registers", "stack", "shared memory")
COUNTED = {
    "instructions": "instructions",
    "tensor": "tensor",
    "special": "special",
    "barrier": "barrier",
    "local": "spill",
    "shared": "shared",
    "global_": "global",
}


def table(rows: list[Row], title: str) -> Table:
    """Lay the rows out; where a kernel loops, each count is followed by that of one round of its loop."""
    laid = Table(title=title, title_justify="left")
    for name in ("target", "K", "kernel"):
        laid.add_column(name, no_wrap=True)
    for name in (*COLUMNS, *COUNTED.values()):
        laid.add_column(name, justify="right", no_wrap=True)
    laid.add_column("trouble")
    for row in rows:
        style = "red" if row.failed else "yellow" if row.trouble else ""
        laid.add_row(row.target, str(row.K), row.kernel, *_cells(row), escape(row.trouble), style=style)
    return laid


def _cells(row: Row) -> list[str]:
    if row.resources is None:
        return ["-"] * (len(COLUMNS) + len(COUNTED))
    found = row.resources
    loops = found["loop"]["instructions"] > 0
    counts = [f"{found['code'][x]}" + (f" / {found['loop'][x]}" if loops else "") for x in COUNTED]
    return [str(found["registers"]), str(found["stack"]), str(found["shared_memory"]), *counts]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. argparse exits with 2 where it is wrong, as UsageError does."""
    parser = argparse.ArgumentParser(prog="python -m impls.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942", help="comma-separated (default: %(default)s)")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one; may be repeated")
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)), help="K = V (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    shape = '{"chunk_triton": {field: value}, "recurrent_triton": {..}}'
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"JSON file: {shape}")
    parser.add_argument("--out", type=Path, help="file for the report in JSON")
    return parser.parse_args(arguments)


def listed(text: str, name: str, allowed) -> list[str]:
    """Split a comma-separated list; UsageError for what is not allowed."""
    found = [x.strip() for x in text.split(",")]
    for x in found:
        if x not in allowed:
            raise UsageError(f"{name}: {x!r} is not one of {', '.join(allowed)}")
    return found


def read_config(path: Path | None) -> dict:
    """Read configurations by implementation from a JSON file; UsageError for what cannot run."""
    if path is None:
        return {}
    kinds = {"chunk_triton": ChunkTritonConfig, "recurrent_triton": RecurrentTritonConfig}
    try:
        given = json.loads(path.read_text())
        found = {name: kinds[name](**fields) for name, fields in given.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--config {path}: {type(error).__name__}: {error}") from error
    for name, config in found.items():
        if reason := invalid(config):
            raise UsageError(f"--config {path}: {name}: {reason}")
    return found


def checked(options: argparse.Namespace) -> tuple[list[str], list[int], dict]:
    """Return targets, head dimensions and configurations; UsageError for what is wrong with them."""
    compilable = [name for name, target in TARGETS.items() if target.backend != "interpret"]
    targets = listed(options.targets, "--targets", compilable)
    head_dims = [int(x) for x in listed(options.head_dims, "--head-dims", list(map(str, range(1, 257))))]
    if options.out is not None and not options.out.parent.is_dir():
        raise UsageError(f"--out {options.out}: there is no folder {options.out.parent}")
    return targets, head_dims, read_config(options.config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    from impls.compiler_triton import Interpreting, check_compiling

    options, page = parsed(arguments), Console()
    try:
        targets, head_dims, given = checked(options)
        check_compiling()
    except (UsageError, Interpreting) as error:
        print(f"compile_report: {error}", file=sys.stderr)
        return 2
    rows = report(targets, options.kernel or KERNELS, head_dims, options.dtype, given)
    found = stored(rows, options.dtype)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    versions = f"triton {found['triton']}, ptxas {found['ptxas']}, {options.dtype}"
    laid = table(rows, f"{versions}; counts: all code / one round of the loop")
    (page if page.is_terminal else Console(width=WIDE)).print(laid)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
