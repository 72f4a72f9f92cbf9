"""Judge one target: draw recipes, run every property on each, shrink what fails. This is what a worker process does."""

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from verify import coverage, interpreter, interpreter_foreign, mutants, probe, records
from verify.budget import INTERPRETED, demands_of, demands_of_replay
from verify.choice import own
from verify.claims import Property
from verify.drawing import budget_of, neutral, not_asked, seed_of, strategy_of
from verify.plan import COUNTED, LEAST, PROFILES, Demands, Plan
from verify.properties import PROPERTIES
from verify.properties.definition import reference_backward
from verify.recipes import Recipe, aimed, draw, drawn, from_json
from verify.resolve import resolve
from verify.stopwatch import WATCH
from verify.targets import Target, TargetError
from verify.trial import Measure, TargetRaised, Trial

Emit = Callable[..., None]


SHRUNK = 10
"""Properties of one target whose first failure is made small; one bug fails dozens, and a few small cases show it."""


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
    units: Counter[str] = field(default_factory=Counter)
    """Work done, by dtype."""

    def met(self, counts: dict[str, int]) -> None:
        """Keep the least that a demand came to in any case: repeats, and pairs and programs of a crowd."""
        for name in counts.keys() & set(LEAST):
            self.counts[name] = min(counts[name], self.counts.get(name, counts[name]))

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
    started = time.perf_counter()
    WATCH.spent.clear()
    target = _target(plan, emit)
    if plan.recipe:
        _judge_one(plan, target, emit)
        return
    chosen = [p for p in PROPERTIES if not plan.properties or p.name in plan.properties]
    tally, found = _earlier(plan)
    refused = [d for d in plan.dtypes if d not in target.dtypes]
    for dtype in plan.dtypes:
        if dtype in target.dtypes:
            found = _generate(plan, target, chosen, dtype, tally, emit) | found
            found = _aim(plan, target, chosen, dtype, tally, emit) | found
    WATCH.spent["all"] = time.perf_counter() - started
    told = {n: x for n, x in _once_each(found).items() if n not in plan.reported and not plan.kills}
    for i, (name, failure) in enumerate(told.items(), len(plan.reported)):
        _report(plan, target, name, failure, emit, shrink=i < SHRUNK and failure.number >= 0)
    emit(
        "target",
        target=plan.target,
        counts=tally.counts,
        refused=dict(target.refused),
        dtypes_refused=refused,
        not_asked=not_asked(plan, target, tally.missing(chosen), tally.empty),
        budget=budget.words() if (budget := budget_of(plan, target)) else None,
        seconds={name: round(WATCH.spent[name], 3) for name in ("all", "target", "definition")},
    )


def _earlier(plan: Plan) -> tuple[Tally, dict[str, Found]]:
    """Return what a killed run of the plan had counted, and found to fail."""
    tally, found = Tally(), {}
    for case in plan.earlier:
        tally.judged.update((name, case["dtype"]) for name in case["names"])
        for name in COUNTED:
            tally.counts[name] += case["counts"][name]
        tally.met(case["counts"])
        tally.units[case["dtype"]] += case["units"]
        for name, outcome in case["failing"].items():
            prop = next(p for p in PROPERTIES if p.name == name.removesuffix(records.INFINITE))
            worst = Measure(outcome["what"], float(outcome["observed"]), float(outcome["allowed"]), 1, outcome["where"])
            found.setdefault(name, Found(prop, from_json(case["recipe"]), worst, case["number"]))
    return tally, found


def _once_each(found: dict[str, Found]) -> dict[str, Found]:
    """Keep one failure of every property, in the order of the table: one with finite gates if there is one."""
    order = {p.name: i for i, p in enumerate(PROPERTIES)}
    names = [n for n in found if not (n.endswith(records.INFINITE) and n.removesuffix(records.INFINITE) in found)]
    return {n: found[n] for n in sorted(names, key=lambda n: order[n.removesuffix(records.INFINITE)])}


def _judge_one(plan: Plan, target: Target, emit: Emit) -> None:
    """Judge the plan's own recipe on its one property, and report what comes out as `judge` does."""
    prop = next(p for p in PROPERTIES if p.name == plan.properties[0])
    trial = Trial(target, from_json(plan.recipe), _demands(plan))
    _begin(plan, trial, emit, prop, 0)
    worst = _worst(prop, trial)
    results = {} if worst is None else {prop.name: records.outcome(worst)}
    emit(
        "case",
        target=plan.target,
        device=plan.device,
        recipe=plan.recipe,
        inputs=trial.inputs,
        results=results,
        gates={},
        coverage={},
        number=0,
        units=trial.units,
        counts=dict.fromkeys(COUNTED, 0),
    )
    if worst is not None and worst.ratio > 1:
        emit(
            "failure",
            target=plan.target,
            device=plan.device,
            property=prop.name,
            recipe=plan.recipe,
            steady=True,
            inputs=trial.inputs,
            config=plan.config,
            contract=plan.contract,
            **records.outcome(worst),
        )
    emit(
        "target",
        target=plan.target,
        counts=dict.fromkeys(COUNTED, 0) | {"cases": 1, "runs": trial.runs} | trial.met,
        **{"refused": {}, "dtypes_refused": [], "not_asked": {}, "budget": None},
        seconds=dict.fromkeys(("all", "target", "definition"), 0.0),
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
        if not own(plan.target):
            interpreter_foreign.adapt()
    config = Path(plan.config) if plan.config else None
    target = resolve(plan.target, plan.device, config, plan.contract, plan.adapter)
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


def _demands(plan: Plan) -> Demands:
    interpreted = plan.device == "interpret"
    return demands_of_replay(interpreted) if plan.recipe else demands_of(plan.profile, interpreted)


def _generate(
    plan: Plan, target: Target, chosen: list[Property], dtype: str, tally: Tally, emit: Emit
) -> dict[str, Found]:
    """Judge recipe after recipe; returns the first failure of every property."""
    found: dict[str, Found] = {}
    strategy, budget = strategy_of(plan, target, dtype), budget_of(plan, target)
    killed = sum(bool(case["failing"]) for case in plan.earlier if case["dtype"] == dtype)
    share = plan.shard[1] if budget else 1
    for number in plan.numbers(dtype):
        if plan.kills and killed >= plan.kills:
            break
        again = neutral(from_json(plan.first[-1 - number]), target) if number < 0 else None
        recipe = again or drawn(strategy, seed_of(plan, dtype, number))
        trial = Trial(target, recipe, _demands(plan))
        asked = [p for p in chosen if tally.left(p, recipe)]
        if budget:
            quota = -(-budget.quota(recipe.infinite) // share)
            asked = [p for p in asked if tally.judged[reported(p, recipe), dtype] < quota and p.applies(trial)]
            if not asked or tally.units[dtype] >= budget.units / share:
                continue
        failures = _judge_case(plan, trial, asked, number, tally, emit)
        tally.units[dtype] += trial.units
        for prop, name, worst in failures:
            found.setdefault(name, Found(prop, recipe, worst, number))
        killed += bool(failures)
    return found


def _aim(plan: Plan, target: Target, chosen: list[Property], dtype: str, tally: Tally, emit: Emit) -> dict[str, Found]:
    """Judge recipes that are steered towards the worst ratio, where the profile has some; returns what fails anew.

    They are numbered behind those that are drawn. A failure among them is not made smaller.
    """
    done = sum(case["dtype"] == dtype and case["number"] >= plan.examples for case in plan.earlier)
    left = -(-PROFILES[plan.profile].aimed // plan.shard[1]) - done
    found: dict[str, Found] = {}
    if left <= 0 or plan.kills or budget_of(plan, target):
        return found
    first = plan.examples + plan.shard[0] + done * plan.shard[1]
    numbers = itertools.count(first, plan.shard[1])

    def meet(recipe: Recipe) -> float:
        trial, number = Trial(target, recipe, _demands(plan)), next(numbers)
        asked = [p for p in chosen if tally.left(p, recipe)]
        largest: list[float] = []

        def listen(kind: str, **fields) -> None:
            if kind == "case":
                largest.extend(float(x["ratio"]) for x in fields["results"].values())
            emit(kind, **fields)

        for prop, name, worst in _judge_case(plan, trial, asked, number, tally, listen):
            found.setdefault(name, Found(prop, recipe, worst, -1))
        return min(max(largest, default=0.0), 1e6)

    aimed(strategy_of(plan, target, dtype), seed_of(plan, dtype, first), left, meet)
    return found


def _judge_case(
    plan: Plan, trial: Trial, chosen: list[Property], number: int, tally: Tally, emit: Emit
) -> list[tuple[Property, str, Measure]]:
    results, gates, failures, counts = {}, {}, [], tally.counts
    before, asking = counts.copy(), partial(_begin, plan, trial, emit, number=number)
    for name, prop, measures in _measured(trial, chosen, asking):
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
    tally.met(trial.met)
    recipe, terms = trial.recipe.to_json(), coverage.covered(trial.case, trial.yard)
    emit(
        "case",
        target=plan.target,
        device=plan.device,
        recipe=recipe,
        inputs=trial.inputs,
        results=results,
        gates=gates,
        coverage=terms,
        number=number,
        units=trial.units,
        counts={name: counts[name] - before[name] for name in COUNTED} | trial.met,
    )
    return failures


def _largest_by_gate(gates: dict[str, dict], measures: list[Measure]) -> None:
    """Keep the largest observation under every calibrated limit: what calibration reads."""
    for m in measures:
        if m.gate != "exact" and gates.get(m.gate, {"observed": -1.0})["observed"] < m.observed < math.inf:
            gates[m.gate] = {"observed": m.observed, "what": m.what}


def _measured(
    trial: Trial, chosen: list[Property], asking: Callable[[Property], None]
) -> Iterator[tuple[str, Property, list[Measure]]]:
    """Ask properties one after the other, and say so before: what ends the process is known then."""
    for prop in chosen:
        if prop.applies(trial):
            asking(prop)
            yield reported(prop, trial.recipe), prop, check(prop, trial)


def _begin(plan: Plan, trial: Trial, emit: Emit, prop: Property, number: int | None) -> None:
    """Say what is asked next; `number` is that of the case, None for one that was judged before."""
    name, recipe = reported(prop, trial.recipe), trial.recipe.to_json()
    emit("begin", target=plan.target, recipe=recipe, property=name, inputs=trial.inputs, number=number)


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
    trial = Trial(target, found.recipe, _demands(plan))
    _begin(plan, trial, emit, found.property, None)
    again = _worst(found.property, trial)
    steady = again is not None and again.ratio > 1
    recipe, measure = _shrink(plan, target, name, found, emit) if steady and shrink else (found.recipe, found.measure)
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


def _shrink(plan: Plan, target: Target, name: str, found: Found, emit: Emit) -> tuple[Recipe, Measure]:
    """Let Hypothesis meet the failure again and make it small: within attempts, in the interpreter units of work."""
    best, seen, spent = (found.recipe, found.measure), {}, 0
    interpreted = plan.device == "interpret"
    allowed = INTERPRETED[plan.profile, target.form].shrinking if interpreted else PROFILES[plan.profile].shrinks

    def failing(recipe: Recipe) -> Measure | None:
        nonlocal spent
        if recipe not in seen and name.endswith(records.INFINITE) == recipe.infinite:
            trial, worst = Trial(target, recipe, _demands(plan)), None
            if spent < allowed or not any(seen.values()):
                _begin(plan, trial, emit, found.property, None)
                worst = _worst(found.property, trial)
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
        draw(strategy_of(plan, target, dtype), seed_of(plan, dtype, found.number), meet, shrink=True)
    return best
