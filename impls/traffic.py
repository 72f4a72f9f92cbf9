"""Count what a plan launches, moves and multiplies, against the least that KDA costs: `python -m impls.traffic`.

Nothing is measured. Bytes are counted twice: `read` and `written` take every tensor once per launch, which is what
memory moves where the second cache catches repeats; `requested` is what all programs together ask for, value tiles
that read the same rows of keys counted each. FLOPs are those of matrix products as they are executed, with masked and
padded parts; what is done element by element is left out.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from impls import traffic_backward
from impls.plan import ITEMSIZE, WANTED, Launch, Plan, Problem, Wanted
from impls.targets import TARGETS, Target
from kda_spec.costs import minimal_bytes, tree_chunk_flops
from kda_spec.types import Sizes

WRITTEN = {
    "intra": ("A", "X", "q_before", "k_before", "k_after", "last"),
    "walk": ("o", "final", "kept"),
    "summary": ("left",),
    "combine": ("entering",),
    "recurrent": ("o", "final", "kept"),
    **traffic_backward.WRITTEN,
}
PARAMETERS = ("A_log", "dt_bias")
DPLR = ("A_qk", "A_qa", "A_bk", "b_before", "a_after")
"""What general DPLR keeps between its launches beside the buffers of chunk_triton, written by the first."""


@dataclass(frozen=True)
class Traffic:
    """What one launch, or a plan, does."""

    name: str
    launches: int
    programs: int
    read: int
    written: int
    requested: int
    """Bytes that programs ask for in all, read or written."""
    flops: int

    @property
    def moved(self) -> int:
        """Return the bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Minimum:
    """The least that a problem costs: `kda_spec.costs`."""

    bytes: int
    flops: int


def counted(
    plan: Plan, problem: Problem, gate_dtype: str | None = None, interval: int = 0, saved: Mapping | None = None
) -> tuple[Traffic, ...]:
    """Return the traffic of every launch in order.

    gate_dtype: that of g and beta, the inputs' where it is None. interval: tokens between the states that are kept.
    saved: the workspace that a forward left, for a backward that reads it.
    Where sequences are packed, slots for chunks count as if all of them were filled: at most one too many for each.
    """
    buffers = {**(saved or {}), **plan.workspace}
    sizes = _sizes_of(buffers, problem, gate_dtype or problem.dtype, interval)
    return tuple(_launch(launch, problem, plan.scalars.get("segment", 0), sizes) for launch in plan.launches)


def total(launches: Sequence[Traffic]) -> Traffic:
    """Add up the launches of a plan."""
    fields = ("launches", "programs", "read", "written", "requested", "flops")
    return Traffic("total", *(sum(getattr(launch, field) for launch in launches) for field in fields))


def minimum(problem: Problem, chunk_size: int, gate_dtype: str | None = None) -> Minimum:
    """Return what the problem costs at least: every input and output moved once, the tree-chunk form's products."""
    p = problem
    sizes = Sizes(B=p.B, T=p.T, H=p.H, HV=p.HV, K=p.K, V=p.V, N=p.N)
    moved = minimal_bytes(sizes, p.dtype, gate_dtype or p.dtype, initial_state=p.initial, final_state=p.final)
    lengths = [p.T // p.N] * (p.N - 1) + [p.T - p.T // p.N * (p.N - 1)] if p.packed else None
    return Minimum(moved, tree_chunk_flops(sizes, chunk_size, lengths).matmul)


def memory(buffers: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of buffers: name -> (dtype, shape), as a plan's workspace."""
    return sum(math.prod(shape) * ITEMSIZE[dtype] for dtype, shape in buffers.values())


def _sizes_of(buffers: Mapping, p: Problem, gate_dtype: str, interval: int) -> dict[str, int]:
    """Return the bytes of every buffer."""
    item, gate, tokens, states = ITEMSIZE[p.dtype], ITEMSIZE[gate_dtype], p.B * p.T, p.HV * p.K * p.V * 4
    return {
        **dict.fromkeys(("q", "k"), tokens * p.H * p.K * item),
        **dict.fromkeys(("v", "o"), tokens * p.HV * p.V * item),
        **dict.fromkeys(("a", "b"), tokens * p.HV * p.K * item),
        "g": tokens * p.HV * p.K * gate,
        "beta": tokens * p.HV * gate,
        "A_log": p.HV * 4,
        "dt_bias": p.HV * p.K * 4,
        "cu_seqlens": (p.N + 1) * 8,
        **dict.fromkeys(("initial", "final"), p.N * states),
        "kept": p.spans(interval) * states if interval else 0,
        **traffic_backward.sizes_of(p, gate_dtype),
        **{name: memory({name: kind}) for name, kind in buffers.items()},
    }


def _launch(launch: Launch, problem: Problem, segment: int, sizes: dict[str, int]) -> Traffic:
    outputs = WRITTEN[launch.name] + (DPLR if launch.name == "intra" else ())
    written = {name: sizes[name] for name in launch.buffers if name in outputs}
    read = {name: sizes[name] for name in launch.buffers if name not in written}
    repeats = _repeats(launch, problem)
    return Traffic(
        name=launch.name,
        launches=int(launch.programs > 0),
        programs=launch.programs,
        read=sum(read.values()),
        written=sum(written.values()),
        requested=sum(size * repeats.get(name, 1) for name, size in (read | written).items()),
        flops=_flops(launch, problem, segment),
    )


def _tiles(launch: Launch, problem: Problem) -> int:
    """Return how many programs share the rows of one head: tiles of value channels, and of the transition's columns."""
    BV = launch.constants["BV"]
    return -(-problem.V // BV) + (-(-problem.K // BV) if launch.name == "summary" else 0)


def _repeats(launch: Launch, problem: Problem) -> dict[str, int]:
    """Return how many programs read each tensor that more than one reads."""
    if launch.name in traffic_backward.WRITTEN:
        return traffic_backward.repeats(launch, problem)
    shared = {"q": problem.HV // problem.H, "k": problem.HV // problem.H}
    if launch.name == "intra":
        chunks = launch.programs // problem.HV
        return shared | dict.fromkeys(PARAMETERS, chunks)
    tiles = _tiles(launch, problem)
    if launch.name == "combine":
        return {"left": tiles}
    repeats = dict.fromkeys(("q_before", "k_before", "k_after", "last", "A", "X", "g", "beta", *DPLR), tiles)
    return repeats | {name: times * tiles for name, times in shared.items()}


def _flops(launch: Launch, problem: Problem, segment: int) -> int:
    """Return the FLOPs of the matrix products of one launch; of the recurrence, its products with the state."""
    c, p = launch.constants, problem
    if launch.name in traffic_backward.WRITTEN:
        return traffic_backward.flops(launch, p)
    if launch.name == "recurrent":
        return p.B * p.T * p.HV * _tiles(launch, p) * 6 * c["BV"] * c["BK"]
    if launch.name == "combine":
        return p.spans(segment) * p.HV * _tiles(launch, p) * 2 * c["BV"] * c["BK"] ** 2
    chunks = p.spans(c["C"]) * p.HV
    if "A_qa" in launch.buffers:
        return chunks * (_dplr_intra(**c) if launch.name == "intra" else _tiles(launch, p) * _dplr_walk(**c))
    return chunks * (_intra_flops(**c) if launch.name == "intra" else _tiles(launch, p) * _walk_flops(launch))


def _intra_flops(C: int, TILES: int, BK: int, **others) -> int:
    """Return the FLOPs of one chunk: the diagonal, a product per level of late with early rows, two in the inverse."""
    M = C // TILES
    levels = M.bit_length() - 1
    tile = 2 * M * M * BK + levels * M * M * BK + (levels - 1) * 4 * M**3
    return TILES * tile + (TILES - 1) * (2 * C * M * BK + 4 * M**3)


def _walk_flops(launch: Launch) -> int:
    """Return the FLOPs of one chunk of one value tile: two or three products with the state, one or two of C x C."""
    C, BK, BV = (launch.constants[name] for name in ("C", "BK", "BV"))
    products = 1 if launch.name == "summary" else 2
    return (1 + products) * 2 * C * BK * BV + products * 2 * C * C * BV


def _dplr_intra(C: int, BK: int, **others) -> int:
    """Return the FLOPs of one chunk: two diagonals, a product per level of both with both, two in the inverse."""
    levels = C.bit_length() - 1
    return 2 * 2 * C * C * BK + levels * 2 * C * C * BK + (levels - 1) * 4 * C**3


def _dplr_walk(C: int, BK: int, BV: int, **others) -> int:
    """Return the FLOPs of one chunk of one value tile: four products with the state or into it, four of C x C."""
    return 4 * 2 * C * BK * BV + 4 * 2 * C * C * BV


CASES = {
    "T=8192 H=64": {"T": 8192, "H": 64},
    "T=8192 H=96": {"T": 8192, "H": 96},
    "T=1024 H=4": {"T": 1024, "H": 4},
    "T=65536 H=16": {"T": 65536, "H": 16},
    "B=4 T=4096 H=64": {"B": 4, "T": 4096, "H": 64},
}


def case(B: int = 1, T: int = 8192, H: int = 64, K: int = 128, dtype: str = "bfloat16") -> Problem:
    """Return a problem with the gate, the norms and the sigmoid inside, from and to a state."""
    return Problem(
        B=B, T=T, N=B, H=H, HV=H, K=K, V=K, dtype=dtype, l2norm=True, gate="softplus", sigmoid="once",
        A_log=True, dt_bias=True, initial=True, final=True,
    )  # fmt: skip


Row = tuple[str, Traffic, Minimum]


def prefill(name: str, problem: Problem, target: Target) -> list[Row]:
    """Return the rows of a forward in its default configuration."""
    from impls.chunk_triton import plan
    from impls.defaults import default_chunk

    config = default_chunk(problem.K, problem.V, problem.dtype, target)
    launches, least = counted(plan(problem, config, target), problem), minimum(problem, config.chunk_size)
    return [(name, launch, least) for launch in (*launches, total(launches))]


def training(name: str, problem: Problem, target: Target, saves: bool) -> list[Row]:
    """Return the rows of a backward, or with `saves` of a forward that saves and of the backward behind it.

    The name of each case says what memory it takes beside inputs and outputs.
    """
    from impls.chunk_triton_backward import CHUNK, SAVED, plan, saving_plan, saving_tiling

    wanted = Wanted(**{x: x != "initial" for x in WANTED})
    back = plan(problem, wanted, target, saves)
    least = Minimum(*traffic_backward.least(problem, CHUNK, problem.dtype))
    name = f"{name}: {memory(back.workspace) / 1e6:.0f} MB"
    if not saves:
        launches = counted(back, problem)
    else:
        forward, own = saving_plan(problem, saving_tiling(problem, target), target), minimum(problem, CHUNK)
        launches = *counted(forward, problem), *counted(back, problem, saved=forward.workspace)
        least = Minimum(least.bytes + own.bytes, least.flops + own.flops)
        name += f", {memory({x: forward.workspace[x] for x in SAVED}) / 1e6:.0f} saved"
    return [(name, launch, least) for launch in (*launches, total(launches))]


def table(rows: Sequence[Row]) -> Table:
    """Lay out rows of (case, traffic, least)."""
    laid = Table()
    for name in ("case", "launch"):
        laid.add_column(name, no_wrap=True)
    for name in ("programs", "read MB", "written MB", "requested MB", "bytes / least", "GFLOP", "FLOPs / least"):
        laid.add_column(name, justify="right")
    for name, found, least in rows:
        megabytes = [f"{x / 1e6:.1f}" for x in (found.read, found.written, found.requested)]
        shares = f"{found.moved / least.bytes:.2f}", f"{found.flops / least.flops:.2f}"
        cells = name, found.name, str(found.programs), *megabytes, shares[0], f"{found.flops / 1e9:.1f}", shares[1]
        laid.add_row(*cells, end_section=found.name == "total")
    return laid


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the cases that are measured; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m impls.traffic", description=__doc__.splitlines()[0])
    about = "for its default configuration (%(default)s)"
    parser.add_argument("--target", default="sm_90", choices=TARGETS, metavar="NAME", help=about)
    parser.add_argument("--head-dim", default=128, type=int, choices=(64, 128, 256), help="K = V (%(default)s)")
    back = "count backward passes instead: by recomputation, or behind a forward that saves, with that"
    parser.add_argument("--training", choices=("recomputing", "saving"), help=back)
    options, rows = parser.parse_args(arguments), []
    target = TARGETS[options.target]
    for name, sizes in CASES.items():
        problem = replace(case(**sizes), K=options.head_dim, V=options.head_dim)
        if options.training:
            rows += training(name, replace(problem, initial=False, final=False), target, options.training == "saving")
        else:
            rows += prefill(name, problem, target)
    page = Console()
    (page if page.is_terminal else Console(width=130)).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
