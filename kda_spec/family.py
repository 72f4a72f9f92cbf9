"""Describe the family of linear attentions (Tables 6 and 7): parameters of general DPLR, online objective, update rule.

    member    S_t                                          objective L(S)                                    step
    LA        S + k v^T                                    -<S^T k, v>                                       gradient
    RetNet    alpha S + beta k v^T                         -beta <S^T k, v> + 1/2 ||sqrt(1-alpha) S||^2      gradient
    Mamba2    alpha_t S + beta k v^T                       as RetNet                                         gradient
    GLA       Diag(alpha) S + k v^T                        -<S^T k, v> + 1/2 ||sqrt(Diag(1-alpha)) S||^2     gradient
    HGRN2     Diag(alpha) S + (1-alpha) v^T                as GLA with k = 1 - alpha                         gradient
    Longhorn  (I - eps k k^T) S + eps k v^T                beta/2 ||S^T k - v||^2                            implicit
    Comba     (alpha - beta k k^^T) S + beta k v^T         beta (d/2 ||S^T k||^2 - <S^T k, v>) + decay       gradient
    RWKV7     (Diag(alpha) - (b * k^) k^^T) S + k v^T      1/2 ||S^T k^||^2 - <S^T (k/b), v> + decay / b     scaled
    DeltaNet  (I - beta k k^T) S + beta k v^T              beta/2 ||S^T k - v||^2                            gradient
    GDN       (I - beta k k^T) alpha S + beta k v^T        beta/2 ||S~^T k - v||^2, S~ = alpha S             decayed
    KDA       (I - beta k k^T) Diag(alpha) S + beta k v^T  beta/2 ||S~^T k - v||^2, S~ = Diag(alpha) S       decayed

with S = S_{t-1}, alpha = exp g, eps = beta / (1 + beta ||k||^2), and four ways from an objective to its rule (`Step`).

Where the printed tables and the gradient of the printed objective disagree, what stands above is what holds:

* Longhorn: the gradient of the printed objective has beta in both terms, the printed rule eps in the erase and beta in
  the write. The minimiser of 1/2 ||S - S_{t-1}||^2 + L(S) (the implicit step, Longhorn's own derivation) has eps in
  both. The printed norm weighs value columns by a vector beta; general DPLR shares one transition among them, so beta
  is a scalar here.
* Comba: the printed objective gives k k^T in the erase, the printed rule k k^^T. Such a step has a potential only where
  k^ is a multiple of k; with k^ = d k (d the feedback) it is the one above, for d = 1 the printed one up to a constant.
* RWKV7: the printed objective erases with k~ k~^T and writes with k~, the printed rule erases with (b * k^) k^^T,
  indexed s and t, and writes with k. That is a gradient step with one learning rate b > 0 per channel on the objective
  above; it falls back to the printed objective, up to a constant, where b = 1 and k = k^ = k~.
* DeltaNet stands in Table 6 only. That table omits beta, and its KDA row decays after the erase, equation 1 before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from kda_spec.recurrent import general_dplr


class Step(Enum):
    """Name the way from an objective L to the update rule; p are the parameters of the token."""

    GRADIENT = "S_t = S - grad L(S) at S = S_{t-1}"
    DECAYED = "S_t = S~ - grad L(S~) at S~ = Diag(alpha_t) S_{t-1}"
    IMPLICIT = "S_t = argmin_S 1/2 ||S - S_{t-1}||^2 + L(S)"
    SCALED = "S_t = S - Diag(b_t) grad L(S) at S = S_{t-1}"


@dataclass(frozen=True, eq=False)
class Parameters:
    """Hold the parameters of T tokens, or of one token where the T axis is missing; a member reads those it `uses`.

    v [..., T, V] values; k [..., T, K] keys; g [..., T, K], or [..., T, 1] where all channels share it, natural log
    decay; beta [..., T] write strength; feedback [..., T] Comba's d with k^ = d k; k_hat, rate [..., T, K] RWKV7's
    removal key k^ and learning rate b.
    """

    v: np.ndarray
    k: np.ndarray | None = None
    g: np.ndarray | None = None
    beta: np.ndarray | None = None
    feedback: np.ndarray | None = None
    k_hat: np.ndarray | None = None
    rate: np.ndarray | None = None

    @property
    def alpha(self) -> np.ndarray:
        """Return the decay exp g."""
        return np.exp(self.g)


class Dplr(NamedTuple):
    """Hold the arguments of `general_dplr` behind q: k, v, a, b, g."""

    k: np.ndarray
    v: np.ndarray
    a: np.ndarray
    b: np.ndarray
    g: np.ndarray


@dataclass(frozen=True)
class Member:
    """Describe one member of the family.

    `arguments` turns parameters of T tokens into general DPLR, `objective` is L(S, parameters of one token) -> float
    and `rule` the state after that token, S [K, V]; `step` says how the rule follows from the objective.
    """

    name: str
    uses: tuple[str, ...]
    arguments: Callable[[Parameters], Dplr]
    objective: Callable[[np.ndarray, Parameters], float]
    rule: Callable[[np.ndarray, Parameters], np.ndarray]
    step: Step = Step.GRADIENT


def run(member: Member, q, parameters: Parameters, S0=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Run a member over T tokens as general DPLR: o [..., T, V], last state [..., K, V] for q [..., T, K]."""
    return general_dplr(q, *member.arguments(parameters), S0, scale)


def _dplr(k, v, a=None, b=None, g=None) -> Dplr:
    """Fill in what a member leaves out: no erase is a = b = 0, no decay is g = 0; a shared gate spreads out."""
    zeros = np.zeros_like(k)
    return Dplr(k, v, zeros if a is None else a, zeros if b is None else b, zeros if g is None else zeros + g)


def _longhorn_rate(p: Parameters) -> np.ndarray:
    return p.beta / (1 + p.beta * np.sum(p.k * p.k, axis=-1))


def _strength(rate: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.asarray(rate)[..., None] * k


def _write(S, k, v) -> float:
    """Return -<S^T k, v>, whose gradient step writes k v^T."""
    return -np.sum((k @ S) * v)


def _forget(S, alpha) -> float:
    """Return 1/2 ||sqrt(Diag(1 - alpha)) S||_F^2, whose gradient step decays the state."""
    return 0.5 * np.sum((1 - alpha)[:, None] * S**2)


def _recall(S, p: Parameters) -> float:
    """Return beta/2 ||S^T k - v||^2, whose gradient step is the delta rule."""
    return 0.5 * p.beta * np.sum((p.k @ S - p.v) ** 2)


def _comba_objective(S, p: Parameters) -> float:
    return p.beta * (0.5 * p.feedback * np.sum((p.k @ S) ** 2) + _write(S, p.k, p.v)) + _forget(S, p.alpha)


def _rwkv7_objective(S, p: Parameters) -> float:
    forget = 0.5 * np.sum(((1 - p.alpha) / p.rate)[:, None] * S**2)
    return 0.5 * np.sum((p.k_hat @ S) ** 2) + _write(S, p.k / p.rate, p.v) + forget


def _delta(S, k, v, rate) -> np.ndarray:
    """Return (I - rate k k^T) S + rate k v^T."""
    return S - rate * np.outer(k, k @ S) + rate * np.outer(k, v)


def _decay_and_write(S, alpha, k, v) -> np.ndarray:
    return alpha[:, None] * S + np.outer(k, v)


def _retnet_like(name: str) -> Member:
    """Return RetNet or Mamba2: one decay for all channels, constant in RetNet, chosen by the token in Mamba2."""
    return Member(
        name,
        uses=("k", "v", "g", "beta"),
        arguments=lambda p: _dplr(p.k, _strength(p.beta, p.v), g=p.g),
        objective=lambda S, p: p.beta * _write(S, p.k, p.v) + _forget(S, p.alpha),
        rule=lambda S, p: _decay_and_write(S, p.alpha, p.beta * p.k, p.v),
    )


def _gated_delta(name: str) -> Member:
    """Return GDN or KDA: decay first, then the delta rule on the decayed state; one gate per token or per channel."""
    return Member(
        name,
        uses=("k", "v", "g", "beta"),
        arguments=lambda p: _dplr(p.k, _strength(p.beta, p.v), _strength(p.beta, p.k), p.k * p.alpha, p.g),
        objective=_recall,
        rule=lambda S, p: _delta(p.alpha[:, None] * S, p.k, p.v, p.beta),
        step=Step.DECAYED,
    )


LA = Member(
    "LA",
    uses=("k", "v"),
    arguments=lambda p: _dplr(p.k, p.v),
    objective=lambda S, p: _write(S, p.k, p.v),
    rule=lambda S, p: S + np.outer(p.k, p.v),
)
RETNET = _retnet_like("RetNet")
MAMBA2 = _retnet_like("Mamba2")
GLA = Member(
    "GLA",
    uses=("k", "v", "g"),
    arguments=lambda p: _dplr(p.k, p.v, g=p.g),
    objective=lambda S, p: _write(S, p.k, p.v) + _forget(S, p.alpha),
    rule=lambda S, p: _decay_and_write(S, p.alpha, p.k, p.v),
)
HGRN2 = Member(
    "HGRN2",
    uses=("v", "g"),
    arguments=lambda p: _dplr(1 - p.alpha, p.v, g=p.g),
    objective=lambda S, p: _write(S, 1 - p.alpha, p.v) + _forget(S, p.alpha),
    rule=lambda S, p: _decay_and_write(S, p.alpha, 1 - p.alpha, p.v),
)
LONGHORN = Member(
    "Longhorn",
    uses=("k", "v", "beta"),
    arguments=lambda p: _dplr(p.k, _strength(_longhorn_rate(p), p.v), _strength(_longhorn_rate(p), p.k), p.k),
    objective=_recall,
    rule=lambda S, p: _delta(S, p.k, p.v, _longhorn_rate(p)),
    step=Step.IMPLICIT,
)
COMBA = Member(
    "Comba",
    uses=("k", "v", "g", "beta", "feedback"),
    arguments=lambda p: _dplr(p.k, _strength(p.beta, p.v), _strength(p.beta, p.k), _strength(p.feedback, p.k), p.g),
    objective=_comba_objective,
    rule=lambda S, p: p.alpha * S - p.beta * np.outer(p.k, p.feedback * p.k @ S) + p.beta * np.outer(p.k, p.v),
)
RWKV7 = Member(
    "RWKV7",
    uses=("k", "v", "g", "k_hat", "rate"),
    arguments=lambda p: _dplr(p.k, p.v, p.rate * p.k_hat, p.k_hat, p.g),
    objective=_rwkv7_objective,
    rule=lambda S, p: _decay_and_write(S, p.alpha, p.k, p.v) - np.outer(p.rate * p.k_hat, p.k_hat @ S),
    step=Step.SCALED,
)
DELTANET = Member(
    "DeltaNet",
    uses=("k", "v", "beta"),
    arguments=lambda p: _dplr(p.k, _strength(p.beta, p.v), _strength(p.beta, p.k), p.k),
    objective=_recall,
    rule=lambda S, p: _delta(S, p.k, p.v, p.beta),
)
GDN = _gated_delta("GDN")
KDA = _gated_delta("KDA")

FAMILY: tuple[Member, ...] = (LA, RETNET, MAMBA2, GLA, HGRN2, LONGHORN, COMBA, RWKV7, DELTANET, GDN, KDA)
