"""Running error bounds along a case, in units of the roundoff: a step's rounding enters, the contraction carries it on.

For every token and value column j (columns never mix), with s = |S_t[:, j]| and p = |alpha_t S_{t-1}[:, j]|:

    e_t[j] = max(alpha_t) (e_{t-1}[j] + s_{t-1}[j]) + max(2 |g_t| alpha_t) s_{t-1}[j]
             + beta_t ||k_t|| (3 |v_tj| + (sqrt(K) + 3) ||k_t|| p_t[j]) + s_t[j]

and the same for D_t = dL/dS_t, backwards; every gradient is a product of the two sides. The factors: g and exp(g) are
rounded; beta, k, the difference and the sum each round what is written; a dot product of length n counts sqrt(n)
roundings (Higham and Mary 2019): with one, a right float32 run was 6.2 times the floor at K = 64 and q = k, where every
rounding of the sum goes the same way. `noise` is the same walk for independent roundings of matmul operands: squares
add.

|S| is the norm, or, where that is larger, the root of the sum of squares of the parts that a chunk adds up to S: the
state that entered it and its writes, decayed but never erased. Where a token wipes the state (K = 1, beta k^2 = 1) the
norm falls to that of its own write, and the roundings of what it wiped remain: by norms alone, dg of right chunks was
12.6 times the floor in one of 10,000 cases, and 7e7 times in another, where it is zero. Simulators of narrow operands,
at chunk lengths that Y does not use, were 7.5 times Y in the worst of 400 cases; now 2.4. It costs sharpness, in both
gates and for those, too, who go token by token: of float32 the floor rose by 2% (o) to 15% (dk) in the median row, 2.8
to 11 times in a tenth, and 26 to 220 times in a hundredth of them, where spikes are erased.

Below an operand's smallest normal number, `least`, a rounding costs as much as at it: the written row, beta k, the
decayed state and the decayed keys each pay for that, too. It shows in float16 (2^-14), with beta or values near it.

Names: e, s belong to S_t; f, d are error and size of D_t. All are normwise, so the bounds are never amplified inside
the domain, unlike a majorant of absolute values (25 orders of magnitude too large at slow decay).
"""

import numpy as np

CHUNK = 64
"""Tokens after which parts start anew: what earlier ones lost is in e. Without an end they grow with the sequence: at
T = 1024, g = 0, K = 16, beta = 1 the floor of dk was 36 times that by norms, and is 4.5 times that."""


def forward(q, k, v, g, beta, S, least: float = 0.0) -> dict[str, np.ndarray]:
    """Walk [..., T, K] heads first. Returns [..., T, V]: e, s of S_t; lost, p of the decayed state; read of q^T S_t.

    lost and read count the sqrt(K) roundings of the products k^T alpha S and q^T S as well.
    """
    length, before = np.sqrt(q.shape[-1]), _size(np.swapaxes(S, -1, -2))[..., None, :]
    s, p = _sizes(k, v, np.exp(g), beta, S)
    before = np.concatenate([before, s], axis=-2)[..., :-1, :]
    most, blur, norm = *_decays(g), _size(k)[..., None]
    b, write, size = beta[..., None], beta[..., None] * norm, np.abs(v) + norm * p
    under = least * (norm + write * norm * length + (norm + 2 * length * b) * size)
    carried, squares = (most + blur) * before, (write * size + under) ** 2
    enters = write * (3 * np.abs(v) + (length + 3) * norm * p) + s + under
    for t in range(1, q.shape[-2]):
        carried[..., t, :] += most[..., t, :] * (carried[..., t - 1, :] + enters[..., t - 1, :])
        squares[..., t, :] += most[..., t, :] ** 2 * squares[..., t - 1, :]
    e, noise = carried + enters, np.sqrt(squares)
    return {"e": e, "s": s, "read": e + length * (s + least), "lost": carried + length * p, "p": p, "noise": noise}


def _sizes(k, v, alpha, beta, S) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes of S_t and of the decayed state before it, [..., T, V]."""
    s, p, parts, alpha = np.empty(v.shape), np.empty(v.shape), None, alpha[..., None]
    for t in range(v.shape[-2]):
        parts, row = S * S if t % CHUNK == 0 else parts, k[..., t, None, :]
        P, parts = alpha[..., t, :, :] * S, alpha[..., t, :, :] ** 2 * parts
        p[..., t, :] = _larger(P, parts)
        written = row.swapaxes(-1, -2) * (beta[..., t, None, None] * (v[..., t, None, :] - row @ P))
        S, parts = P + written, parts + written * written
        s[..., t, :] = _larger(S, parts)
    return s, p


def backward(q, k, v, g, beta, scale: float, do, dS, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bound the errors of the gradients per row, in accumulator roundoffs, from the sizes that `forward` returned.

    dg may also err like the sum that kernels make of it: q dq and k dk of this and every later token, dS S at the end
    (autograd of a cumulated gate does that): where the exact sum is zero, as at a first token without a state, a
    rounding of its terms is left. Total minus prefix is not covered: late in a sequence it errs with the whole sum.
    """
    T, b, norm, length = q.shape[-2], beta, _size(k), np.sqrt(max(q.shape[-1], v.shape[-1]))
    d, first = _sizes_back(q, k, np.exp(g), beta, scale * do, dS)
    (most, blur), erased = _decays(g), (1 + b * norm * norm)[..., None]
    f, last = np.empty_like(d), np.linalg.norm(dS, axis=-2)
    for t in reversed(range(T)):
        f[..., t, :] = last + d[..., t, :]
        through = f[..., t, :] + (1 + length * (erased[..., t, :] - 1)) * d[..., t, :]
        last = most[..., t, :] * through + blur[..., t, :] * erased[..., t, :] * d[..., t, :]
    side, error, erased = _size(d), _size(f + length * d), erased[..., 0]
    held, lost = _size(sizes["p"]), _size(sizes["lost"] + length * sizes["p"])
    size_v, read = _size(v), scale * _size(do)
    u, e_u = size_v + norm * held, 3 * size_v + norm * (lost + 3 * held)
    terms = _size(q) * read * _size(sizes["s"]) + norm * b * side * (u + norm * held)
    later = np.flip(np.cumsum(np.flip(terms, -1), axis=-1), -1) + _last_term(dS, sizes, T)
    return {
        "dq": read * length * _size(sizes["read"]),
        "dk": b * (error * u + side * e_u + norm * (held * error + lost * side)),
        "dv": b * norm * error,
        "dg": np.maximum(erased * (error * held + side * lost), later),
        "dbeta": norm * (error * u + side * e_u),
        "dS0": last + first,
    }


def _sizes_back(q, k, alpha, beta, do, D) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes of D_t, [..., T, V], and that of the initial state's gradient, [..., V]."""
    d, parts, alpha = np.empty(do.shape), D * D, alpha[..., None]
    for t in reversed(range(do.shape[-2])):
        parts = D * D if (t + 1) % CHUNK == 0 else parts
        row, added = k[..., t, None, :], q[..., t, :, None] * do[..., t, None, :]
        D, parts = D + added, parts + added * added
        d[..., t, :] = _larger(D, parts)
        erasing = row.swapaxes(-1, -2) * (beta[..., t, None, None] * (row @ D))
        D, parts = alpha[..., t, :, :] * (D - erasing), alpha[..., t, :, :] ** 2 * (parts + erasing * erasing)
    return d, _larger(D, parts)


def _decays(g) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest decay of a token's channels, and what rounding g, or g / ln 2, costs there: [..., T, 1].

    The cost is at most 2 |g| exp(g) of every channel.
    """
    alpha = np.exp(g)
    blur = np.where(alpha > 0, -2 * g, 0.0) * alpha
    return np.max(alpha, axis=-1, keepdims=True), np.max(blur, axis=-1, keepdims=True)


def _last_term(dS, sizes: dict[str, np.ndarray], T: int) -> np.ndarray | float:
    return (_size(np.linalg.norm(dS, axis=-2)) * _size(sizes["s"][..., -1, :]))[..., None] if T else 0.0


def _larger(x, parts) -> np.ndarray:
    """Return the larger of the norms of a state's columns and those of its parts, given squared: [..., V]."""
    return np.sqrt(np.maximum(np.sum(x * x, axis=-2), np.sum(parts, axis=-2)))


def _size(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)
