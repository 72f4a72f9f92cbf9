"""Recipes of tiny models and of the texts that they read: words and integers, drawn and shrunk by Hypothesis.

Every field's first or smallest value is the simplest one: that is where shrinking leads.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from hypothesis import strategies as st

VERSION = 1

GATES = ("softplus", "lower_bound", "per_head")
DECAYS = ("mild", "long_memory", "strong")
ROUTERS = ("even", "biased", "all_tied", "some_tied")
VOCABULARY = 19


@dataclass(frozen=True)
class Recipe:
    """One model with random weights, and texts for it.

    layers: k for KDA and m for MLA. dense: layers at the beginning that have one MLP. prompts: tokens of each text that
    are read at once; tail: tokens of every text that are decoded behind it.
    """

    seed: int = 0
    layers: str = "k"
    dense: int = 1
    width: int = 4
    kda_heads: int = 1
    head_dim: int = 2
    taps: int = 2
    mla_heads: int = 1
    latent: int = 2
    nope: int = 1
    rope: int = 1
    value: int = 1
    experts: int = 2
    top_k: int = 1
    groups: int = 1
    top_groups: int = 1
    shared: int = 1
    gate: str = "softplus"
    decay: str = "mild"
    full_rank_gate: bool = False
    full_rank_forget: bool = False
    router: str = "even"
    renormalise: bool = True
    biased_weights: bool = False
    plain_eps: bool = False
    """The norm of the latents has the eps of the other norms."""
    count_from: int = 1
    boundary: int = 0
    """A cache is cut back to multiples of so many tokens; 0: to none."""
    prompts: tuple[int, ...] = (1,)
    tail: int = 1

    @property
    def tied(self) -> bool:
        """True if experts have equal scores by design, and a layer chooses among them."""
        return self.router.endswith("tied") and self.dense < len(self.layers)

    def to_json(self) -> dict:
        """Return a dictionary of JSON values, with the recipe version."""
        return {"version": VERSION, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}


def from_json(data: dict) -> Recipe:
    """Read a recipe back; it fits the schema of records. Raises ValueError for sizes that no model has."""
    values = {k: tuple(v) if k == "prompts" else v for k, v in data.items() if k != "version"}
    recipe = Recipe(**values)
    if recipe.experts % recipe.groups or not recipe.top_k <= recipe.top_groups * recipe.experts // recipe.groups:
        raise ValueError(f"recipe: top_k must fit into top_groups of equal groups, got {words(recipe)}")
    if recipe.top_groups > recipe.groups:
        raise ValueError(f"recipe: top_groups must be at most groups, got {words(recipe)}")
    return recipe


AXES = {
    "lower_bound": lambda r: replace(r, gate="softplus") if r.gate == "lower_bound" else r,
    "per_head": lambda r: replace(r, gate="softplus") if r.gate == "per_head" else r,
    "full_rank_gate": lambda r: replace(r, full_rank_gate=False),
    "full_rank_forget": lambda r: replace(r, full_rank_forget=False),
    "plain_eps": lambda r: replace(r, plain_eps=False),
    "biased_weights": lambda r: replace(r, biased_weights=False),
    "no shared expert": lambda r: replace(r, shared=max(r.shared, 1)),
    "layers from 0": lambda r: replace(r, count_from=1),
    "truncate": lambda r: replace(r, boundary=0),
    "KDA alone": lambda r: r if "m" in r.layers else replace(r, layers=f"{r.layers}m"),
}
"""Forms of the family that a model may refuse, each with the recipe's neutral form."""


def neutral(recipe: Recipe, refused: Iterable[str]) -> Recipe:
    """Return the recipe's neutral form along every axis that a model refuses."""
    for axis in refused:
        recipe = AXES[axis](recipe)
    return recipe


def words(recipe: Recipe) -> str:
    """Describe a recipe in one line: layers and texts, then every field that is not at its simplest value."""
    first = f"layers={recipe.layers} prompts={list(recipe.prompts)} tail={recipe.tail}"
    rest = [
        f"{f.name}={json.dumps(getattr(recipe, f.name))}".replace('"', "")
        for f in fields(Recipe)
        if f.name not in ("layers", "prompts", "tail") and getattr(recipe, f.name) != f.default
    ]
    return " ".join([first, *rest])


LAYERS = ("k", "m", "kk", "km", "mk", "mm", "kkm", "kmk", "kkkm", "kkmkm")
PROMPTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 33)
"""Lengths of prompts: small ones, and around the borders of chunks of 16."""
ALONE = (63, 65, 254)
"""Lengths of prompts of one text: around the border of chunks of 64, and before that of a window of 256 tokens."""


@st.composite
def recipes(draw, tokens: int) -> Recipe:
    """Draw a recipe; a prompt has at most `tokens` tokens, or, where it is alone, one of a few lengths beyond."""
    small, few = st.sampled_from((1, 2, 3)), st.sampled_from((1, 2, 3, 4))
    layers, groups = draw(st.sampled_from(LAYERS)), draw(st.sampled_from((1, 1, 1, 2, 4)))
    top_groups, size = draw(st.integers(1, groups)), draw(st.sampled_from((2, 3, 4)))
    prompt = st.sampled_from([n for n in PROMPTS if n <= tokens])
    several = draw(st.sampled_from((True, True, True, False)))
    prompts = draw(st.lists(prompt, min_size=1, max_size=3)) if several else [draw(st.sampled_from(ALONE))]
    return Recipe(
        seed=draw(st.integers(0, 2**16)),
        layers=layers,
        dense=draw(st.sampled_from((1, 0, 0, len(layers)))),
        width=draw(st.sampled_from((4, 8, 12, 16))),
        kda_heads=draw(small),
        head_dim=draw(st.sampled_from((2, 4, 8))),
        taps=draw(st.sampled_from((2, 3, 4))),
        mla_heads=draw(small),
        latent=draw(st.sampled_from((2, 4, 6, 8))),
        nope=draw(few),
        rope=draw(few),
        value=draw(few),
        experts=groups * size,
        top_k=draw(st.integers(1, min(top_groups * size, 4))),
        groups=groups,
        top_groups=top_groups,
        shared=draw(st.sampled_from((1, 1, 2, 0))),
        gate=draw(st.sampled_from(GATES)),
        decay=draw(st.sampled_from(DECAYS)),
        full_rank_gate=draw(st.booleans()),
        full_rank_forget=draw(st.booleans()),
        router=draw(st.sampled_from(ROUTERS)),
        renormalise=draw(st.sampled_from((True, True, False))),
        biased_weights=draw(st.sampled_from((False, False, True))),
        plain_eps=draw(st.booleans()),
        count_from=draw(st.sampled_from((1, 1, 0))),
        boundary=draw(st.sampled_from((0, 0, 1, 2, 3, 5, 16))),
        prompts=tuple(prompts),
        tail=draw(st.integers(1, 5)),
    )
