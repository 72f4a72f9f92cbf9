"""Recipes: what a case is made of, in words and integers, so that it can be stored, shrunk and made again anywhere.

A recipe never holds elements of arrays. Hypothesis draws and shrinks recipes (`recipes`), `families.materialise` turns
one into arrays. Every field's first or smallest value is the simplest one: that is where shrinking leads.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

VERSION = 1

KEYS = ("unit", "one_hot", "hadamard", "repeated", "alternating", "near_collinear", "some_zero", "long")
QUERIES = ("unit", "keys", "large", "cancelling")
VALUES = ("normal", "spikes", "small", "subnormal")
OFTEN = (*3 * VALUES[:-1], VALUES[-1])
"""How often values meet: without an initial state, subnormal ones leave nothing to measure in o."""
GATES = (
    "zero",
    "mild",
    "long_memory",
    "per_head",
    "log_uniform",
    "strong",
    "staircase",
    "bounded",
    "resets",
    "resets_inf",
    "channels_inf",
)
STRONG = ("log_uniform", "strong", "staircase", "resets", "resets_inf", "channels_inf")
"""Gates among which some are below -5, where some kernels end."""
BETAS = ("one", "uniform", "mixed", "zero", "tiny", "above_one", "largest")
ACTIVATIONS = ("none", "softplus", "lower_bound", "lower_bound_plain")
SIGMOIDS = ("none", "sigmoid", "twice")
DTYPES = ("float32", "bfloat16", "float16", "float64")

BORDERS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
TALL = (65, 70, 129, 200)
"""Lengths that cross the borders of chunks of 64 and 128, for cases of one narrow head."""
FEW = (1, 1, 2, 3)
"""What the sizes B, H and HV / H are drawn from."""
STYLES = (*["plain"] * 11, *["packed"] * 4, *["inside"] * 4, *["packed inside"] * 2, "empty")
"""Which features meet how often: most properties speak of activated inputs in equal sequences."""
DIMS = (1, 2, 3, 4, 5, 8, 12, 16, 33, 64)


@dataclass(frozen=True)
class Recipe:
    """One case of KDA: sizes, families, planted extremes and the arguments of the call.

    `lengths` non-empty means one packed batch of sequences (B is 1 and T their sum). `plant` chooses where resets
    stand.
    """

    dtype: str = "float32"
    seed: int = 0
    B: int = 1
    T: int = 1
    H: int = 1
    G: int = 1
    K: int = 1
    V: int = 1
    lengths: tuple[int, ...] = ()
    keys: str = "unit"
    queries: str = "unit"
    values: str = "normal"
    gates: str = "zero"
    betas: str = "one"
    plant: int = 0
    state: bool = False
    scale: bool = False
    l2norm: bool = False
    activation: str = "none"
    sigmoid: str = "none"
    gates_float32: bool = False
    chunk: int = 0
    captured: str = ""
    """FILE#digest: numbers are cut from captured inputs (`verify.captured`) instead of made."""

    @property
    def HV(self) -> int:
        """Number of value heads: G for each query/key head."""
        return self.H * self.G

    @property
    def plain(self) -> bool:
        """True if the op gets activated inputs, so that identities in k, g and beta can be stated on them."""
        return not self.l2norm and self.activation == "none" and self.sigmoid == "none"

    @property
    def infinite(self) -> bool:
        """True if a gate of minus infinity is planted; such cases are reported apart."""
        return self.activation == "none" and self.gates in ("resets_inf", "channels_inf") and self.T > 0

    @property
    def conditioning(self) -> str:
        """Class of the triangular solve: its condition is at most 2 for beta ||k||^2 <= 1, and unbounded towards 2."""
        doubled = self.sigmoid == "twice" or (self.sigmoid == "none" and self.betas in ("above_one", "largest"))
        return "beta<=2" if doubled else "beta<=1"

    def to_json(self) -> dict:
        """Return a dictionary of JSON values, with the recipe version."""
        made = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "captured" or v}
        return {"version": VERSION, **made}


def from_json(data: dict) -> Recipe:
    """Read a recipe back. Raises ValueError naming an unknown version or field."""
    if data.get("version") != VERSION:
        raise ValueError(f"recipe: expected version {VERSION}, got {data.get('version')!r}")
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(data) - known - {"version"})
    if unknown:
        raise ValueError(f"recipe: unknown fields {unknown}; known are {sorted(known)}")
    values = {k: tuple(v) if k == "lengths" else v for k, v in data.items() if k != "version"}
    for name, options in _OPTIONS.items():
        if name in values and values[name] not in options:
            raise ValueError(f"recipe: {name} must be one of {list(options)}, got {values[name]!r}")
    return Recipe(**values)


_OPTIONS = {
    "dtype": DTYPES,
    "keys": KEYS,
    "queries": QUERIES,
    "values": VALUES,
    "gates": GATES,
    "betas": BETAS,
    "activation": ACTIVATIONS,
    "sigmoid": SIGMOIDS,
}


def words(recipe: Recipe) -> str:
    """Describe a recipe in one line: sizes, then every field that is not at its simplest value."""
    sizes = f"B={recipe.B} T={recipe.T} H={recipe.H} HV={recipe.HV} K={recipe.K} V={recipe.V}"
    shown = {"B", "T", "H", "G", "K", "V", "dtype"}
    rest = [
        f"{f.name}={json.dumps(getattr(recipe, f.name))}".replace('"', "")
        for f in fields(Recipe)
        if f.name not in shown and getattr(recipe, f.name) != f.default
    ]
    return " ".join([recipe.dtype, sizes, *rest])


def _long(recipe: Recipe, lengths: tuple[int, ...]) -> Recipe:
    return replace(recipe, T=sum(lengths) if lengths else max(recipe.T, 1), lengths=lengths)


AXES = {
    "HV > H": lambda r: replace(r, G=1),
    "varlen": lambda r: replace(r, lengths=()),
    "T = 0": lambda r: _long(r, tuple(max(n, 1) for n in r.lengths)),
    "initial_state": lambda r: replace(r, state=False),
    "scale": lambda r: replace(r, scale=False),
    "K != V": lambda r: replace(r, K=min(r.K, r.V), V=min(r.K, r.V)),
    "g = -inf": lambda r: replace(r, gates="resets") if r.infinite else r,
    "g < -5": lambda r: replace(r, gates="bounded") if r.activation == "none" and r.gates in STRONG else r,
    "use_qk_l2norm_in_kernel": lambda r: replace(r, l2norm=False),
    "use_gate_in_kernel": lambda r: replace(r, activation="none"),
    "lower_bound": lambda r: replace(r, activation="softplus") if r.activation.startswith("lower") else r,
    "use_beta_sigmoid_in_kernel": lambda r: replace(r, sigmoid="none"),
    "allow_neg_eigval": lambda r: replace(r, sigmoid="sigmoid") if r.sigmoid == "twice" else r,
    "float32 gates": lambda r: replace(r, gates_float32=False),
    "chunk_size": lambda r: replace(r, chunk=0),
}
"""The axes of the domain that an implementation may refuse, each with the recipe's neutral form along it."""


def _tokens(limit: int, more: tuple[int, ...]) -> st.SearchStrategy[int]:
    """Draw from one ordered list, so that shrinking goes down it: every small length, borders twice, and more."""
    small = range(1, min(limit, 12) + 1)
    return st.sampled_from(sorted([*small, *(2 * [t for t in BORDERS if t <= limit]), *more]))


@st.composite
def recipes(
    draw,
    dtypes: tuple[str, ...],
    tokens: int,
    work: int,
    chunks: tuple[int, ...] = (),
    heads: tuple[int, ...] = FEW,
    tall: tuple[int, ...] = TALL,
    head_dims: tuple[int, ...] = DIMS,
) -> Recipe:
    """Draw a recipe: dtype out of `dtypes`, chunk sizes out of `chunks` or the default, B, H and HV / H out of `heads`,
    K and V out of `head_dims`.

    A sequence has at most `tokens` tokens, half as many where up to four are packed; or one of `tall` and a narrow
    head. `work` bounds B*HV*T*K*V, the cost of a sequential pass: heads and batches shrink first, then the dimensions.
    """
    style = draw(st.sampled_from(STYLES))
    packed, inside = "packed" in style, "inside" in style
    several = st.lists(_tokens(tokens // 2, (0, *tall[:1])), min_size=1, max_size=4)
    lengths = tuple(draw(several)) if packed else ()
    T = sum(lengths) if packed else 0 if style == "empty" else draw(_tokens(tokens, tall))
    few, dims = st.sampled_from(heads), st.sampled_from(head_dims)
    K, V, B, H, G = draw(dims), draw(dims), 1 if packed else draw(few), draw(few), draw(few)
    if max(lengths, default=T) > tokens:
        B, H, G, K, V = 1, 1, 1, min(K, 8), min(V, 8)
    while work < B * H * G * T * K * V and B * H * G * K * V > 1:
        if B * H * G > 1:
            B, H, G = max(B - 1, 1), max(H - 1, 1), max(G - 1, 1)
        else:
            K, V = max(K // 2, 1), max(V // 2, 1)
    return Recipe(
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        B=B,
        T=T,
        H=H,
        G=G,
        K=K,
        V=V,
        lengths=lengths,
        keys=draw(st.sampled_from(KEYS)),
        queries=draw(st.sampled_from(QUERIES)),
        values=draw(st.sampled_from(OFTEN)),
        gates=draw(st.sampled_from(GATES)),
        betas=draw(st.sampled_from(BETAS)),
        plant=draw(st.integers(0, 7)),
        state=draw(st.booleans()),
        scale=draw(st.integers(0, 4)) == 4,
        gates_float32=draw(st.booleans()),
        l2norm=inside and draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)) if inside else "none",
        sigmoid=draw(st.sampled_from(SIGMOIDS)) if inside else "none",
        chunk=draw(st.sampled_from((0, *chunks))),
    )


QUIET = settings(
    database=None,
    deadline=None,
    print_blob=False,
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)
"""Hypothesis as a source of recipes: what fails is kept by the judge, and told by it."""


def draw(
    strategy: st.SearchStrategy[Recipe], number: int, meet: Callable[[Recipe], None], shrink: bool = False
) -> None:
    """Let Hypothesis draw recipe `number` of a strategy, hand it to `meet`, and make it smaller while `meet` raises.

    Every recipe is a Hypothesis run of its own: the simplest example, then a fresh one. Within one long run Hypothesis
    mutates what it drew before, and of 32 recipes only 12 were really different.
    """
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @hypothesis.seed(number)
    @settings(QUIET, max_examples=2, phases=phases)
    @given(strategy)
    def example(recipe: Recipe) -> None:
        meet(recipe)

    example()


def aimed(strategy: st.SearchStrategy[Recipe], number: int, count: int, meet: Callable[[Recipe], float]) -> None:
    """Let Hypothesis draw so many recipes, and steer towards those for which `meet` returns more."""

    @hypothesis.seed(number)
    @settings(QUIET, max_examples=count, phases=(Phase.generate, Phase.target))
    @given(strategy)
    def example(recipe: Recipe) -> None:
        hypothesis.target(meet(recipe), label="worst ratio")

    example()


def drawn(strategy: st.SearchStrategy[Recipe], number: int) -> Recipe:
    """Return recipe `number` of a strategy: equal numbers give equal recipes."""
    met: list[Recipe] = []
    draw(strategy, number, met.append)
    return met[-1]
