"""Properties that compare with the float64 definition, directly or through a closed form that needs no recurrence."""

from collections.abc import Iterable

import numpy as np

from kda_spec.recurrent import general_dplr
from verify import yardstick
from verify.claims import claim, condition, every, gradients, more, plain, takes
from verify.exact import UNIT_ROUNDOFF, Dice
from verify.targets import guarded
from verify.trial import Measure, Trial, blame
from verify.yardstick import rows


@claim("tolerance")
def reference_forward(trial: Trial) -> Iterable[Measure]:
    """o and S_T equal the float64 recurrence, row by row (gate Y) and within the running bound (gate R).

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,   o_t = scale * S_t^T q_t
    Would have caught: FLA #794 (tail without mask), #876 (chunk 32 broken for months), #1135 (K not a power of two),
    cudnn-frontend #1017 (silently wrong gates), FlashKDA #10 (fp16 inverse of near-collinear keys).
    """
    got = trial.forward.numbers()
    yield from trial.judge(got, trial.yard.exact)
    for name, x in got.items():
        bound = trial.yard.never[name]
        if x.size and x.shape == trial.yard.exact[name].shape:
            error = np.linalg.norm(rows(name, x) - rows(name, trial.yard.exact[name]), axis=-1)
            yield Measure(f"{name} never", float(np.max(error / bound)), trial.limits.never, error.size, gate="never")


@claim("tolerance", gradients)
def reference_backward(trial: Trial) -> Iterable[Measure]:
    """dq, dk, dv, dg, dbeta, dS0 (and dA_log, ddt_bias of a gate inside) equal the adjoint recurrence in float64.

    Would have caught: transformers #48455 (NaN gradients under a finite forward), FLA #984 (one tile width wrong),
    #1141 (gradient of the final state), #863 (missing term of dbeta).
    """
    grads = {name: x for name, x in trial.both.numbers().items() if name.startswith("d")}
    yield from trial.judge(grads, trial.yard.exact)


@claim("tolerance", every(plain, takes("initial_state")))
def dplr_equality(trial: Trial) -> Iterable[Measure]:
    """KDA is general DPLR with a = beta k, b = k exp(g), v <- beta v (section 6.2): the same outputs, within rounding.

    On a KDA kernel it judges the base call against another form of the definition. Would have caught: wrong sides or
    signs in a mapping between the two families (FLA writes a, b of DPLR and RWKV7 differently).
    """
    case = trial.case
    q, k, g = case.per_value_head(case.q), case.per_value_head(case.k), case.g
    q, k, v, g = (np.swapaxes(x, 1, 2) for x in (q, k, case.beta[..., None] * case.v, g))
    beta = np.swapaxes(case.beta, 1, 2)[..., None]
    o, S = general_dplr(q, k, v, beta * k, k * np.exp(g), g, case.initial, case.inputs().resolved_scale)
    yield from trial.judge(trial.forward.numbers(), {"o": np.swapaxes(o, 1, 2), "S": S})


@claim("tolerance", plain)
def deltanet(trial: Trial) -> Iterable[Measure]:
    """With g = 0 (no decay) KDA is DeltaNet: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T.

    Would have caught: an epsilon or a clamp inside the decay, a triangular solve cut short ((I + L)^-1 as I - L).
    """
    yield from _scalar_gates(trial, np.zeros(trial.case.beta.shape))


@claim("tolerance", plain)
def gated_deltanet(trial: Trial) -> Iterable[Measure]:
    """With one gate per token and head, equal over channels, KDA is Gated DeltaNet: S_t = alpha_t (S - beta k k^T S) +
    beta k v^T.

    Would have caught: FLA #781 (head 0's gates read for every head), a gate applied one token late.
    """
    yield from _scalar_gates(trial, -trial.dice("gates").integers(0, 64, trial.case.beta.shape) / 64.0)


def _scalar_gates(trial: Trial, g: np.ndarray) -> Iterable[Measure]:
    case = trial.case.but(g=np.broadcast_to(g[..., None], trial.case.g.shape).copy())
    S, o, k, q = case.initial.copy(), np.empty_like(case.v), case.per_value_head(case.k), case.per_value_head(case.q)
    for t in range(case.T):
        read = np.einsum("bhkv,bhk->bhv", S, k[:, t])
        alpha = np.exp(g[:, t])[..., None]
        S = alpha[..., None] * S + np.einsum(
            "bhk,bhv->bhkv", k[:, t] * case.beta[:, t, :, None], case.v[:, t] - alpha * read
        )
        o[:, t] = case.inputs().resolved_scale * np.einsum("bhkv,bhk->bhv", S, q[:, t])
    yield from trial.judge(trial.run(case).numbers(), {"o": o, "S": S}, yardstick.measure(case, trial.contract, False))


@claim("tolerance", every(plain, takes("initial_state")))
def beta_zero(trial: Trial) -> Iterable[Measure]:
    """With beta = 0 nothing is written: S_T = Diag(exp sum g) S_0 and o_t = scale * S_0^T (exp(g_1 + .. + g_t) q_t).

    Would have caught: FLA #652 (mask of the exponential), a state that is not decayed, keys that leak through a mask.
    """
    base = trial.case
    case = base.but(beta=np.zeros_like(base.beta), S0=trial.dice("S0").normal(base.dS.shape))
    decay = np.multiply.accumulate(np.exp(case.g), axis=1)
    o = case.inputs().resolved_scale * np.einsum("bthk,bhkv->bthv", decay * case.per_value_head(case.q), case.S0)
    yield from trial.judge(
        trial.run(case).numbers(),
        {"o": o, "S": decay[:, -1, :, :, None] * case.S0},
        yardstick.measure(case, trial.contract, False),
    )


@claim("tolerance", plain)
def exact_recall(trial: Trial) -> Iterable[Measure]:
    """With beta_t = 1, a unit key and q_t = k_t, o_t = scale * v_t for any gate and state: read is what was written.

    Keys are one-hot, so that the norm is exactly 1. Would have caught: a causal mask that is strict where it must not
    be, attention-gym #465 (an update that silently does not happen), errors in the diagonal of the triangular solve.
    """
    base = trial.case
    keys = np.eye(base.K)[trial.dice("keys").integers(0, base.K, base.q.shape[:-1])]
    case = base.but(q=keys, k=keys, beta=np.ones_like(base.beta))
    exact = {"o": case.inputs().resolved_scale * case.v}
    yard = yardstick.measure(case, trial.contract, False)
    yield from trial.judge({"o": trial.run(case).numbers()["o"]}, exact, yard)


@claim("tolerance", plain)
def same_key_merge(trial: Trial) -> Iterable[Measure]:
    """With g = 0 and a unit key, two writes of one value merge: beta_1, beta_2 act as 1 - (1 - beta_1)(1 - beta_2).

    So beta = 1 is idempotent. Would have caught: a wrong sign or a missing beta in the triangular matrix (a solve cut
    short not: with two tokens I - L is the inverse).
    """
    base, dice = trial.case.tokens(0, 1), trial.dice("merge")
    keys = np.eye(base.K)[np.full(base.q.shape[:-1], dice.integer(0, base.K))]
    first, second = ((0.5, 0.5), (1.0, 1.0), (0.25, 0.5))[dice.integer(0, 3)]
    one = base.but(k=keys, g=np.zeros_like(base.g), beta=np.full_like(base.beta, 1 - (1 - first) * (1 - second)))
    twice = {name: np.repeat(getattr(one, name), 2, axis=1) for name in ("q", "k", "v", "g", "do")}
    two = one.but(**twice, beta=np.stack([np.full_like(one.beta[:, 0], b) for b in (first, second)], axis=1))
    yard, merged, apart = (
        yardstick.measure(two, trial.contract, False),
        trial.run(one).numbers(),
        trial.run(two).numbers(),
    )
    last = yardstick.Yardstick({}, {"S": yard.legal["S"], "o": yard.legal["o"][:, 1:]}, {})
    yield from trial.pair({"S": apart["S"], "o": apart["o"][:, 1:]}, merged, last)


@claim("tolerance", every(plain, more("K")))
def orthogonal_commute(trial: Trial) -> Iterable[Measure]:
    """With g = 0, two tokens with orthogonal keys commute: swapping them leaves S.

    Would have caught: an erase where keys do not overlap, a last token that does not reach the state.
    """
    base = trial.case
    start = np.broadcast_to(base.q[:, :1], (base.B, 2, base.H, base.K)).copy()
    keys = np.zeros_like(start)
    i, j = trial.dice("keys").permutation(base.K)[:2]
    keys[:, 0, :, i], keys[:, 1, :, j] = 1.0, 1.0
    values = trial.case.rounded(Dice(trial.recipe.seed, "two values").normal((base.B, 2, base.HV, base.V)))
    case = base.but(
        q=start,
        k=keys,
        v=values,
        g=np.zeros((base.B, 2, base.HV, base.K)),
        do=values,
        beta=np.stack([np.full_like(base.beta[:, 0], b) for b in (0.5, 1.0)], axis=1),
    )
    swapped = case.but(**{name: getattr(case, name)[:, ::-1] for name in ("q", "k", "v", "g", "beta")})
    yard = yardstick.measure(case, trial.contract, False)
    yield from trial.pair({"S": trial.run(case).numbers()["S"]}, {"S": trial.run(swapped).numbers()["S"]}, yard)


@claim("tolerance", every(plain, more("T")))
def residual(trial: Trial) -> Iterable[Measure]:
    """What is held at k_T after the write: k^T S_T = (1 - beta ||k||^2) k^T Diag(alpha) S_{T-1} + beta ||k||^2 v_T^T.

    Reference-free, on the kernel's own states. Would have caught: a state without its last tokens (FLA #1143).
    """
    case, last = trial.case, trial.case.T - 1
    S, before = trial.forward.numbers()["S"], trial.run(case.tokens(0, last)).numbers()["S"]
    k, beta = case.per_value_head(case.k)[:, last], case.beta[:, last, :, None]
    square, alpha = np.sum(k * k, axis=-1, keepdims=True), np.exp(case.g[:, last])
    held = np.einsum("bhk,bhkv->bhv", k * alpha, before)
    error = np.einsum("bhk,bhkv->bhv", k, S) - ((1 - beta * square) * held + beta * square * case.v[:, last])
    legal = np.sqrt(square) * (trial.yard.legal["S"] + _earlier(trial, last) * np.max(alpha, axis=-1, keepdims=True))
    worst = float(np.max(np.abs(error) / np.maximum(legal, np.finfo(np.float64).tiny)))
    yield Measure("k^T S", worst, trial.limits.pair, error.size, gate="pair")


@condition("the target keeps the inverse of a chunk's triangle")
def _exposes(trial: Trial) -> bool:
    return trial.target.inverse is not None


@claim("tolerance", every(plain, _exposes), most=8)
def inverse_norm(trial: Trial) -> Iterable[Measure]:
    """The inverse of a chunk is well conditioned, whatever the gates: ||(I + diag(beta) L)^-1 diag(beta)||_2 is at most

        1 / min_i (1 / beta_i - ||k_i||^2 / 2)
    because L + L^T + diag(||k_i||^2) is a sum of positive semidefinite kernels: at most 2 for beta <= 1 and unit keys.
    Chunks in which some beta ||k||^2 = 2 have no bound. Roundings of the inverse add C of its roundoffs, times 8.

    Would have caught: FLA #537 (a solve that explodes, values above 1e10), FlashKDA #10, vLLM #54859 (a Neumann product
    in float16 for near-collinear keys), a sign in the off-diagonal blocks.
    """
    case, target = trial.case, trial.target
    arrays = case.per_value_head(case.k), case.g, case.beta
    tensors = [
        guarded(x, dtype, target.place)
        for x, dtype in zip(arrays, (case.dtype, case.gate_dtype, case.gate_dtype), strict=True)
    ]
    with blame():
        X = target.inverse(*tensors).detach().cpu().double().numpy()
    C = X.shape[-1]
    with np.errstate(divide="ignore"):
        room = 1 / case.beta - np.sum(arrays[0] ** 2, axis=-1) / 2
    room = np.pad(room, ((0, 0), (0, -case.T % C), (0, 0)), constant_values=np.inf)
    least = np.min(room.reshape(case.B, -1, C, case.HV), axis=2).swapaxes(1, 2)
    finite, judged = np.isfinite(X).all(axis=(-2, -1)), least > 2.0**-10
    norms = np.linalg.norm(np.where(finite[..., None, None], X, 0.0), 2, axis=(-2, -1))
    slack = 1 + 8 * C * UNIT_ROUNDOFF[trial.contract.inverse]
    ratios = norms * np.where(np.isinf(least), np.finfo(np.float64).max, least) / slack  # without beta it is zero
    worst = float(np.max(np.where(finite, np.where(judged, ratios, 0.0), np.inf), initial=0.0))
    yield Measure("norm of the inverse", worst, 1.0, int(judged.sum()))


def _earlier(trial: Trial, last: int) -> np.ndarray:
    return yardstick.measure(trial.case.tokens(0, last), trial.contract, False).legal["S"]
