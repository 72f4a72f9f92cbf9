"""Print what can be tuned of an implementation: its fields, their values, and how many points each restriction removes.

Points are counted for one shape and one target: what fits one processor's shared memory may not fit another's, and a
tile larger than the tensor is the same launch as a smaller one. The fields of a kernel are a part of their own: the
search chooses them kernel by kernel, so that the parts add up instead of multiplying.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import torch
from rich.table import Table

from autotune import display, provenance
from autotune.arguments import DTYPES, implementation_of, problem_of, target_of
from autotune.outcomes import PASS, UsageError
from impls.configs import (
    SHARED,
    TUNABLES,
    ChunkTorchConfig,
    ChunkTritonConfig,
    DplrTorchConfig,
    DplrTritonConfig,
    RecurrentTritonConfig,
    invalid,
)
from impls.defaults import default_chunk, default_dplr, default_recurrent
from impls.footprint import shared_memory
from impls.plan import Problem, tile_of
from impls.table import NAMED, Impl
from impls.targets import TARGETS, Target

SUMMARY = "print what can be tuned, and what restricts it"
DENYLIST = json.loads(Path(__file__).with_name("denylist.json").read_text())
"""Known failures of compilers, with where they are described."""
EPILOG = """\
examples   python -m autotune space chunk_torch
           python -m autotune space dplr_triton
           python -m autotune space chunk_triton --target sm_100 --shape T=8192,H=64,K=128,V=128 --dtype bfloat16
"""


@dataclass(frozen=True)
class Setting:
    """Say for what is tuned: a shape and dtype, and the processor; target None is a CPU."""

    problem: Problem
    target: Target | None = None


@dataclass(frozen=True)
class Restriction:
    """Remove points: `removes(config)` looks at the fields of `part` and at the shared ones only."""

    name: str
    removes: Callable[[object], bool]
    part: str = SHARED


@dataclass(frozen=True)
class Count:
    """How many points there are, how many each restriction removes of what earlier ones left, and what is left."""

    points: int
    removed: dict[str, int]
    left: int
    parts: dict[str, int]
    """How many distinct configurations of each part, with the shared fields, are left."""


@dataclass(frozen=True)
class Space:
    """The configurations of one implementation that can run in one setting."""

    implementation: str
    kind: type
    parts: dict[str, dict[str, tuple]]
    restrictions: tuple[Restriction, ...]
    fixed: dict[str, object] = field(default_factory=dict)
    """Fields that are not searched, with their value."""

    @property
    def size(self) -> int:
        """Return the number of points before any restriction."""
        return math.prod(len(values) for part in self.parts.values() for values in part.values())

    @property
    def fingerprint(self) -> str:
        """Return a hash of fields, values and restrictions: equal ones are the same space."""
        told = [self.implementation, self.parts, self.fixed, [r.name for r in self.restrictions]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def points(self) -> Iterator[object]:
        """Yield every configuration that no restriction removes, in the order of the values."""
        for shared in self._choices(SHARED):
            if self._removed(shared, SHARED):
                continue
            own = [
                [x for x in self._choices(part) if not self._removed(shared | x, part)]
                for part in self.parts
                if part != SHARED
            ]
            for others in itertools.product(*own):
                yield self._config(shared | {name: x for other in others for name, x in other.items()})

    def admits(self, config) -> bool:
        """Tell whether a configuration is a point that no restriction removes."""
        chosen = asdict(config)
        values = {name: x for part in self.parts.values() for name, x in part.items()}
        listed = all(chosen[name] in x for name, x in values.items())
        return listed and not any(restriction.removes(config) for restriction in self.restrictions)

    def draws(self, seed: str) -> Iterator[object]:
        """Yield random configurations of which none is removed, drawn with repetition; the same for the same seed."""
        draw = random.Random(seed)
        values = {name: x for part in self.parts.values() for name, x in part.items()}
        while True:
            config = self._config({name: draw.choice(x) for name, x in values.items()})
            if self.admits(config):
                yield config

    def counted(self) -> Count:
        """Count the points, part by part: the product itself may have millions."""
        removed = {restriction.name: 0 for restriction in self.restrictions}
        own = [part for part in self.parts if part != SHARED]
        sizes = {part: math.prod(map(len, self.parts[part].values())) for part in own}
        left, left_of = 0, dict.fromkeys(self.parts, 0)
        for shared in self._choices(SHARED):
            if by := self._removed(shared, SHARED):
                removed[by] += math.prod(sizes.values())
                continue
            left_of[SHARED] += 1
            kept = 1
            for i, part in enumerate(own):
                behind = math.prod(sizes[x] for x in own[i + 1 :])
                names = [self._removed(shared | x, part) for x in self._choices(part)]
                for by in filter(None, names):
                    removed[by] += kept * behind
                left_of[part] += names.count(None)
                kept *= names.count(None)
            left += kept
        return Count(self.size, removed, left, left_of)

    def _choices(self, part: str) -> Iterator[dict[str, object]]:
        values = self.parts[part]
        return (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))

    def _config(self, chosen: dict[str, object]):
        return self.kind(**self.fixed, **chosen)

    def _removed(self, chosen: dict[str, object], part: str) -> str | None:
        config = self._config(chosen)
        return next((r.name for r in self.restrictions if r.part == part and r.removes(config)), None)


def space_of(implementation: Impl, setting: Setting, fixed: dict[str, object] | None = None) -> Space:
    """Return the space of an implementation in a setting; `fixed` fields keep the value given.

    Raises UsageError for an implementation without a configuration and for a fixed field or value that does not exist.
    """
    if implementation.config not in TUNABLES:
        raise UsageError(f"{implementation.name} has nothing to tune")
    kind, fixed = implementation.config, fixed or {}
    known = {x.name for x in fields(kind)}
    if unknown := [name for name in fixed if name not in known]:
        raise UsageError(f"--fix {unknown[0]}: {implementation.name} has {', '.join(sorted(known))}")
    parts = {
        part: {name: values for name, values in own.items() if name not in fixed}
        for part, own in TUNABLES[kind].items()
    }
    if reason := invalid(kind(**fixed)):
        raise UsageError(f"--fix: {reason}")
    return Space(implementation.name, kind, parts, _restrictions(implementation, setting), fixed)


DEFAULTS = {
    ChunkTritonConfig: default_chunk,
    RecurrentTritonConfig: default_recurrent,
    DplrTritonConfig: default_dplr,
}


def usual_of(space: Space, setting: Setting):
    """Return the configuration that a call has which names none and which nothing was tuned for."""
    p, target = setting.problem, setting.target
    choose = DEFAULTS.get(space.kind)
    return choose(p.K, p.V, p.dtype, target) if choose else space.kind()


def _restrictions(implementation: Impl, setting: Setting) -> tuple[Restriction, ...]:
    problem, target = setting.problem, setting.target
    found = [Restriction("cannot run: impls.configs.invalid", lambda config: invalid(config) is not None)]
    if implementation.config is ChunkTorchConfig:
        most = torch.get_num_threads()
        found.append(Restriction(f"as many threads as the {most} there are, or more", lambda c: c.threads >= most))
    if implementation.config in (ChunkTorchConfig, DplrTorchConfig):
        return (*found, *_same_blocks(problem, implementation.config))
    if target is None:
        return tuple(found)
    tile = tile_of(problem.V)
    found.append(Restriction(f"value tile larger than V = {problem.V}", lambda config: config.value_tile > tile))
    if target.backend == "hip":
        capped = [x.name for x in fields(implementation.config) if x.name.endswith("registers")]
        for name in capped:
            part = _part(implementation.config, name)
            found.append(Restriction(f"{name}: AMD takes no cap", lambda c, name=name: getattr(c, name) > 0, part))
    found += _fitting(implementation, setting)
    rows = (row for row in DENYLIST if _concerns(row, implementation, target))
    return (*found, *(_denied(row, implementation.config) for row in rows))


def _same_blocks(problem: Problem, kind: type) -> Iterator[Restriction]:
    """Restrict blocks that hold no more than smaller ones: those beyond the smallest value that covers everything."""
    values, pairs, longest = TUNABLES[kind][SHARED], problem.N * problem.HV, problem.T

    def enough(name: str, size: int) -> int:
        return next((x for x in values[name] if x >= size), values[name][-1])

    if "heads" in values:
        heads = enough("heads", pairs)
        yield Restriction(f"more heads at a time than {pairs} pairs of sequence and head", lambda c: c.heads > heads)
    tokens = enough("block_tokens", longest)
    yield Restriction(
        f"blocks longer than T = {longest}", lambda config: config.block_tokens > max(tokens, config.chunk_size)
    )


def _fitting(implementation: Impl, setting: Setting) -> Iterator[Restriction]:
    """Restrict what needs more shared memory than the target has, kernel by kernel, by `impls.footprint`."""
    limit = setting.target.shared_memory

    @cache
    def needed(config) -> dict[str, int]:
        return shared_memory(config, setting.problem, setting.target)

    kernels = ("recurrent",) if implementation.config is RecurrentTritonConfig else ("intra", "walk")
    for kernel in kernels:
        part = kernel if kernel in TUNABLES[implementation.config] else SHARED
        yield Restriction(
            f"{kernel} needs more than {limit} bytes of shared memory",
            lambda config, kernel=kernel: needed(config)[kernel] > limit,
            part,
        )


def _part(kind: type, name: str) -> str:
    return next(part for part, own in TUNABLES[kind].items() if name in own)


def _concerns(row: dict, implementation: Impl, target: Target) -> bool:
    if row["implementation"] != implementation.name or target.name not in row["targets"]:
        return False
    version = provenance.versions(("triton",))["triton"] or ""
    return row["triton"] is None or version.split(".")[:2] == row["triton"].split(".")


def _denied(row: dict, kind: type) -> Restriction:
    parts = {_part(kind, name) for name in row["fields"]} - {SHARED}
    assert len(parts) <= 1, "a row of the denylist looks at one kernel"
    return Restriction(
        f"denied: {row['reason']}",
        lambda config: all(getattr(config, name) in values for name, values in row["fields"].items()),
        parts.pop() if parts else SHARED,
    )


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("op", metavar="OP", help=f"implementation: {', '.join(x.name for x in NAMED)}")
    targets = ", ".join(name for name, x in TARGETS.items() if x.backend != "interpret")
    p.add_argument("--target", metavar="NAME", help=f"cpu, {targets}; default cpu, and sm_90 for Triton")
    shape = "T, H, HV, K, V, N (packed where above 1); default T=8192,H=64,K=128,V=128"
    p.add_argument("--shape", default="", metavar="T=N,H=N,...", help=shape)
    p.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default %(default)s")
    p.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    implementation = implementation_of(args.op)
    setting = Setting(problem_of(args.shape, args.dtype), target_of(implementation, args.target))
    space = space_of(implementation, setting)
    count, page = space.counted(), display.console()
    if args.json:
        print(json.dumps({"fields": space.parts, "fingerprint": space.fingerprint, **asdict(count)}, indent=1))
        return PASS
    laid = Table(title=f"{space.implementation}, space {space.fingerprint}", title_justify="left")
    for name in ("part", "field", "values"):
        laid.add_column(name, no_wrap=name != "values")
    for part, own in space.parts.items():
        for name, values in own.items():
            laid.add_row(part, name, ", ".join(map(str, values)))
    page.print(laid)
    page.print(f"{count.points:,} points")
    for name, removed in count.removed.items():
        page.print(f"  - {removed:,}  {name}", markup=False, soft_wrap=True)
    page.print(f"= {count.left:,} left" + _by_part(count))
    return PASS


def _by_part(count: Count) -> str:
    if len(count.parts) == 1:
        return ""
    return "; searched part by part: " + " + ".join(f"{n:,} of {part}" for part, n in count.parts.items())
