"""Running error bounds along a case, in units of the roundoff: a step's rounding enters, the contraction carries it on.

For every token and value column j (columns never mix), with s = ||S_t[:, j]|| and p = ||alpha_t S_{t-1}[:, j]||:

    e_t[j] = max(alpha_t (e_{t-1}[j] + (1 + 2 |g_t|) s_{t-1}[j]))
             + beta_t ||k_t|| (3 |v_tj| + (sqrt(K) + 3) ||k_t|| p_t[j]) + s_t[j]

and the same for D_t = dL/dS_t, backwards; every gradient is a product of the two sides. The factors: g and exp(g) are
rounded; beta, k, the difference and the sum each round what is written; a dot product of length n counts sqrt(n)
roundings (Higham and Mary 2019): with one, a right float32 run was 6.2 times the floor at K = 64 and q = k, where every
rounding of the sum goes the same way. `noise` is the same walk for independent roundings of matmul operands: squares
add.

Below an operand's smallest normal number, `least`, a rounding costs as much as at it: the written row, beta k, the
decayed state and the decayed keys each pay for that, too. It shows in float16 (2^-14), with beta or values near it.

Names: e, s belong to S_t; f, d are error and size of D_t. All are norms, so the bounds are normwise and never amplified
inside the domain, unlike a majorant of absolute values (25 orders of magnitude too large at slow decay).
"""

import numpy as np


def forward(q, k, v, g, beta, S, least: float = 0.0) -> dict[str, np.ndarray]:
    """Walk [..., T, K] heads first. Returns [..., T, V]: e, s of S_t; lost, p of the decayed state; read of q^T S_t."""
    T, alpha, length = q.shape[-2], np.exp(g), np.sqrt(q.shape[-1])
    e, s = np.zeros_like(S[..., 0, :]), np.linalg.norm(S, axis=-2)
    out = {name: np.zeros(v.shape) for name in ("e", "s", "read", "lost", "p", "noise")}
    noise = np.zeros_like(e)
    for t in range(T):
        most, blur = np.max(alpha[..., t, :], axis=-1, keepdims=True), _blur(alpha[..., t, :], g[..., t, :])
        P = alpha[..., t, :, None] * S
        p, carried = np.linalg.norm(P, axis=-2), most * (e + s) + blur * s
        row = k[..., t, None, :]
        delta = beta[..., t, None, None] * (v[..., t, None, :] - row @ P)
        S = P + row.swapaxes(-1, -2) * delta
        norm = np.linalg.norm(k[..., t, :], axis=-1, keepdims=True)
        s = np.linalg.norm(S, axis=-2)
        b, size = beta[..., t, None], np.abs(v[..., t, :]) + norm * p
        write = b * norm
        under = least * (norm + write * norm * length + (norm + 2 * length * b) * size)
        e = carried + write * (3 * np.abs(v[..., t, :]) + (length + 3) * norm * p) + s + under
        noise = np.hypot(most * noise, write * size + under)
        named = {"e": e, "s": s, "read": e + length * (s + least), "lost": carried + length * p, "p": p, "noise": noise}
        for name, x in named.items():
            out[name][..., t, :] = x
    return out


def backward(q, k, v, g, beta, scale: float, do, dS, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bound the errors of the gradients per row, in accumulator roundoffs, from the sizes that `forward` returned.

    dg may also err like the sum that kernels make of it: q dq and k dk of this and every later token, dS S at the end
    (autograd of a cumulated gate does that): where the exact sum is zero, as at a first token without a state, a
    rounding of its terms is left. Total minus prefix is not covered: late in a sequence it errs with the whole sum.
    """
    T, alpha, D = q.shape[-2], np.exp(g), dS
    length = np.sqrt(max(q.shape[-1], v.shape[-1]))
    f, names = np.linalg.norm(dS, axis=-2), ("dq", "dk", "dv", "dg", "dbeta")
    out, later = {name: np.zeros(q.shape[:-1]) for name in names}, _last_term(dS, sizes, q.shape[-2])
    for t in reversed(range(T)):
        row, b = k[..., t, None, :], beta[..., t]
        norm, size_v = np.linalg.norm(k[..., t, :], axis=-1), np.linalg.norm(v[..., t, :], axis=-1)
        D = D + scale * q[..., t, :, None] * do[..., t, None, :]
        d = np.linalg.norm(D, axis=-2)
        f = f + d
        side, error = _size(d), _size(f + length * d)
        held, lost = _size(sizes["p"][..., t, :]), _size(sizes["lost"][..., t, :] + length * sizes["p"][..., t, :])
        u, e_u = size_v + norm * held, 3 * size_v + norm * (lost + 3 * held)
        erased = 1 + b * norm * norm
        out["dq"][..., t] = scale * _size(do[..., t, :]) * length * _size(sizes["read"][..., t, :])
        out["dv"][..., t] = b * norm * error
        out["dbeta"][..., t] = norm * (error * u + side * e_u)
        out["dk"][..., t] = b * (error * u + side * e_u + norm * (held * error + lost * side))
        read = np.linalg.norm(q[..., t, :], axis=-1) * scale * _size(do[..., t, :]) * _size(sizes["s"][..., t, :])
        later = later + read + norm * b * side * (u + norm * held)
        out["dg"][..., t] = np.maximum(erased * (error * held + side * lost), later)
        D = alpha[..., t, :, None] * (D - row.swapaxes(-1, -2) * (b[..., None, None] * (row @ D)))
        most, blur = np.max(alpha[..., t, :], axis=-1, keepdims=True), _blur(alpha[..., t, :], g[..., t, :])
        f = most * (f + (1 + length * b * norm * norm)[..., None] * d) + blur * erased[..., None] * d
    return out | {"dS0": f + np.linalg.norm(D, axis=-2)}


def _blur(alpha, g) -> np.ndarray:
    """Return what rounding g, or g / ln 2, costs in exp(g), at most 2 |g| exp(g) of every channel: [..., 1]."""
    return np.max(np.where(alpha > 0, -2 * g, 0.0) * alpha, axis=-1, keepdims=True)


def _last_term(dS, sizes: dict[str, np.ndarray], T: int) -> np.ndarray | float:
    return _size(np.linalg.norm(dS, axis=-2)) * _size(sizes["s"][..., -1, :]) if T else 0.0


def _size(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)
