"""Properties of the gradients of L = <do, o> + <dS_T, S_T>: identities on own outputs, exact zeros, linearity."""

from collections.abc import Iterable

import numpy as np

from verify import yardstick
from verify.claims import claim, condition, every, gradients, more, plain, takes, unpacked
from verify.trial import Measure, Trial

_plain_gradients = every(gradients, plain)


FEWER = 12
"""Recipes of a dtype on which properties that take several backwards are asked at most."""


@condition("an initial state")
def _with_state(trial: Trial) -> bool:
    return trial.recipe.state


@condition("a gate of minus infinity")
def _infinite(trial: Trial) -> bool:
    return trial.recipe.infinite


def _law(trial: Trial, what: str, left: np.ndarray, right: np.ndarray, legal: np.ndarray) -> Measure:
    ratio = np.abs(left - right) / np.maximum(legal, np.finfo(np.float64).tiny)
    return Measure(what, float(np.max(ratio, initial=0.0)), trial.limits.law, ratio.size, gate="law")


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=-1)


def _size(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)


def _grouped(trial: Trial, x: np.ndarray) -> np.ndarray:
    """Sum [B, T, HV] over the value heads of each query/key head."""
    return x.reshape(*x.shape[:2], trial.case.H, -1).sum(axis=3)


@claim("tolerance", _plain_gradients)
def adjoint_identity(trial: Trial) -> Iterable[Measure]:
    """The backward is the transpose of the forward in (v, S_0), per sequence and head:

        <do, o> + <dS_T, S_T> = <dv, v> + <dS_0, S_0>
    Reference-free. Would have caught: FLA #1146, #1141 (gradient through the final state), a row lost in one direction.
    """
    got, legal, case = trial.both.numbers(), trial.yard.legal, trial.case
    columns = {
        name: np.swapaxes(x, -1, -2)
        for name, x in (("S", got["S"]), ("dS", case.dS), ("S0", case.initial), ("dS0", got.get("dS0", 0 * case.dS)))
    }
    left = np.sum(_dot(case.do, got["o"]), axis=1) + np.sum(_dot(columns["dS"], columns["S"]), axis=-1)
    right = np.sum(_dot(case.v, got["dv"]), axis=1) + np.sum(_dot(columns["S0"], columns["dS0"]), axis=-1)
    allowed = np.sqrt(
        np.sum((_size(case.do) * legal["o"]) ** 2 + (_size(case.v) * legal["dv"]) ** 2, axis=1)
        + np.sum((_size(columns["dS"]) * legal["S"]) ** 2 + (_size(columns["S0"]) * legal["dS0"]) ** 2, axis=-1)
    )
    yield _law(trial, "<do,o>+<dS,S>", left, right, allowed)


@claim("tolerance", _plain_gradients)
def conservation_query(trial: Trial) -> Iterable[Measure]:
    """Per token and head: <q_t, dq_t> = <o_t, do_t>, summed over the value heads of a group.

    Reference-free, at any length. Would have caught: a scale missing in dq, rows shifted between forward and backward.
    """
    got, legal, case = trial.both.numbers(), trial.yard.legal, trial.case
    allowed = _size(case.q) * legal["dq"] + _grouped(trial, _size(case.do) * legal["o"])
    yield _law(trial, "<q,dq>", _dot(case.q, got["dq"]), _grouped(trial, _dot(case.do, got["o"])), allowed)


@claim("tolerance", _plain_gradients)
def conservation_key(trial: Trial) -> Iterable[Measure]:
    """Per token and head: <k_t, dk_t> = 2 beta_t dbeta_t - <v_t, dv_t>, summed over the value heads of a group.

    It follows from (k, beta, v) -> (c k, beta/c^2, c v). Reference-free. Would have caught: FLA #863 (missing term of
    dbeta), #984.
    """
    got, legal, case = trial.both.numbers(), trial.yard.legal, trial.case
    right = _grouped(trial, 2 * case.beta * got["dbeta"] - _dot(case.v, got["dv"]))
    allowed = _size(case.k) * legal["dk"] + _grouped(
        trial, 2 * case.beta * legal["dbeta"] + _size(case.v) * legal["dv"]
    )
    yield _law(trial, "<k,dk>", _dot(case.k, got["dk"]), right, allowed)


@claim("tolerance", _plain_gradients)
def conservation_gate(trial: Trial) -> Iterable[Measure]:
    """Per token and head: sum_c dg_t - sum_c dg_{t+1} = <o_t, do_t> - <v_t, dv_t>, where sum_c dg_{T+1} is <dS_T, S_T>.

    Reference-free. Would have caught: gates shifted by one token between forward and backward.
    """
    got, legal, case = trial.both.numbers(), trial.yard.legal, trial.case
    dg, width = np.sum(got["dg"], axis=-1), np.sqrt(case.K)
    last = np.sum(case.dS * got["S"], axis=(-1, -2))[:, None]
    last_legal = np.sqrt(np.sum((_size(np.swapaxes(case.dS, -1, -2)) * legal["S"]) ** 2, axis=-1))[:, None]
    following = np.concatenate([dg[:, 1:], last], axis=1)
    following_legal = np.concatenate([width * legal["dg"][:, 1:], last_legal], axis=1)
    right = _dot(case.do, got["o"]) - _dot(case.v, got["dv"])
    allowed = width * legal["dg"] + following_legal + _size(case.do) * legal["o"] + _size(case.v) * legal["dv"]
    yield _law(trial, "sum dg", dg - following, right, allowed)


@claim("tolerance", every(_plain_gradients, _with_state))
def conservation_state(trial: Trial) -> Iterable[Measure]:
    """Per channel: dg_{1,c} = sum_j (dS_0)_{cj} (S_0)_{cj}: a gate and the state that it decays scale the same rows.

    Reference-free. The laws summed over channels cannot see gradients of channels exchanged. Would have caught: gates
    of another head or channel in the backward (FLA #781), a decay missing in dS_0.
    """
    got, legal, case = trial.both.numbers(), trial.yard.legal, trial.case
    rows = np.sum(got["dS0"] * case.S0, axis=-1)
    allowed = legal["dg"][:, 0, :, None] + (np.abs(case.S0) @ legal["dS0"][..., None])[..., 0]
    yield _law(trial, "dg of token 1", got["dg"][:, 0], rows, allowed)


@claim("tolerance", every(gradients, unpacked, more("T"), takes("initial_state")), FEWER)
def gradient_split(trial: Trial) -> Iterable[Measure]:
    """Gradients pass through a cut: those of [s, T) from the state in between, then of [0, s) with its dS_0 for dS_s.

    Would have caught: FLA #1141, #1146 (gradient through the final state), a state gradient of the wrong chunk.
    """
    case = trial.case
    cut = trial.dice("gradient cut").integer(1, case.T)
    early, late = case.tokens(0, cut), case.tokens(cut, case.T)
    state = trial.run(early).numbers()["S"]
    behind = trial.run(late.but(S0=state), backward=True).numbers()
    before = trial.run(early.but(dS=behind["dS0"]), backward=True).numbers()
    joined = {x: np.concatenate([before[x], behind[x]], axis=1) for x in ("dq", "dk", "dv", "dg", "dbeta")}
    if case.S0 is not None:
        joined["dS0"] = before["dS0"]
    yield from trial.judge(joined, trial.yard.exact)


@claim("tolerance", gradients, FEWER)
def gradient_subset(trial: Trial) -> Iterable[Measure]:
    """The gradients of some inputs, where the others require none, are those that they have among all.

    Would have caught: a term that is dropped with an input whose gradient nobody wants (g = None), flags of one input
    read for another.
    """
    inputs = sorted({"q", "k", "v", "g", "beta"} | ({"initial_state"} if trial.recipe.state else set()))
    picked = trial.dice("wanted").integers(0, 2, (len(inputs),))
    picked[trial.dice("one").integer(0, len(inputs))] = 1
    wanted = frozenset(name for name, one in zip(inputs, picked, strict=True) if one)
    got = trial.run(trial.case, backward=True, wanted=wanted).numbers()
    whole = trial.both.numbers()
    yield from trial.pair({name: x for name, x in got.items() if name in trial.yard.exact}, whole)


@claim("bound", every(gradients, unpacked, more("T")))
def gradient_causality(trial: Trial) -> Iterable[Measure]:
    """With do zero after token i, and no dS_T, the gradients of all inputs after i are exactly zero.

    Would have caught: FLA #1240 in the backward, gradients of the future through shared anchors, FLA #1095, #1150
    (reverse sums as total minus prefix leave a rounding where nothing is).
    """
    case = trial.case
    cut = trial.dice("cut").integer(0, case.T - 1)
    do = np.where((np.arange(case.T) <= cut)[:, None, None], case.do, 0.0)
    got = trial.run(case.but(do=do), backward=True, dS=False).numbers()
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        late = got[name][:, cut + 1 :]
        yield Measure(f"{name} after {cut}", float(np.sum(late != 0)), 0, late.size)


@claim("bound", gradients)
def zero_gradient(trial: Trial) -> Iterable[Measure]:
    """do = 0 and dS_T = 0 give gradients that are exactly zero, not NaN.

    Would have caught: uninitialised gradient buffers (FLA #862), inf * 0 in a backward under a finite forward
    (transformers #48455).
    """
    case = trial.case
    got = trial.run(case.but(do=np.zeros_like(case.do), dS=np.zeros_like(case.dS)), backward=True).numbers()
    for name, x in got.items():
        if name.startswith("d"):
            yield Measure(name, float(np.sum(x != 0)), 0, x.size)


@claim("tolerance", gradients)
def gradient_linearity(trial: Trial) -> Iterable[Measure]:
    """Gradients are linear in (do, dS_T): those of do alone and those of dS_T alone add up to all.

    Would have caught: FLA #1141 (gradient of the state alone), terms that assume that do is present.
    """
    case = trial.case
    runs = trial.run(case, backward=True, dS=False), trial.run(case, backward=True, do=False)
    halves = case.but(dS=np.zeros_like(case.dS)), case.but(do=np.zeros_like(case.do))
    yards = [yardstick.measure(half, trial.contract, True) for half in halves]
    names = [name for name in runs[0].grads if name in trial.yard.exact]
    a, b = (run.numbers() for run in runs)
    legal = {name: np.hypot(yards[0].legal[name], yards[1].legal[name]) for name in names}
    together = yardstick.Yardstick(trial.yard.exact, legal, {})
    yield from trial.judge({name: a[name] + b[name] for name in names}, trial.yard.exact, together)


@claim("bound", every(gradients, _infinite))
def reset_gradient(trial: Trial) -> Iterable[Measure]:
    """Where g is minus infinity dg is exactly 0, and every other gradient is finite.

    d alpha = alpha dg = 0. Would have caught: 0 * inf in the gradient of the gate, NaN that spreads from one reset.
    """
    got = trial.both.numbers()
    at = got["dg"][np.isneginf(trial.case.g)]
    yield Measure("dg at -inf", float(np.sum(at != 0)), 0, at.size)
    for name, x in got.items():
        yield Measure(f"{name} finite", float(np.sum(~np.isfinite(x))), 0, x.size)


@claim("tolerance", _plain_gradients)
def gradient_independence(trial: Trial) -> Iterable[Measure]:
    """dv and dS_0 do not depend on v and S_0, and dq does not depend on q: F is linear in each.

    Would have caught: gradients that read a buffer which the forward overwrote, recomputation from the wrong tensor.
    """
    case, dice = trial.case, trial.dice("other")
    other = trial.run(
        case.but(v=case.rounded(dice.normal(case.v.shape)), S0=None if case.S0 is None else dice.normal(case.S0.shape)),
        backward=True,
    )
    names = [name for name in ("dv", "dS0") if name in trial.both.grads]
    yield from trial.pair(
        {name: other.numbers()[name] for name in names}, {name: trial.both.numbers()[name] for name in names}
    )
    turned = trial.run(case.but(q=case.q[..., ::-1].copy()), backward=True)
    yield from trial.pair({"dq": turned.numbers()["dq"]}, {"dq": trial.both.numbers()["dq"]})
