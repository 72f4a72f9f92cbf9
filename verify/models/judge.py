"""Judge one model: draw recipes, ask every property on each, shrink what fails. This is what a worker process does."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from verify import records
from verify.claims import Property
from verify.models import mutants, targets
from verify.models.properties import PROPERTIES
from verify.models.recipes import Recipe, from_json, neutral, recipes
from verify.models.targets import Model
from verify.models.trial import Trial
from verify.plan import PROFILES, Plan
from verify.recipes import draw, drawn
from verify.targets import TargetError
from verify.trial import Measure, TargetRaised

Emit = Callable[..., None]
Load = Callable[[Path], Model]

SHRUNK = 4
"""Properties whose first failure is made small; one bug fails nearly all of them."""


class _Falsified(Exception):
    """Tells Hypothesis that a recipe fails."""


@dataclass
class Tally:
    """What was done: counts, recipes by property, and the first failure of each, with its number."""

    counts: dict[str, int] = field(default_factory=lambda: {"cases": 0, "rows": 0, "runs": 0, "discarded": 0})
    judged: Counter[str] = field(default_factory=Counter)
    found: dict[str, tuple[Recipe, Measure, int]] = field(default_factory=dict)


def judge(plan: Plan, emit: Emit) -> None:
    """Run a plan; `emit(kind, **fields)` receives every record. Raises TargetError for a target that is not there."""
    load, tally = _loader(plan.target), Tally()
    chosen = [p for p in PROPERTIES if not plan.properties or p.name in plan.properties]
    if plan.recipe:
        _judge_recipe(plan, load, from_json(plan.recipe), 0, chosen, tally, emit)
    else:
        _judge_drawn(plan, load, chosen, tally, emit)
    for i, prop in enumerate(p for p in chosen if p.name in tally.found and not plan.kills):
        _report(plan, load, prop, tally.found[prop.name], emit, shrink=i < SHRUNK and plan.recipe is None)
    emit(
        "target",
        target=plan.target,
        counts=tally.counts,
        refused=_refused(load, plan),
        dtypes_refused=[],
        not_asked={p.name: "no drawn case fits" for p in chosen if p.name not in tally.judged and not plan.recipe},
        budget=None,
    )


def _loader(target: str) -> Load:
    if not target.startswith(targets.MUTANT):
        return targets.resolve(target)
    try:
        return mutants.find(target)
    except KeyError as error:
        raise TargetError(f"unknown mutant {error}") from error


def _strategy(plan: Plan, load: Load):
    refused = targets.refused(load)
    return recipes(PROFILES[plan.profile].tokens).map(lambda recipe: neutral(recipe, refused))


def _refused(load: Load, plan: Plan) -> dict[str, str]:
    """Say of every form that a model refuses how many of a hundred recipes have it."""
    met = [
        drawn(recipes(PROFILES[plan.profile].tokens), number) for number in range(100 if targets.refused(load) else 0)
    ]
    shares = {axis: sum(neutral(recipe, [axis]) != recipe for recipe in met) for axis in targets.refused(load)}
    return {axis: f"{share}% of the recipes" for axis, share in shares.items()}


def _judge_drawn(plan: Plan, load: Load, chosen: list[Property], tally: Tally, emit: Emit) -> None:
    strategy, killed = _strategy(plan, load), 0
    for number in range(plan.examples):
        recipe = drawn(strategy, _seed(plan, number))
        killed += _judge_recipe(plan, load, recipe, number, chosen, tally, emit)
        if plan.kills and killed >= plan.kills:
            return


def _judge_recipe(
    plan: Plan, load: Load, recipe: Recipe, number: int, chosen: list[Property], tally: Tally, emit: Emit
) -> bool:
    """Ask every property that applies; returns whether one failed."""
    trial, results, gates = Trial(load, recipe), {}, {}
    for prop in chosen:
        measures = check(prop, trial) if prop.applies(trial) else []
        if not measures:
            continue
        worst = max(measures, key=lambda m: m.ratio)
        results[prop.name] = records.outcome(worst)
        tally.judged[prop.name] += 1
        tally.counts["rows"] += sum(m.rows for m in measures)
        if worst.ratio > 1:
            tally.found.setdefault(prop.name, (recipe, worst, number))
    tally.counts["cases"] += 1
    tally.counts["runs"] += trial.runs
    emit(
        "case",
        target=plan.target,
        device=plan.device,
        recipe=recipe.to_json(),
        inputs=trial.checkpoint.digest(),
        results=results,
        gates=gates,
        coverage={},
    )
    return any(float(result["ratio"]) > 1 for result in results.values())


def check(prop: Property, trial: Trial) -> list[Measure]:
    """Measure a property; an exception out of the model is a failure of it, one of our own is not caught."""
    try:
        return list(prop.check(trial))
    except TargetRaised as error:
        return [Measure(f"raised {error}", float("inf"), 0)]


def _failing(prop: Property, load: Load, recipe: Recipe) -> Measure | None:
    trial = Trial(load, recipe)
    if not prop.applies(trial):
        return None
    worst = max(check(prop, trial), key=lambda m: m.ratio, default=None)
    return worst if worst is not None and worst.ratio > 1 else None


def _report(plan: Plan, load: Load, prop: Property, found: tuple, emit: Emit, shrink: bool) -> None:
    recipe, measure, number = found
    steady = _failing(prop, load, recipe) is not None
    if steady and shrink:
        recipe, measure = _shrunk(plan, load, prop, recipe, measure, number)
    emit(
        "failure",
        target=plan.target,
        device=plan.device,
        property=prop.name,
        recipe=recipe.to_json(),
        steady=steady,
        inputs=Trial(load, recipe).checkpoint.digest(),
        config=None,
        contract=None,
        **records.outcome(measure),
    )


def _shrunk(plan: Plan, load: Load, prop: Property, recipe: Recipe, measure: Measure, number: int):
    """Let Hypothesis meet the failure again and make it small, within the profile's attempts."""
    best, seen = (recipe, measure), {}

    def meet(candidate: Recipe) -> None:
        nonlocal best
        if candidate not in seen:
            seen[candidate] = _failing(prop, load, candidate) if len(seen) < PROFILES[plan.profile].shrinks else None
        if worst := seen[candidate]:
            best = candidate, worst
            raise _Falsified

    with contextlib.suppress(_Falsified):
        draw(_strategy(plan, load), _seed(plan, number), meet, shrink=True)
    return best


def _seed(plan: Plan, number: int) -> int:
    return plan.seed * 1_000_003 + number
