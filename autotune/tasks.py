"""Say what is to be tuned: an implementation on a device for a shape, or a recorded table of that."""

import argparse
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from autotune import provenance
from autotune.arguments import DTYPES, fixed_of
from autotune.cases import PRESETS, Case
from autotune.outcomes import UsageError
from autotune.replay import Recorded
from autotune.space import Setting, Space, space_of, usual_of
from autotune.store import now
from impls import targets, tuned
from impls.configs import TUNABLES
from impls.devices import named
from impls.plan import Problem
from impls.table import NAMED, Impl, find

OPS = {"chunk_kda": "chunk", "fused_recurrent_kda": "recurrent"}
"""Public operation -> form of the implementations behind it."""
SHAPE = {"tokens": 4096, "heads": 16, "sequences": 1, "head_dim": 128}
"""Arguments that make a shape, and their defaults."""


@dataclass(frozen=True)
class Task:
    """One thing to tune: what is searched, raced and judged together, and is one entry of a file."""

    implementation: Impl
    device: str
    case: Case
    dtype: str
    fixed: dict[str, object]
    """Fields that are not searched."""
    replay: Recorded | None = None

    @property
    def default(self) -> object:
        """Return the configuration that a call has which nothing was tuned for."""
        return self.replay.default if self.replay else replace(usual_of(self.space, self.setting), **self.fixed)

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

    @cached_property
    def setting(self) -> Setting:
        """Return the shape in the terms of a plan, and the processor: what `cases.draw` draws."""
        s = self.case.sizes
        problem = Problem(
            B=s.B, T=s.T, N=s.N, H=s.H, HV=s.HV, K=s.K, V=s.V, dtype=self.dtype, packed=self.case.lengths is not None,
            l2norm=True, gate="bounded" if self.case.bounded else "softplus", sigmoid="once", A_log=True, dt_bias=True,
            initial=self.case.initial, final=True, v_first=True,
        )  # fmt: skip
        return Setting(problem, None if self.device == "cpu" else targets.of(torch.device(self.device)))

    @cached_property
    def space(self) -> Space:
        """Return what is searched."""
        return space_of(self.implementation, self.setting, self.fixed)

    def __str__(self) -> str:
        """Say it in a line."""
        sizes = ", ".join(f"{name}={x}" for name, x in self.shape._asdict().items())
        return f"{self.implementation.name} at {sizes} on {self.about['name']}"


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is tuned."""
    names = [*OPS, *(row.name for row in NAMED if row.config in TUNABLES)]
    p.add_argument("--op", default="chunk_kda", metavar="NAME", help=f"all, {', '.join(names)}; default %(default)s")
    p.add_argument("--device", default="cpu", help="cpu or cuda:N (default %(default)s)")
    p.add_argument("--preset", metavar="NAME", help=f"the shapes of a model: {', '.join(PRESETS)}")
    p.add_argument("--tokens", type=int, metavar="T", help=f"tokens of a sequence (default {SHAPE['tokens']})")
    p.add_argument("--heads", type=int, metavar="H", help=f"default {SHAPE['heads']}")
    p.add_argument("--sequences", type=int, metavar="N", help=f"batch size (default {SHAPE['sequences']})")
    p.add_argument("--head-dim", type=int, metavar="K", help=f"K = V (default {SHAPE['head_dim']})")
    p.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    fixed = "do not search this field; may be repeated"
    p.add_argument("--fix", action="append", default=[], metavar="FIELD=VALUE", help=fixed)


def tasks_of(args: argparse.Namespace) -> tuple[Task, ...]:
    """Return what the command line asks for; UsageError for what does not exist."""
    if args.replay:
        return (_recorded(args),)
    provenance.check_device(args.device)
    given = [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(args, name) is not None]
    if args.preset and given:
        raise UsageError(f"--preset {args.preset} says the shapes, {given[0]} does not go with it")
    if args.preset and args.preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, got {args.preset}")
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    fixed = dict(fixed_of(x) for x in args.fix)
    rows = _rows(args.op, args.device)
    tasks = [Task(row, args.device, case, dtype, fixed) for row in rows for case in _cases(args, row)]
    for task in tasks:
        _ = task.space  # refuses unknown fields before anything is measured
    return tuple(tasks)


def _rows(op: str, device: str) -> list[Impl]:
    """Return the rows to tune: for an operation the first of its form, which is the one that calls get."""
    here = [row for row in NAMED if device.split(":")[0] in row.devices and row.config in TUNABLES]
    first = {name: next(row for row in here if row.form == form) for name, form in OPS.items()}
    known = first | {row.name: row for row in here}
    if op == "all":
        return list(first.values())
    if op not in known:
        raise UsageError(f"--op must be one of all, {', '.join(known)} on {device}, got {op}")
    return [known[op]]


def _cases(args: argparse.Namespace, row: Impl) -> tuple[Case, ...]:
    if args.preset:
        return PRESETS[args.preset][row.form]
    sizes = {name: usual if getattr(args, name) is None else getattr(args, name) for name, usual in SHAPE.items()}
    for name, x in sizes.items():
        if x < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {x}")
    if (K := sizes["head_dim"]) > 256:
        raise UsageError(f"--head-dim must be at most 256, got {K}")
    N, T, H = sizes["sequences"], sizes["tokens"], sizes["heads"]
    return (Case("tune", N, T, H, K, K, initial=row.form == "recurrent"),)


def _recorded(args: argparse.Namespace) -> Task:
    if not args.out:
        raise UsageError("--replay needs --out FOLDER: what was measured elsewhere is not for this machine")
    table = Recorded(args.replay)
    row, shape = find(table.implementation), table.shape
    case = Case("replay", shape.N, shape.T, shape.HV, shape.K, shape.V)
    return Task(row, "cpu", case, shape.dtype, table.fixed | dict(fixed_of(x) for x in args.fix), table)


def _provenance() -> dict:
    return {
        "versions": provenance.versions(("torch", "triton")),
        "sources": provenance.kernels(),
        "date": now(),
        "git": provenance.git(),
        "environment": provenance.environment() | {"threads": str(torch.get_num_threads())},
    }
