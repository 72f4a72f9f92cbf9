"""Define what goes into Kimi Delta Attention, what comes out, and where it is defined.

The domain of every argument (`check_domain` enforces it; shapes are enforced when `Inputs` is built):

    q              finite
    k              finite
    v              finite
    g              in [-inf, 0]: natural logarithm of the decay of one token and channel, never cumulated; -inf forgets
    beta           0 <= beta * ||k||^2 <= 2: inside it every transition is a contraction, ||A_t|| <= max exp(g_t)
    scale          finite
    initial_state  finite
    cu_seqlens     integers that rise, or stay for an empty sequence, from 0 to T
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# float64 keys of norm one have ||k||^2 = 1 +- a few roundings, so beta = 2 must not be refused for the last bits.
BOUND_SLACK = 1e-12


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes of one case: batch, tokens, query/key heads, value heads, key dim, value dim, sequences."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hold the arguments of one KDA call in the layout of the field, as float64 arrays.

    q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV, K] (natural log, <= 0), beta [B, T, HV],
    initial_state [N, HV, K, V]. Value head h reads query/key head h // (HV // H). `scale` None means K**-0.5.
    `cu_seqlens` (N + 1 offsets from 0 to T, B == 1) cuts the tokens into N sequences; without it N == B.

    Raises ValueError, naming the argument, for shapes and offsets that do not fit.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    scale: float | None = None
    initial_state: np.ndarray | None = None
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, axes in (("q", 4), ("k", 4), ("v", 4), ("g", 4), ("beta", 3), ("initial_state", 4)):
            value = getattr(self, name)
            if value is not None or name != "initial_state":
                object.__setattr__(self, name, _as_float64(name, value, axes))
        if self.scale is not None:
            object.__setattr__(self, "scale", float(self.scale))
        if self.cu_seqlens is not None:
            object.__setattr__(self, "cu_seqlens", _as_offsets(self.cu_seqlens))
        _check_shapes(self)

    @property
    def sizes(self) -> Sizes:
        """Return the sizes that the shapes imply."""
        B, T, H, K = self.q.shape
        N = B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return Sizes(B=B, T=T, H=H, HV=self.v.shape[2], K=K, V=self.v.shape[3], N=N)

    @property
    def resolved_scale(self) -> float:
        """Return the factor of the output: `scale`, or K**-0.5 where none was given."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def sequences(self) -> Iterator[tuple[int, slice, int]]:
        """Yield (batch index, slice of tokens, state index) for every sequence, empty ones included."""
        if self.cu_seqlens is None:
            B, T = self.q.shape[:2]
            yield from ((b, slice(0, T), b) for b in range(B))
        else:
            bounds = zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)
            yield from ((0, slice(start, end), n) for n, (start, end) in enumerate(bounds))

    def runs(self) -> Iterator[tuple[slice, slice, slice]]:
        """Yield (batch slice, token slice, state slice) of the sequences that can run together, of one length each."""
        if self.cu_seqlens is None:
            B, T = self.q.shape[:2]
            yield slice(0, B), slice(0, T), slice(0, B)
        else:
            yield from ((slice(0, 1), tokens, slice(n, n + 1)) for _, tokens, n in self.sequences())

    def heads_first(self, batch: slice, tokens: slice) -> tuple[np.ndarray, ...]:
        """Return q, k, v, g, beta of one run as [B, HV, T, ...], query/key heads repeated for their value heads."""
        group = self.sizes.HV // self.sizes.H
        q, k, v, g, beta = (x[batch, tokens].swapaxes(1, 2) for x in (self.q, self.k, self.v, self.g, self.beta))
        return np.repeat(q, group, axis=1), np.repeat(k, group, axis=1), v, g, beta


@dataclass(frozen=True, eq=False)
class Outputs:
    """Hold o [B, T, HV, V] and final_state [N, HV, K, V], float64."""

    o: np.ndarray
    final_state: np.ndarray


@dataclass(frozen=True, eq=False)
class Gradients:
    """Hold the gradients of a scalar loss, float64, shaped like the inputs; initial_state is never None."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    initial_state: np.ndarray


def check_domain(inputs: Inputs) -> None:
    """Check that every value lies in its domain (the table at the top of this file); shapes are known to be right.

    Raises ValueError that names the argument, the bound and the worst value.
    """
    named = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "scale": inputs.resolved_scale}
    if inputs.initial_state is not None:
        named["initial_state"] = inputs.initial_state
    for name, value in named.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {_first(value, ~np.isfinite(value))}")
    _check_all("g must lie in [-inf, 0]", inputs.g, inputs.g <= 0)
    _check_all("beta must be at least 0 and finite", inputs.beta, (inputs.beta >= 0) & (inputs.beta < np.inf))
    group = inputs.sizes.HV // inputs.sizes.H
    strength = inputs.beta * np.repeat(np.sum(inputs.k**2, axis=-1), group, axis=2)
    _check_all("beta * ||k||^2 must be at most 2", strength, strength <= 2 * (1 + BOUND_SLACK))


def _check_all(claim: str, values: np.ndarray, good: np.ndarray) -> None:
    if not np.all(good):
        raise ValueError(f"{claim}, got {_first(values, ~good)}")


def _first(values: np.ndarray | float, bad: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{np.asarray(values)[index]} at {index}"


def _as_float64(name: str, value: object, axes: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got shape {array.shape}")
    return array.astype(np.float64, copy=False)


def _as_offsets(cu_seqlens: object) -> tuple[int, ...]:
    try:
        return tuple(operator.index(offset) for offset in cu_seqlens)
    except TypeError as error:
        raise ValueError(f"cu_seqlens must be a sequence of integers, got {cu_seqlens!r}") from error


def _check_shapes(inputs: Inputs) -> None:
    B, T, H, K = inputs.q.shape
    HV, V = inputs.v.shape[2:]
    if min(B, H, K) < 1:
        raise ValueError(f"q must have B, H, K of at least 1 in [B, T, H, K], got shape {inputs.q.shape}")
    if V < 1 or HV < 1 or HV % H:
        raise ValueError(f"v must have V of at least 1 and HV a multiple of H = {H}, got shape {inputs.v.shape}")
    expected = {"k": (B, T, H, K), "v": (B, T, HV, V), "g": (B, T, HV, K), "beta": (B, T, HV)}
    if inputs.cu_seqlens is not None:
        _check_offsets(inputs.cu_seqlens, B, T)
    if inputs.initial_state is not None:
        expected["initial_state"] = (inputs.sizes.N, HV, K, V)
    for name, shape in expected.items():
        if (actual := getattr(inputs, name).shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {actual}")


def _check_offsets(cu_seqlens: tuple[int, ...], B: int, T: int) -> None:
    if B != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (sequences packed along T), got B = {B}")
    falls = any(end < start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False))
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != T or falls:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T} in at least two entries, got {cu_seqlens}")
