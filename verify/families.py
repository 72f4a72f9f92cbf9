"""Input families: how each word of a recipe becomes numbers. Exact and seeded: the same bits on every machine.

The families are those in which kernels have failed: near-collinear keys, gates that differ by head and channel, resets
at the borders of chunks, minus infinity, beta at 0, 1 and 2, spikes. beta is shrunk after the cast so that beta*||k||^2
<= 2 holds.
"""

import numpy as np

from verify import captured
from verify.cases import Activation, Case
from verify.exact import Dice, round_to, unit_rows
from verify.recipes import Recipe
from verify.yardstick import activated

HARD = (-80.0, -88.0, -104.0, -1000.0)
"""Resets that real kernels met: exp(-88) is near float32's smallest normal number, exp(-104) underflows to zero."""
TINY = {"small": {"float16": 2.0**-4}, "subnormal": {"float16": 2.0**-16, "float64": 2.0**-505}}
"""Sizes of values where they are not `USUAL`."""
USUAL = {"small": 2.0**-30, "subnormal": 2.0**-130}
GRID = 2.0**20
"""What depends on a sum over channels is rounded to 1 / GRID: sums differ in their last bits between machines."""


def materialise(recipe: Recipe) -> Case:
    """Make the arrays of a recipe. Values are float64 and exactly representable in the dtype that the kernel gets."""
    r, N = recipe, max(len(recipe.lengths), 1) if recipe.lengths else recipe.B
    gate_dtype = "float32" if r.gates_float32 and r.dtype != "float64" else r.dtype
    found = captured.cut(r) if r.captured else None
    k = round_to(found.k if found else _keys(r), r.dtype)
    v = round_to(found.v if found else _values(r), r.dtype)
    state_dtype = "float64" if r.dtype == "float64" else "float32"
    case = Case(
        q=round_to(found.q if found else _queries(r, k), r.dtype),
        k=k,
        v=v,
        g=round_to(found.g if found and r.activation == "none" else _gates(r), gate_dtype),
        beta=_betas(r, k, gate_dtype, found),
        S0=round_to(Dice(r.seed, "S0").normal((N, r.HV, r.K, r.V)), state_dtype) if r.state else None,
        do=round_to(Dice(r.seed, "do").normal((r.B, r.T, r.HV, r.V)), r.dtype),
        dS=round_to(Dice(r.seed, "dS").normal((N, r.HV, r.K, r.V)), state_dtype),
        dtype=r.dtype,
        gate_dtype=gate_dtype,
        scale=0.3125 if r.scale else None,
        cu_seqlens=tuple(int(x) for x in np.cumsum((0, *r.lengths))) if r.lengths else None,
        chunk_size=r.chunk or None,
        activation=_activation(r),
    )
    return case.but(q=round_to(_cancelling(case), r.dtype)) if r.queries == "cancelling" and not found else case


def _activation(r: Recipe) -> Activation:
    dice, gate = Dice(r.seed, "activation"), r.activation
    A_log = round_to(dice.normal((r.HV,)), "float32") if gate in ("softplus", "lower_bound") else None
    dt_bias = round_to(dice.normal((r.HV * r.K,)), "float32") if gate != "none" else None
    lower_bound = (-5.0, -1.0)[r.plant % 2] if gate.startswith("lower") else None
    return Activation(
        l2norm=r.l2norm, gate=gate, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, sigmoid=r.sigmoid
    )


def _keys(r: Recipe) -> np.ndarray:
    keys = _directions(r)
    if r.keys == "long" and (r.l2norm or r.sigmoid == "none"):
        return 3 * keys
    # a beta of 2*sigmoid cannot be shrunk after the cast, so the keys are: rounding to bfloat16 may lengthen them by
    # 2^-8
    return keys * (1 - 2.0**-6) if r.sigmoid == "twice" and not r.l2norm else keys


def _directions(r: Recipe) -> np.ndarray:
    dice, shape = Dice(r.seed, "keys"), (r.B, r.T, r.H, r.K)
    base = dice.bell((r.B, 1, r.H, r.K))
    if r.keys == "one_hot":
        return np.eye(r.K)[dice.integers(0, r.K, shape[:-1])]
    if r.keys == "hadamard":
        n = 4 ** int(np.log2(r.K) // 2)
        return np.concatenate([dice.signs((*shape[:-1], n)) / np.sqrt(n), np.zeros((*shape[:-1], r.K - n))], axis=-1)
    if r.keys == "repeated":
        return unit_rows(np.broadcast_to(base, shape))
    if r.keys == "alternating":
        return unit_rows(np.broadcast_to(base, shape) * (-1) ** np.arange(r.T)[:, None, None])
    if r.keys == "near_collinear":
        return unit_rows(64 * base + dice.bell(shape))
    keys = unit_rows(dice.bell(shape))
    if r.keys == "some_zero":
        return keys * (dice.integers(0, 3, shape[:-1]) > 0)[..., None]
    return keys


def _queries(r: Recipe, k: np.ndarray) -> np.ndarray:
    if r.queries == "keys":
        return k
    queries = unit_rows(Dice(r.seed, "queries").bell((r.B, r.T, r.H, r.K)))
    return queries * 16 if r.queries == "large" else queries


def _cancelling(case: Case) -> np.ndarray:
    """Turn queries until they read next to nothing: S_t^T q_t cancels in all value columns, or in the first K - 1.

    Of value heads that share a query the first counts.
    """
    inputs = activated(case).inputs()
    turned, sizes = case.q.copy(), inputs.sizes
    for batch, tokens, number in inputs.runs():
        S = states(*inputs.heads_first(batch, tokens)[1:], case.initial[number])[:, :: sizes.HV // sizes.H]
        q = np.swapaxes(case.q[batch, tokens], 1, 2)
        for column in _orthonormal(np.moveaxis(S, -1, 0)[: sizes.K - 1]):
            q = q - np.sum(q * column, axis=-1, keepdims=True) * column
        size = np.linalg.norm(q, axis=-1, keepdims=True)
        turned[batch, tokens] = np.swapaxes(q / np.maximum(size, 2.0**-10), 1, 2)
    return np.round(turned * GRID) / GRID


def states(k, v, g, beta, S) -> np.ndarray:
    """Return the states [..., T, K, V] behind every token, heads first."""
    found = np.empty((*k.shape, v.shape[-1]))
    for t in range(k.shape[-2]):
        S, row = np.exp(g[..., t, :, None]) * S, k[..., t, None, :]
        S = S + row.swapaxes(-1, -2) * (beta[..., t, None, None] * (v[..., t, None, :] - row @ S))
        found[..., t, :, :] = S
    return found


def _orthonormal(columns: np.ndarray) -> list[np.ndarray]:
    """Make columns [n, ..., K] orthonormal, one after the other; those that add less than 2^-20 are zero."""
    basis: list[np.ndarray] = []
    for column in columns:
        rest = column
        for _ in range(2):  # once leaves what the first subtraction cancelled
            for known in basis:
                rest = rest - np.sum(rest * known, axis=-1, keepdims=True) * known
        size, whole = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (rest, column))
        adds = size > whole / GRID
        basis.append(np.where(adds, rest / np.where(adds, size, 1.0), 0.0))
    return basis


def _values(r: Recipe) -> np.ndarray:
    dice, shape = Dice(r.seed, "values"), (r.B, r.T, r.HV, r.V)
    values = dice.normal(shape)
    if r.values == "spikes":
        # 2^13 as met in released models; float16 ends at 65,504 and its gradients are products of two such numbers
        return values * np.where(dice.integers(0, 12, shape) == 0, 2.0 ** (3 if r.dtype == "float16" else 13), 1.0)
    return values * TINY[r.values].get(r.dtype, USUAL[r.values]) if r.values in TINY else values


def _planted(r: Recipe, dice: Dice) -> np.ndarray:
    """Choose where resets stand [B, T, HV, 1]: token 0, borders of chunks of 16 and 64, the last token, or anywhere.

    Each head's stand a token later than those of the head before; where a choice meets no token, the last one is taken.
    """
    t = np.arange(r.T)
    places = (t == 0, t == 15, t % 16 == 0, t % 16 == 15, t % 64 == 63, t == r.T - 1, t % 5 == 2)
    chosen = places[r.plant] if r.plant < len(places) else dice.integers(0, 6, (r.T,)) == 0
    chosen = chosen if chosen.any() else t == r.T - 1
    by_head = np.stack([np.roll(chosen, head) for head in range(r.HV)], axis=-1)
    return np.broadcast_to(by_head[..., None], (r.B, r.T, r.HV, 1))


def _gates(r: Recipe) -> np.ndarray:
    dice, shape = Dice(r.seed, "gates"), (r.B, r.T, r.HV, r.K)
    u = dice.uniform(shape)
    if r.activation != "none":
        return 4 * dice.normal(shape)
    plain = {
        "zero": lambda: np.zeros(shape),
        "mild": lambda: -0.1 * u * u,
        "long_memory": lambda: -u / 2.0**13,
        "per_head": lambda: -u * (4.0 ** -np.arange(r.HV))[:, None],
        "strong": lambda: -20 * u,
        "log_uniform": lambda: -(1 + u) * 2.0 ** -dice.integers(-4, 13, shape),
        "staircase": lambda: np.broadcast_to(-np.arange(r.K) / 8.0, shape),
        "bounded": lambda: np.full(shape, -5.0),
    }
    if r.gates in plain:
        return plain[r.gates]() + 0.0
    g, at = -0.01 * u * u, _planted(r, dice)
    if r.gates == "channels_inf":
        return np.where(at & (dice.integers(0, 2, (r.B, 1, r.HV, r.K)) == 1), -np.inf, g)
    return np.where(at, -np.inf if r.gates == "resets_inf" else HARD[r.plant % 4], g)


def _betas(r: Recipe, k: np.ndarray, dtype: str, found: captured.Captured | None) -> np.ndarray:
    dice, shape = Dice(r.seed, "betas"), (r.B, r.T, r.HV)
    u = dice.uniform(shape)
    if r.sigmoid != "none":
        return round_to(2 * dice.normal(shape), dtype)
    families = {
        "one": np.ones(shape),
        "uniform": u,
        "zero": np.zeros(shape),
        "tiny": np.full(shape, 2.0 ** (-20 if dtype == "float16" else -27)),
        "mixed": np.array([0.0, 0.5, 1.0, 1.0])[dice.integers(0, 4, shape)],
        "above_one": 1 + u,
        "largest": np.full(shape, 2.0),
    }
    beta = found.beta if found else families[r.betas]
    if r.l2norm:
        return round_to(beta, dtype)
    # "beta<=1" means beta*||k||^2 <= 1: rounded unit keys may be longer than 1 by a rounding, and long keys have norm 3
    square = np.repeat(np.sum(k * k, axis=-1), r.G, axis=2)
    most = (2.0 if r.conditioning == "beta<=2" else 1.0) / np.maximum(square, 1e-30)
    nearest = round_to(np.minimum(beta, most), dtype)
    lower = round_to(np.minimum(beta, most) * (1 - 2.0**-7), dtype)
    return np.where(nearest <= most, nearest, lower)
