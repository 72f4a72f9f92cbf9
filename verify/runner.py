"""Judge one target: draw recipes, run every property on each, shrink what fails. This is what a worker process does."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from verify import coverage, interpreter, mutants, probe, records
from verify.budget import HEADS, INTERPRETED, Budget, demands_of
from verify.claims import Property
from verify.plan import PROFILES, Demands, Plan
from verify.properties import PROPERTIES
from verify.properties.definition import reference_backward
from verify.recipes import AXES, DIMS, DTYPES, Recipe, draw, drawn, from_json, recipes
from verify.targets import Target, TargetError, resolve
from verify.trial import Measure, TargetRaised, Trial

Emit = Callable[..., None]


LOOKED_AT = 32
"""Recipes among which a case is sought that a property would take if its target took one axis more."""

SHRUNK = 10
"""Properties of one target whose first failure is made small; one bug fails dozens, and a few small cases show it."""


COUNTED = ("cases", "rows", "runs", "discarded", "backward")


class _Falsified(Exception):
    """Tells Hypothesis that a recipe fails."""


@dataclass
class Found:
    """The first failure of a property under a regime, with how it can be met again."""

    property: Property
    recipe: Recipe
    measure: Measure
    number: int


@dataclass
class Tally:
    """What was done to one target: counts, properties that compared something, and those that met an empty case."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    judged: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Recipes by property (those with gates of minus infinity apart) and dtype."""
    empty: set[str] = field(default_factory=set)

    def met(self, trial: Trial) -> None:
        """Keep the least that a demand came to in any trial: repeats, and pairs and programs of a crowd."""
        for name, x in trial.met.items():
            self.counts[name] = min(x, self.counts.get(name, x))

    def left(self, prop: Property, recipe: Recipe) -> bool:
        """Tell whether a property is asked on another recipe of this kind."""
        return prop.most is None or self.judged[reported(prop, recipe), recipe.dtype] < prop.most

    def missing(self, chosen: list[Property]) -> list[Property]:
        """Return the properties that compared nothing."""
        names = {name.removesuffix(records.INFINITE) for name, _ in self.judged}
        return [p for p in chosen if p.name not in names]


def reported(prop: Property, recipe: Recipe) -> str:
    """Return the name under which a property's results on a recipe are reported."""
    return prop.name + (records.INFINITE if recipe.infinite else "")


def judge(plan: Plan, emit: Emit) -> None:
    """Run a plan; `emit(kind, **fields)` receives every record."""
    target = _target(plan, emit)
    if plan.recipe:
        _judge_one(plan, target, emit)
        return
    chosen = [p for p in PROPERTIES if not plan.properties or p.name in plan.properties]
    tally = Tally()
    refused = [d for d in plan.dtypes if d not in target.dtypes]
    found: dict[str, Found] = {}
    for dtype in plan.dtypes:
        if dtype in target.dtypes:
            found = _generate(plan, target, chosen, dtype, tally, emit) | found
    for i, (name, failure) in enumerate(_once_each(found).items() if not plan.kills else ()):
        _report(plan, target, name, failure, emit, shrink=i < SHRUNK)
    emit(
        "target",
        target=plan.target,
        counts=tally.counts,
        refused=dict(target.refused),
        dtypes_refused=refused,
        not_asked=_not_asked(plan, target, tally.missing(chosen), tally.empty),
        budget=budget.words() if (budget := _budget(plan, target)) else None,
    )


def _once_each(found: dict[str, Found]) -> dict[str, Found]:
    """Keep one failure of every property, in the order of the table: one with finite gates if there is one."""
    order = {p.name: i for i, p in enumerate(PROPERTIES)}
    names = [n for n in found if not (n.endswith(records.INFINITE) and n.removesuffix(records.INFINITE) in found)]
    return {n: found[n] for n in sorted(names, key=lambda n: order[n.removesuffix(records.INFINITE)])}


def _judge_one(plan: Plan, target: Target, emit: Emit) -> None:
    """Judge the plan's own recipe on its one property, and report what comes out as `judge` does."""
    recipe, prop = from_json(plan.recipe), next(p for p in PROPERTIES if p.name == plan.properties[0])
    trial = Trial(target, recipe, _demands(plan))
    worst = _worst(prop, trial)
    results = {} if worst is None else {prop.name: records.outcome(worst)}
    emit(
        "case",
        target=plan.target,
        device=plan.device,
        recipe=plan.recipe,
        inputs=trial.case.digest(),
        results=results,
        coverage={},
    )
    if worst is not None and worst.ratio > 1:
        emit(
            "failure",
            target=plan.target,
            device=plan.device,
            property=prop.name,
            recipe=plan.recipe,
            steady=True,
            inputs=trial.case.digest(),
            config=plan.config,
            contract=plan.contract,
            **records.outcome(worst),
        )
    emit(
        "target",
        target=plan.target,
        counts=dict.fromkeys(COUNTED, 0) | {"cases": 1, "runs": trial.runs} | trial.met,
        refused={},
        dtypes_refused=[],
        not_asked={},
        budget=None,
    )


def load(plan: Plan) -> Target:
    """Find the target of a plan. Raises TargetError for a target that does not exist, or a device that is not here."""
    if plan.target.startswith("mutant:"):
        try:
            return mutants.target_of(mutants.find(plan.target.removeprefix("mutant:")))
        except KeyError as error:
            raise TargetError(error.args[0]) from error
    if plan.device == "interpret":
        try:
            interpreter.repair()
        except RuntimeError as error:
            raise TargetError(f"--device interpret: {error}") from error
    target = resolve(plan.target, plan.device, Path(plan.config) if plan.config else None, plan.contract)
    try:
        torch.empty(0, device=target.place)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TargetError(f"--device {plan.device}: {reason}") from error
    return target


def _target(plan: Plan, emit: Emit) -> Target:
    target = load(plan)
    if not target.foreign:
        return target
    probes = probe.probe(target, plan.dtypes)
    for p in probes if plan.recipe is None else ():
        emit("probe", target=plan.target, axis=p.axis, outcome=p.outcome, reason=p.reason, share=p.share)
    return probe.restrict(target, probes)


def _not_asked(plan: Plan, target: Target, missing: list[Property], empty: set[str]) -> dict[str, str]:
    """Say for each property that compared nothing why: its cases were empty, an axis is closed, or no case fits."""
    dtypes = [d for d in plan.dtypes if d in target.dtypes]
    if plan.kills or not missing or not dtypes:
        return {}
    strategy = _recipes(plan, target, tuple(dtypes), probe.CHUNKS)
    met = [drawn(strategy, number) for number in range(LOOKED_AT)]

    def fits(prop: Property, taker: Target) -> list[bool]:
        return [prop.applies(Trial(taker, neutral(recipe, taker))) for recipe in met]

    reasons, none = {}, "no case within the budget fits" if _budget(plan, target) else "no drawn case fits"
    for prop in missing:
        now = fits(prop, target)
        axes = [axis for axis in sorted(_closed(target)) if fits(prop, _opened(target, axis)) != now]
        reasons[prop.name] = f"{' or '.join(axes)} not taken" if axes else none
    return reasons | dict.fromkeys((p.name for p in missing if p.name in empty), "nothing to compare in its cases")


def _closed(target: Target) -> set[str]:
    """Return the axes of the domain that a target does not take."""
    missing = {"chunk_size": not target.chunks, "backward": not target.backward}
    return {axis for axis in target.refused if axis not in DTYPES} | {axis for axis in missing if missing[axis]}


def _opened(target: Target, axis: str) -> Target:
    """Return the target as if it took an axis."""
    return replace(
        target,
        refused={name: reason for name, reason in target.refused.items() if name != axis},
        backward=target.backward or axis == "backward",
        chunks=target.chunks or (probe.CHUNKS if axis == "chunk_size" else ()),
    )


def _demands(plan: Plan) -> Demands:
    """Return what is asked of one recipe; of a replayed one the most, since its file does not name a profile."""
    return demands_of("tune" if plan.recipe else plan.profile, plan.device == "interpret")


def _budget(plan: Plan, target: Target) -> Budget | None:
    """Return what the interpreter can afford; None on other devices, and where a number of recipes was asked for."""
    return INTERPRETED[plan.profile, target.form] if plan.device == "interpret" and plan.budgeted else None


def _recipes(plan: Plan, target: Target, dtypes: tuple[str, ...], chunks: tuple[int, ...]):
    """Return the recipes of a plan: those of its profile, smaller in the interpreter."""
    profile, head_dims = PROFILES[plan.profile], plan.head_dims or DIMS
    if plan.device != "interpret":
        return recipes(dtypes, tokens=profile.tokens, work=profile.work, chunks=chunks, head_dims=head_dims)
    tokens, work = INTERPRETED[plan.profile, target.form].tokens, profile.work
    return recipes(dtypes, tokens=tokens, work=work, chunks=chunks, heads=HEADS, tall=(), head_dims=head_dims)


def _strategy(plan: Plan, target: Target, dtype: str):
    return _recipes(plan, target, (dtype,), target.chunks).map(lambda recipe: neutral(recipe, target))


def neutral(recipe: Recipe, target: Target) -> Recipe:
    """Return the recipe's neutral form along every axis that the target refuses.

    One axis may lead into another (without a gate inside, gates of minus infinity count), so it goes around until
    nothing changes.
    """
    before = None
    while recipe != before:
        before = recipe
        for axis in target.refused:
            recipe = AXES[axis](recipe) if axis in AXES else recipe
    return recipe


def _generate(
    plan: Plan, target: Target, chosen: list[Property], dtype: str, tally: Tally, emit: Emit
) -> dict[str, Found]:
    """Judge recipe after recipe; returns the first failure of every property."""
    found: dict[str, Found] = {}
    strategy, killed, units, budget = _strategy(plan, target, dtype), 0, 0, _budget(plan, target)
    for number in range(plan.examples):
        recipe = drawn(strategy, _seed(plan, dtype, number))
        trial = Trial(target, recipe, _demands(plan))
        asked = [p for p in chosen if tally.left(p, recipe)]
        if budget:
            quota = budget.quota(recipe.infinite)
            asked = [p for p in asked if tally.judged[reported(p, recipe), dtype] < quota and p.applies(trial)]
            if not asked or units >= budget.units:
                continue
        failures = _judge_case(plan, trial, asked, tally, emit)
        units += trial.units
        for prop, name, worst in failures:
            found.setdefault(name, Found(prop, recipe, worst, number))
        killed += bool(failures)
        if plan.kills and killed >= plan.kills:
            break
    return found


def _judge_case(
    plan: Plan, trial: Trial, chosen: list[Property], tally: Tally, emit: Emit
) -> list[tuple[Property, str, Measure]]:
    results, gates, failures, counts = {}, {}, [], tally.counts
    for name, prop, measures in _measured(trial, chosen):
        worst = worst_of(measures)
        if worst is None:
            tally.empty.add(prop.name)
            counts["discarded"] += 1
            continue
        tally.judged[name, trial.recipe.dtype] += 1
        counts["rows"] += sum(m.rows for m in measures)
        results[name] = records.outcome(worst)
        _largest_by_gate(gates, measures)
        if worst.ratio > 1:
            failures.append((prop, name, worst))
    counts["cases"] += 1
    counts["runs"] += trial.runs
    counts["backward"] += reported(reference_backward, trial.recipe) in results
    tally.met(trial)
    recipe, terms = trial.recipe.to_json(), coverage.covered(trial.case, trial.yard)
    emit(
        "case",
        target=plan.target,
        device=plan.device,
        recipe=recipe,
        inputs=trial.case.digest(),
        results=results,
        gates=gates,
        coverage=terms,
    )
    return failures


def _largest_by_gate(gates: dict[str, dict], measures: list[Measure]) -> None:
    """Keep the largest observation under every calibrated limit: what calibration reads."""
    for m in measures:
        if m.gate != "exact" and gates.get(m.gate, {"observed": -1.0})["observed"] < m.observed < math.inf:
            gates[m.gate] = {"observed": m.observed, "what": m.what}


def _seed(plan: Plan, dtype: str, number: int) -> int:
    return (plan.seed * 1_000_003 + number) * len(DTYPES) + DTYPES.index(dtype)


def _measured(trial: Trial, chosen: list[Property]) -> Iterator[tuple[str, Property, list[Measure]]]:
    for prop in chosen:
        if prop.applies(trial):
            yield reported(prop, trial.recipe), prop, check(prop, trial)


def check(prop: Property, trial: Trial) -> list[Measure]:
    """Measure a property; an exception out of the target is a failure of it, one of our own is not caught."""
    try:
        return list(prop.check(trial))
    except TargetRaised as error:
        return [Measure(f"raised {error}", math.inf, 0)]


def worst_of(measures: list[Measure]) -> Measure | None:
    """Return the worst measure, None where nothing was compared; a failure counts whatever it compared."""
    worst = max(measures, key=lambda m: m.ratio, default=None)
    return worst if worst and (worst.ratio > 1 or any(m.rows for m in measures)) else None


def _worst(prop: Property, trial: Trial) -> Measure | None:
    return worst_of(check(prop, trial)) if prop.applies(trial) else None


def _report(plan: Plan, target: Target, name: str, found: Found, emit: Emit, shrink: bool) -> None:
    again = _worst(found.property, Trial(target, found.recipe, _demands(plan)))
    steady = again is not None and again.ratio > 1
    recipe, measure = _shrink(plan, target, name, found) if steady and shrink else (found.recipe, found.measure)
    emit(
        "failure",
        target=plan.target,
        device=plan.device,
        property=name,
        recipe=recipe.to_json(),
        steady=steady,
        inputs=Trial(target, recipe).case.digest(),
        config=plan.config,
        contract=plan.contract,
        **records.outcome(measure),
    )


def _shrink(plan: Plan, target: Target, name: str, found: Found) -> tuple[Recipe, Measure]:
    """Let Hypothesis meet the failure again and make it small: within attempts, in the interpreter units of work."""
    best, seen, spent = (found.recipe, found.measure), {}, 0
    interpreted = plan.device == "interpret"
    allowed = INTERPRETED[plan.profile, target.form].shrinking if interpreted else PROFILES[plan.profile].shrinks

    def failing(recipe: Recipe) -> Measure | None:
        nonlocal spent
        if recipe not in seen and name.endswith(records.INFINITE) == recipe.infinite:
            trial = Trial(target, recipe, _demands(plan))
            worst = _worst(found.property, trial) if spent < allowed or not any(seen.values()) else None
            spent += (max(trial.units, 1) if interpreted else 1) if any(seen.values()) else 0
            seen[recipe] = worst if worst is not None and worst.ratio > 1 else None
        return seen.get(recipe)

    def meet(recipe: Recipe) -> None:
        nonlocal best
        if worst := failing(recipe):
            best = recipe, worst
            raise _Falsified

    dtype = found.recipe.dtype
    with contextlib.suppress(_Falsified):
        draw(_strategy(plan, target, dtype), _seed(plan, dtype, found.number), meet, shrink=True)
    return best
