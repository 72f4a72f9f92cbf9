"""Compile configurations and order them by an estimate of their time, with no GPU: for ordering only."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from autotune.compiling import Compiler
from autotune.space import Setting, Space
from autotune.timing import Box
from impls.compiler_triton import Job, Resources
from impls.configs import SHARED
from impls.estimate import estimated
from impls.plan import Launch, Plan, Problem
from impls.targets import Target
from impls.traffic import counted


@dataclass(frozen=True)
class Ranked:
    """One configuration: the microseconds of its launches by estimate, or what is wrong with it."""

    config: object
    launches: dict[str, float]
    resources: dict[str, dict]
    trouble: str | None

    @property
    def microseconds(self) -> float:
        """Return the sum over the launches; infinite where something is wrong."""
        return float("inf") if self.trouble else sum(self.launches.values())

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        total = None if self.trouble else self.microseconds
        parts = {"launches": self.launches, "resources": self.resources, "trouble": self.trouble}
        return {"config": asdict(self.config), "microseconds": total, **parts}


class Ranking:
    """The configurations that were compiled for one setting, and the compiler."""

    def __init__(self, space: Space, setting: Setting, compiler: Compiler, box: Box):
        self.space, self.problem, self.target = space, setting.problem, setting.target
        self.compiler, self.box, self.known = compiler, box, {}

    def rank(self, configs: list) -> None:
        """Compile what is new of these; what the box cuts off stays unknown."""
        new = [x for x in dict.fromkeys(configs) if x not in self.known and self.space.admits(x)]
        plans = {config: self._plan(config) for config in new}
        jobs = {config: [self._job(config, x) for x in plan.launches] for config, plan in plans.items()}
        found = self.compiler.outcomes((job for own in jobs.values() for job in own), self.box)
        for config, own in jobs.items():
            if all(job in found for job in own):
                self.known[config] = ranked(config, plans[config], [found[x] for x in own], self.problem, self.target)

    def _plan(self, config) -> Plan:
        return Job(self.problem, config, self.target, "").plan

    def _job(self, config, launch: Launch) -> Job:
        """Return the job of a launch, with the fields of other kernels at their defaults: equal kernels are one job."""
        own = self.space.parts.get(launch.name if launch.name in self.space.parts else "walk", {})
        shared = self.space.parts[SHARED]
        usual = self.space.kind()
        others = {
            name: getattr(usual, name)
            for name in asdict(config)
            if name not in own and name not in shared and name not in self.space.fixed
        }
        return Job(self.problem, replace(config, **others), self.target, launch.name)

    def best(self) -> Ranked | None:
        """Return the configuration of the least estimate, None where everything known is in trouble."""
        found = min(self.known.values(), key=lambda x: x.microseconds, default=None)
        return found if found and not found.trouble else None

    def descend(self, start) -> Iterator[Ranked]:
        """Go downhill from a configuration, one field at a time; yields the best so far after every field."""
        self.rank([start])
        here, fields = start, [(name, x) for part in self.space.parts.values() for name, x in part.items()]
        while True:
            before = here
            for name, values in fields:
                self.rank([replace(here, **{name: value}) for value in values])
                if best := self.best():
                    here = best.config
                    yield best
            if here == before or not self.box.left:
                return


def ranked(config, plan: Plan, results: list[Resources | str], problem: Problem, target: Target) -> Ranked:
    """Estimate the launches of a plan from what the compiler made of them."""
    told, launches, trouble = {}, {}, []
    moved = counted(plan, problem)
    for launch, result, traffic in zip(plan.launches, results, moved, strict=True):
        if isinstance(result, str):
            trouble.append(f"{launch.name}: {result}")
            continue
        told[launch.name] = {
            "registers": result.registers, "stack": result.stack, "shared_memory": result.shared_memory,
            "warps": result.warps, **asdict(result.code),
        }  # fmt: skip
        if result.spilled:
            trouble.append(f"{launch.name} spills")
        if result.shared_memory > target.shared_memory:
            trouble.append(f"{launch.name} needs {result.shared_memory} of {target.shared_memory} bytes")
        steps = _steps(launch, plan, problem)
        estimate = estimated(result, launch.programs, steps, traffic.moved, target)
        launches[launch.name] = launches.get(launch.name, 0.0) + estimate.microseconds
    return Ranked(config, launches, told, "; ".join(trouble) or None)


def _steps(launch: Launch, plan: Plan, problem: Problem) -> int:
    """Return how often a program runs its loop: chunks of a walk, tokens of a recurrence, segments to combine."""
    longest = -(-problem.T // problem.N)
    if launch.name == "recurrent":
        return longest
    if launch.name == "intra":
        return 0
    segment = min(plan.scalars.get("segment", longest), longest)
    return -(-longest // segment) if launch.name == "combine" else -(-segment // launch.constants["C"])
