"""Which recipes a plan draws for a target, and why a property was asked on none of them."""

from dataclasses import replace

from verify import captured, probe
from verify.budget import HEADS, INTERPRETED, Budget
from verify.claims import Property
from verify.plan import PROFILES, Plan
from verify.recipes import AXES, DIMS, DTYPES, Recipe, drawn, recipes
from verify.targets import Target
from verify.trial import Trial

LOOKED_AT = 32
"""Recipes among which a case is sought that a property would take if its target took one axis more."""


def not_asked(plan: Plan, target: Target, missing: list[Property], empty: set[str]) -> dict[str, str]:
    """Say for each property that compared nothing why: its cases were empty, an axis is closed, or no case fits."""
    dtypes = [d for d in plan.dtypes if d in target.dtypes]
    if plan.kills or not missing or not dtypes:
        return {}
    strategy = _recipes(plan, target, tuple(dtypes), probe.CHUNKS)
    met = [drawn(strategy, number) for number in range(LOOKED_AT)]

    def fits(prop: Property, taker: Target) -> list[bool]:
        return [prop.applies(Trial(taker, neutral(recipe, taker))) for recipe in met]

    reasons, none = {}, "no case within the budget fits" if budget_of(plan, target) else "no drawn case fits"
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


def budget_of(plan: Plan, target: Target) -> Budget | None:
    """Return what the interpreter can afford; None on other devices, and where a number of recipes was asked for."""
    return INTERPRETED[plan.profile, target.form] if plan.device == "interpret" and plan.budgeted else None


def _recipes(plan: Plan, target: Target, dtypes: tuple[str, ...], chunks: tuple[int, ...]):
    """Return the recipes of a plan: those of its profile, smaller in the interpreter."""
    profile, inputs = PROFILES[plan.profile], plan.inputs
    head_dims = plan.head_dims or (captured.head_dims(inputs) if inputs else (*DIMS, *profile.wide))
    tokens, few = profile.tokens, {}
    if plan.device == "interpret":
        tokens, few = INTERPRETED[plan.profile, target.form].tokens, {"heads": HEADS, "tall": ()}
    made = recipes(dtypes, tokens=tokens, work=profile.work, chunks=chunks, head_dims=head_dims, **few)
    return made.map(lambda recipe: captured.recast(recipe, inputs)) if inputs else made


def strategy_of(plan: Plan, target: Target, dtype: str):
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
        recipe = target.settle(recipe)
    return recipe


def seed_of(plan: Plan, dtype: str, number: int) -> int:
    return (plan.seed * 1_000_003 + number) * len(DTYPES) + DTYPES.index(dtype)
