"""Slow runs of KDA that round operands and sums as a precision contract says: what a right implementation may lose.

Two legal orders of operations, heads first ([..., T, K]): token by token (with its adjoint), and in chunks with the
triangular solve of the WY form. Where a contract stores intermediates narrower than it sums, the solve is a product
with the inverse as it is stored: unlike substitution, it does not correct one row's rounding in the next. Decays
between two tokens are products of exp(g), so every gate down to minus infinity is legal. They share nothing with
`kda_spec`, and nothing with the implementations that they help to judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from impls.contracts import PrecisionContract
from verify.exact import UNIT_ROUNDOFF, round_to

GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dS0")


@dataclass(frozen=True)
class Rounding:
    """Where a simulator rounds: matmul operands, the stored inverse, and everything else to the accumulator's dtype."""

    operand: str
    accumulator: str
    stored: str
    """The dtype of X diag(beta), X the inverse of a chunk's triangle; the accumulator's: nothing is stored."""
    state: str | None = None
    """The dtype of S between tokens or chunks; None: the accumulator's."""
    inverse: str | None = None
    """The dtype of the products that make a stored inverse; None: the accumulator's."""

    @staticmethod
    def of(contract: PrecisionContract) -> "Rounding":
        """Return what a contract says."""
        wide = UNIT_ROUNDOFF[contract.accumulator]
        state, inverse = (x if UNIT_ROUNDOFF[x] > wide else None for x in (contract.state, contract.inverse))
        return Rounding(contract.operand, contract.accumulator, contract.stored, state, inverse)

    def kept(self, S: np.ndarray) -> np.ndarray:
        """Round a state as it is kept."""
        return round_to(S, self.state) if self.state else S

    def factor(self, x: np.ndarray) -> np.ndarray:
        """Round a factor of the products that make a stored inverse."""
        return round_to(x, self.inverse) if self.inverse else x

    @property
    def numpy(self) -> type:
        """NumPy's dtype of the accumulator."""
        return np.float64 if self.accumulator == "float64" else np.float32

    @property
    def cast(self) -> Callable[[np.ndarray], np.ndarray]:
        """The rounding of one matmul operand."""
        return (lambda x: x) if self.operand == self.accumulator else (lambda x: round_to(x, self.operand))


def sequential(q, k, v, g, beta, S, scale: float, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Run token by token: q, k, g [..., T, K], v [..., T, V], beta [..., T], S [..., K, V] to o and the last state."""
    r = rounding.cast
    q, k, v, g, beta, S = (np.asarray(x, rounding.numpy) for x in (q, k, v, g, beta, S))
    alpha, o = np.exp(g), np.empty_like(v)
    for t in range(q.shape[-2]):
        P = alpha[..., t, :, None] * S
        row = r(k[..., t, None, :])
        delta = beta[..., t, None, None] * (v[..., t, None, :] - row @ r(P))
        S = rounding.kept(P + row.swapaxes(-1, -2) * r(delta))
        o[..., t, :] = (rounding.numpy(scale) * (r(q[..., t, None, :]) @ r(S)))[..., 0, :]
    return o, S


def adjoint(q, k, v, g, beta, S, scale: float, do, dS, rounding: Rounding) -> dict[str, np.ndarray]:
    """Run token by token and back. do [..., T, V], dS [..., K, V]; returns the gradients named in `GRADIENTS`."""
    r, scale = rounding.cast, rounding.numpy(scale)
    q, k, v, g, beta, S, do, dS = (np.asarray(x, rounding.numpy) for x in (q, k, v, g, beta, S, do, dS))
    T, alpha, states = q.shape[-2], np.exp(g), [S]
    for t in range(T):
        states.append(
            sequential(
                *(x[..., t : t + 1, :] for x in (q, k, v, g)), beta[..., t : t + 1], states[-1], scale, rounding
            )[1]
        )
    grads = {
        "dq": np.empty_like(q),
        "dk": np.empty_like(k),
        "dv": np.empty_like(v),
        "dg": np.empty_like(g),
        "dbeta": np.empty_like(beta),
    }
    for t in reversed(range(T)):
        row, out, b = r(k[..., t, None, :]), r(do[..., t, None, :]), beta[..., t, None, None]
        P = alpha[..., t, :, None] * states[t]
        u = v[..., t, None, :] - row @ r(P)
        dS = dS + scale * r(q[..., t, None, :]).swapaxes(-1, -2) * out
        d_delta = row @ r(dS)
        du = b * d_delta
        dP = dS - row.swapaxes(-1, -2) * r(du)
        grads["dq"][..., t, :] = scale * (out @ r(states[t + 1]).swapaxes(-1, -2))[..., 0, :]
        grads["dk"][..., t, :] = (r(b * u) @ r(dS).swapaxes(-1, -2) - r(du) @ r(P).swapaxes(-1, -2))[..., 0, :]
        grads["dv"][..., t, :] = du[..., 0, :]
        grads["dbeta"][..., t] = np.sum(d_delta * u, axis=-1)[..., 0]
        grads["dg"][..., t, :] = np.sum(dP * P, axis=-1)
        dS = alpha[..., t, :, None] * dP
    return grads | {"dS0": dS}


def chunked(q, k, v, g, beta, S, scale: float, rounding: Rounding, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Run in chunks of C tokens, the solve inside a chunk by forward substitution. Arguments as in `sequential`."""
    q, k, v, g, beta, S = (np.asarray(x, rounding.numpy) for x in (q, k, v, g, beta, S))
    parts = [np.empty_like(v[..., :0, :])]
    for start in range(0, q.shape[-2], C):
        piece = slice(start, start + C)
        o, S = _chunk(*(x[..., piece, :] for x in (q, k, v, np.exp(g))), beta[..., piece, None], S, rounding)
        S = rounding.kept(S)
        parts.append(rounding.numpy(scale) * o)
    return np.concatenate(parts, axis=-2), S


def _chunk(q, k, v, alpha, beta, S, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    r, C = rounding.cast, q.shape[-2]
    between, A, L = (
        np.empty_like(alpha[..., :0, :]),
        np.zeros((*q.shape[:-1], C), q.dtype),
        np.zeros((*q.shape[:-1], C), q.dtype),
    )
    before = np.multiply.accumulate(alpha, axis=-2)
    for i in range(C):
        # between[j] is the product of decays of the tokens j+1 .. i
        between = np.concatenate([between * alpha[..., i : i + 1, :], np.ones_like(alpha[..., :1, :])], axis=-2)
        weighed = (between * k[..., : i + 1, :]).swapaxes(-1, -2)
        A[..., i, : i + 1] = (r(q[..., i : i + 1, :]) @ r(weighed))[..., 0, :]
        L[..., i, :i] = (beta[..., i : i + 1, :] * (r(k[..., i : i + 1, :]) @ r(weighed[..., :i])))[..., 0, :]
    delta = _solved(L, beta, v - r(k * before) @ r(S), rounding)
    o = r(q * before) @ r(S) + r(A) @ r(delta)
    return o, before[..., -1, :, None] * S + r(between * k).swapaxes(-1, -2) @ r(delta)


def _solved(L, beta, u, rounding: Rounding) -> np.ndarray:
    """Return (I + L)^-1 diag(beta) u: by substitution, or by the stored inverse where that is narrower."""
    r, stored = rounding.cast, rounding.stored != rounding.accumulator
    x = beta * (np.broadcast_to(np.eye(L.shape[-1], dtype=L.dtype), L.shape) if stored else u)
    for i in range(1, L.shape[-1]):
        row, above = L[..., i : i + 1, :i], x[..., :i, :]
        x[..., i : i + 1, :] -= rounding.factor(row) @ rounding.factor(above) if stored else r(row) @ r(above)
    return round_to(x, rounding.stored) @ r(u) if stored else x
