"""Properties of the map (v, S_0) -> (o, S_T) and of its symmetries; powers of two and signs need no tolerance."""

from collections.abc import Iterable

import numpy as np
import torch

from verify import yardstick
from verify.cases import Case
from verify.claims import claim, condition, every, more, plain, takes, tokens
from verify.exact import round_to
from verify.targets import Result
from verify.trial import Measure, Trial, same_bits
from verify.yardstick import activated

RESOLVED = {"float32": 2.0**-60, "bfloat16": 2.0**-60, "float16": 2.0**-8, "float64": 2.0**-500}
"""Results smaller than this may hang on subnormal numbers inside, which scaling does not commute with."""


HARDEST = -1000.0
"""From here on a gate is an exact zero in every dtype, and no scaling changes that."""


def _scaled_bits(trial: Trial, what: str, got: torch.Tensor, base: torch.Tensor, factor: float) -> Measure:
    expected = base * factor
    resolved = max(RESOLVED[trial.recipe.dtype], RESOLVED[trial.contract.accumulator])
    small = (expected.abs() < resolved) | (base.abs() < resolved)
    return same_bits(
        what, torch.where(small, torch.zeros_like(got), got), torch.where(small, torch.zeros_like(got), expected)
    )


def _exponent(trial: Trial) -> int:
    """Draw m for a factor 2^m that neither overflows nor reaches subnormal numbers in the dtype of the inputs."""
    widest = 3 if trial.recipe.dtype == "float16" else 40
    m = trial.dice("exponent").integer(1, widest + 1)
    return m if trial.recipe.values == "small" or trial.dice("sign").integer(0, 2) else -m


@condition("nothing inside nears the smallest or the largest numbers; operands are not float16")
def _scales(trial: Trial) -> bool:
    """Nothing inside comes near the subnormal numbers or beyond the largest, scaled or not.

    A decay of e^-88 met a tie: the fused sum of k delta, exactly half way, and a decayed state of 2^-129 rounds one way
    while that state is there and another when scaling has flushed it. Operands in float16 end at 2^-14: there any small
    beta, decay or difference is met, and nothing is claimed.
    """
    if trial.contract.operand == "float16" or trial.recipe.values == "subnormal":
        return False
    g = activated(trial.case).g
    decayed = np.sum(np.where(g > HARDEST, -g, 0.0), axis=1)
    return bool(np.all(decayed < 30)) and (trial.recipe.dtype != "float16" or trial.recipe.values != "spikes")


@claim("bitwise", every(tokens, _scales))
def scaling_values(trial: Trial) -> Iterable[Measure]:
    """Multiplying v and S_0 by 2^m multiplies o and S_T by 2^m, bit for bit, under any rounding policy.

    Would have caught: absolute epsilons and clamps inside, small outputs flushed to zero (KernelBench #165).
    """
    case, m = trial.case, _exponent(trial)
    factor = 2.0**m
    scaled = trial.run(case.but(v=case.v * factor, S0=None if case.S0 is None else case.S0 * factor))
    for name, x in scaled.tensors().items():
        yield _scaled_bits(trial, f"{name} * 2^{m}", x, trial.forward.tensors()[name], factor)


@condition("no norm of q and k inside")
def _no_norm(trial: Trial) -> bool:
    return not trial.recipe.l2norm


@claim("bitwise", every(tokens, _scales, _no_norm))
def scaling_queries(trial: Trial) -> Iterable[Measure]:
    """Multiplying q by 2^m multiplies o by 2^m bit for bit and leaves S_T alone.

    Would have caught: a query that enters the state, an epsilon or a clamp on scores.
    """
    m = trial.dice("exponent").integer(1, 4) * (1 - 2 * trial.dice("sign").integer(0, 2))
    scaled = trial.run(trial.case.but(q=trial.case.q * 2.0**m))
    yield _scaled_bits(trial, f"o * 2^{m}", scaled.o, trial.forward.o, 2.0**m)
    yield same_bits("S", scaled.S, trial.forward.S)


@claim("bitwise", every(plain, _scales, takes("scale")))
def scaling_argument(trial: Trial) -> Iterable[Measure]:
    """scale = 2s doubles o bit for bit, and scale = K^-1/2 is the default.

    Would have caught: a scale that is silently ignored, or applied to the state too.
    """
    case = trial.case
    doubled = trial.run(case.but(scale=2 * case.inputs().resolved_scale))
    yield _scaled_bits(trial, "o * 2", doubled.o, trial.forward.o, 2.0)
    yield same_bits("S", doubled.S, trial.forward.S)
    yield same_bits(
        "o at the default scale", trial.run(case.but(scale=case.inputs().resolved_scale)).o, trial.forward.o
    )


@condition("beta / 16 is exact, and inputs are not float16")
def _beta_divides(trial: Trial) -> bool:
    case = trial.case
    return bool(np.all(round_to(case.beta / 16, case.gate_dtype) == case.beta / 16)) and trial.recipe.dtype != "float16"


@claim("bitwise", every(plain, _scales, _beta_divides))
def scaling_keys(trial: Trial) -> Iterable[Measure]:
    """(k, beta, v) -> (c k, beta / c^2, c v) leaves o and S_T alone, bit for bit for c = 2^m.

    Would have caught: beta applied once too often or too rarely, a norm taken where none was asked for.
    """
    case = trial.case
    c = (0.5, 2.0, 4.0)[trial.dice("c").integer(0, 3)]
    scaled = trial.run(case.but(k=c * case.k, beta=case.beta / c**2, v=c * case.v))
    for name, x in scaled.tensors().items():
        yield _scaled_bits(trial, f"{name} at c={c}", x, trial.forward.tensors()[name], 1.0)


@claim("bitwise", tokens)
def sign_flip_tokens(trial: Trial) -> Iterable[Measure]:
    """k_t -> -k_t with v_t -> -v_t, for any set of tokens, leaves every bit of o and S_T.

    Would have caught: an absolute value, a clamp or a shift of keys, values or scores.
    """
    case = trial.case
    signs = trial.dice("signs").signs((case.B, case.T, case.H, 1))
    signs[0, 0, 0] = -1.0
    flipped = trial.run(case.but(k=case.k * signs, v=case.v * case.per_value_head(signs)))
    yield from _same_results(flipped, trial.forward)


@claim("bitwise", tokens)
def sign_flip_channels(trial: Trial) -> Iterable[Measure]:
    """Flipping key channels of q, k and the rows of S_0 leaves o, and flips the rows of S_T, bit for bit.

    Would have caught: channels mixed up between q and k, a transposed initial state.
    """
    case = trial.case
    signs = trial.dice("channels").signs((case.K,))
    signs[0] = -1.0
    flipped = trial.run(
        case.but(q=case.q * signs, k=case.k * signs, S0=None if case.S0 is None else case.S0 * signs[:, None])
    )
    yield same_bits("o", flipped.o, trial.forward.o)
    yield same_bits("S", flipped.S, trial.forward.S * torch.from_numpy(signs[:, None]).to(trial.forward.S))


def _same_results(got: Result, expected: Result) -> Iterable[Measure]:
    for name, x in got.tensors().items():
        yield same_bits(name, x, expected.tensors()[name])


@condition("gates activated before the call")
def _gates_given(trial: Trial) -> bool:
    return trial.recipe.activation == "none"


@claim("tolerance", every(tokens, more("K"), _gates_given))
def channel_permutation(trial: Trial) -> Iterable[Measure]:
    """Permuting key channels of q, k, g and the rows of S_0 leaves o and permutes the rows of S_T.

    Would have caught: gates that belong to other channels, masks for a K that is not a power of two (FLA #1135).
    """
    case, order = trial.case, trial.dice("order").shuffle(trial.case.K)
    moved = case.but(
        q=case.q[..., order],
        k=case.k[..., order],
        g=case.g[..., order],
        S0=None if case.S0 is None else case.S0[:, :, order],
    )
    got = trial.run(moved).numbers()
    back = np.argsort(order)
    yield from trial.judge({"o": got["o"], "S": got["S"][:, :, back]}, trial.yard.exact)


@claim("tolerance", every(tokens, more("V")))
def value_permutation(trial: Trial) -> Iterable[Measure]:
    """Permuting value channels of v and S_0 permutes o and S_T.

    Would have caught: two value columns swapped, a split of V whose tiles overlap.
    """
    case, order = trial.case, trial.dice("order").shuffle(trial.case.V)
    got = trial.run(case.but(v=case.v[..., order], S0=None if case.S0 is None else case.S0[..., order])).numbers()
    back = np.argsort(order)
    yield from trial.judge({name: x[..., back] for name, x in got.items()}, trial.yard.exact)


@claim("bitwise", every(tokens, more("V")))
def value_independence(trial: Trial) -> Iterable[Measure]:
    """Column j of o and S_T hangs on column j of v and S_0 only: changing the others leaves its bits.

    Would have caught: columns swapped or mixed, reductions over V where none belong.
    """
    case, dice = trial.case, trial.dice("columns")
    keep = dice.integer(0, case.V)
    other = np.arange(case.V) != keep
    v = np.where(other, case.rounded(dice.normal(case.v.shape)), case.v)
    S0 = None if case.S0 is None else np.where(other, dice.normal(case.S0.shape), case.S0)
    changed = trial.run(case.but(v=v, S0=S0))
    for name, x in changed.tensors().items():
        yield same_bits(f"{name}[..., {keep}]", x[..., keep], trial.forward.tensors()[name][..., keep])


@claim("tolerance", every(tokens, more("V")))
def value_slices(trial: Trial) -> Iterable[Measure]:
    """A slice of the value columns gives the slice of the results; bitwise where the contract claims it.

    Would have caught: V not a multiple of the tile, a split whose number of parts enters the result.
    """
    case = trial.case
    width = trial.dice("width").integer(1, case.V)
    part = case.but(
        v=case.v[..., :width],
        do=case.do[..., :width],
        dS=case.dS[..., :width],
        S0=None if case.S0 is None else case.S0[..., :width],
    )
    result = trial.run(part)
    yield from trial.agree(part, result)
    if "value_slices" in trial.contract.bitwise:
        for name, x in result.tensors().items():
            yield same_bits(name, x, trial.forward.tensors()[name][..., :width])


@claim("tolerance", every(plain, takes("initial_state")))
def linearity(trial: Trial) -> Iterable[Measure]:
    """F is linear in (v, S_0) jointly: the tokens of v in two parts, S_0 with the first, add up.

    The parts are selections, so every input stays exactly representable. Would have caught: a state ignored in the
    pseudo-values (GPU MODE #127).
    """
    case = trial.case
    first = trial.dice("part").integers(0, 2, (case.B, case.T, 1, 1)) == 1
    a = trial.run(case.but(v=np.where(first, case.v, 0.0))).numbers()
    b = trial.run(case.but(v=np.where(first, 0.0, case.v), S0=None)).numbers()
    yield from _sum_of_parts(
        trial, case.but(v=np.where(first, case.v, 0.0)), case.but(v=np.where(first, 0.0, case.v), S0=None), a, b
    )


@claim("tolerance", plain)
def query_linearity(trial: Trial) -> Iterable[Measure]:
    """o is linear in q: the channels of q in two parts add up.

    Would have caught: block products that drop or repeat a slab of channels.
    """
    case = trial.case
    first = trial.dice("part").integers(0, 2, (case.K,)) == 1
    cases = [case.but(q=np.where(part, case.q, 0.0)) for part in (first, ~first)]
    a, b = (trial.run(x).numbers() for x in cases)
    yield from _sum_of_parts(trial, *cases, {"o": a["o"]}, {"o": b["o"]})
    yield from trial.pair({"S": a["S"]}, {"S": trial.forward.numbers()["S"]})


def _sum_of_parts(
    trial: Trial, first: Case, second: Case, a: dict[str, np.ndarray], b: dict[str, np.ndarray]
) -> Iterable[Measure]:
    """Compare a sum of two runs with the definition; each part may err by its own yardstick."""
    yards = [yardstick.measure(case, trial.contract, False) for case in (first, second)]
    together = yardstick.Yardstick(
        trial.yard.exact, {name: np.hypot(yards[0].legal[name], yards[1].legal[name]) for name in a}, {}
    )
    yield from trial.judge({name: a[name] + b[name] for name in a}, trial.yard.exact, together)


@claim("tolerance", every(plain, takes("scale")))
def padding(trial: Trial) -> Iterable[Measure]:
    """Key channels where q and k are zero, whatever their gates, and value channels of zero, leave the rest alone.

    Would have caught: FLA #1135 (loads past K), norms and scales taken over the padded size.
    """
    case, dice = trial.case.but(scale=trial.case.inputs().resolved_scale), trial.dice("padding")
    wide = {
        name: np.concatenate([getattr(case, name), np.zeros((*getattr(case, name).shape[:-1], 3))], axis=-1)
        for name in ("q", "k", "v", "do")
    }
    gates = np.concatenate([case.g, -dice.integers(0, 9, (*case.g.shape[:-1], 3)) / 4.0], axis=-1)
    grow = ((0, 0), (0, 0), (0, 3), (0, 3))
    padded = case.but(**wide, g=gates, S0=None if case.S0 is None else np.pad(case.S0, grow), dS=np.pad(case.dS, grow))
    got = trial.run(padded).numbers()
    yield from trial.judge({"o": got["o"][..., : case.V], "S": got["S"][:, :, : case.K, : case.V]}, trial.yard.exact)
    rest = max(
        float(np.max(np.abs(x), initial=0.0))
        for x in (got["o"][..., case.V :], got["S"][:, :, case.K :], got["S"][..., case.V :])
    )
    yield Measure("padded channels are zero", rest, 0)
