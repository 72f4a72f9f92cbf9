"""Running error bounds along a case, in units of the roundoff: one step's rounding enters, the contraction carries it
on.

For every token and value column j (columns of the state never mix):

    e_t[j] = max(alpha_t) (e_{t-1}[j] + s_{t-1}[j]) + beta_t ||k_t|| (|v_tj| + ||k_t|| p_t[j]) + s_t[j]      s =
    ||S_t[:, j]||
    d-side: the same for D_t = dL/dS_t, backwards; every gradient is a product of the two sides     p = ||alpha_t
    S_{t-1}[:, j]||

Names: e, s belong to S_t; f, d are error and size of D_t. All are norms, so the bounds are normwise and never amplified
inside
the domain, unlike a majorant of absolute values (25 orders of magnitude too large at slow decay).
"""

import numpy as np


def forward(q, k, v, g, beta, S) -> dict[str, np.ndarray]:
    """Walk [..., T, K] heads first. Returns per token: e, s of S_t and E, p of the decayed state [..., T, V], and
    states.
    """
    T, alpha = q.shape[-2], np.exp(g)
    e, s = np.zeros_like(S[..., 0, :]), np.linalg.norm(S, axis=-2)
    shape = v.shape
    out = {name: np.zeros(shape) for name in ("e", "s", "E", "p")} | {"states": [S]}
    for t in range(T):
        most = np.max(alpha[..., t, :], axis=-1, keepdims=True)
        P = alpha[..., t, :, None] * S
        p, E = np.linalg.norm(P, axis=-2), most * (e + s)
        row = k[..., t, None, :]
        delta = beta[..., t, None, None] * (v[..., t, None, :] - row @ P)
        S = P + row.swapaxes(-1, -2) * delta
        norm = np.linalg.norm(k[..., t, :], axis=-1, keepdims=True)
        s = np.linalg.norm(S, axis=-2)
        e = E + beta[..., t, None] * norm * (np.abs(v[..., t, :]) + norm * p) + s
        for name, x in (("e", e), ("s", s), ("E", E), ("p", p)):
            out[name][..., t, :] = x
        out["states"].append(S)
    return out


def backward(q, k, v, g, beta, scale: float, do, dS, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bound the errors of the gradients per row, from the sizes that `forward` returned. Units: one accumulator
    roundoff.
    """
    T, alpha, D = q.shape[-2], np.exp(g), dS
    f, names = np.linalg.norm(dS, axis=-2), ("dq", "dk", "dv", "dg", "dbeta")
    out = {name: np.zeros(q.shape[:-1]) for name in names}
    for t in reversed(range(T)):
        row, b = k[..., t, None, :], beta[..., t]
        norm, out_norm = np.linalg.norm(k[..., t, :], axis=-1), np.linalg.norm(do[..., t, :], axis=-1)
        D = D + scale * q[..., t, :, None] * do[..., t, None, :]
        d = np.linalg.norm(D, axis=-2)
        f = f + d
        side, error = _size(d), _size(f)
        held, lost = _size(sizes["p"][..., t, :]), _size(sizes["E"][..., t, :] + sizes["p"][..., t, :])
        u = np.linalg.norm(v[..., t, :], axis=-1) + norm * held
        e_u = np.linalg.norm(v[..., t, :], axis=-1) + norm * lost
        erased = 1 + b * norm * norm
        out["dq"][..., t] = scale * out_norm * _size(sizes["e"][..., t, :] + sizes["s"][..., t, :])
        out["dv"][..., t] = b * norm * error
        out["dbeta"][..., t] = norm * (error * u + side * e_u)
        out["dk"][..., t] = b * (error * u + side * e_u + norm * (held * error + lost * side))
        out["dg"][..., t] = erased * (error * held + side * lost)
        D = alpha[..., t, :, None] * (D - row.swapaxes(-1, -2) * (b[..., None, None] * (row @ D)))
        f = np.max(alpha[..., t, :], axis=-1, keepdims=True) * (f + (erased * b * norm * norm + 1)[..., None] * d)
    return out | {"dS0": f + np.linalg.norm(D, axis=-2)}


def _size(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)
