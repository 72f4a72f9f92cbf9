"""A case: arrays and arguments of one call, exactly representable in the kernel's dtypes, and ways to vary it."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from kda_spec.types import Inputs
from verify.exact import round_to

TOKENWISE = ("q", "k", "v", "g", "beta", "do")


@dataclass(frozen=True)
class Activation:
    """What the op computes inside from raw q, k, g, beta; False or "none": the input comes activated."""

    l2norm: bool = False
    gate: str = "none"
    A_log: np.ndarray | None = None
    dt_bias: np.ndarray | None = None
    lower_bound: float | None = None
    sigmoid: str = "none"


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one call in float64: q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV].

    S0 [N, HV, K, V] or None; do [B, T, HV, V] and dS [N, HV, K, V] are the gradients that a backward starts from.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    S0: np.ndarray | None
    do: np.ndarray
    dS: np.ndarray
    dtype: str
    gate_dtype: str
    scale: float | None = None
    cu_seqlens: tuple[int, ...] | None = None
    chunk_size: int | None = None
    activation: Activation = Activation()

    @property
    def B(self) -> int:
        """Batch size."""
        return self.q.shape[0]

    @property
    def T(self) -> int:
        """Tokens (of all sequences, when packed)."""
        return self.q.shape[1]

    @property
    def H(self) -> int:
        """Query/key heads."""
        return self.q.shape[2]

    @property
    def HV(self) -> int:
        """Value heads."""
        return self.v.shape[2]

    @property
    def K(self) -> int:
        """Key dimension."""
        return self.q.shape[3]

    @property
    def V(self) -> int:
        """Value dimension."""
        return self.v.shape[3]

    @property
    def N(self) -> int:
        """Number of sequences, which is the number of states."""
        return self.dS.shape[0]

    @property
    def state_dtype(self) -> str:
        """Dtype of initial and final states."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def initial(self) -> np.ndarray:
        """The initial state, zeros where none is given."""
        return np.zeros_like(self.dS) if self.S0 is None else self.S0

    def sequences(self) -> list[tuple[int, slice]]:
        """List (batch index, tokens) of every sequence, in the order of the states."""
        if self.cu_seqlens is None:
            return [(b, slice(0, self.T)) for b in range(self.B)]
        return [(0, slice(a, b)) for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    def inputs(self) -> Inputs:
        """Return the definition's inputs; the caller has applied the activations."""
        return Inputs(
            self.q,
            self.k,
            self.v,
            self.g,
            self.beta,
            scale=self.scale,
            initial_state=self.S0,
            cu_seqlens=self.cu_seqlens,
        )

    def digest(self) -> str:
        """Hash every argument and every input bit (first 16 hex digits of SHA-256)."""
        a = self.activation
        flags = (self.dtype, self.gate_dtype, self.scale, self.cu_seqlens, self.chunk_size)
        inside = (a.l2norm, a.gate, a.lower_bound, a.sigmoid)
        h = hashlib.sha256(repr((flags, inside)).encode())
        for x in (self.q, self.k, self.v, self.g, self.beta, self.S0, self.do, self.dS, a.A_log, a.dt_bias):
            h.update(b"None" if x is None else np.ascontiguousarray(x).tobytes())
        return h.hexdigest()[:16]

    def but(self, **changes) -> "Case":
        """Return this case with some fields replaced."""
        return replace(self, **changes)

    def tokens(self, start: int, stop: int) -> "Case":
        """Cut tokens [start, stop) out of an unpacked batch; S0 stays with a cut from 0, others start from none."""
        assert self.cu_seqlens is None
        cut = {name: getattr(self, name)[:, start:stop] for name in TOKENWISE}
        return self.but(**cut, S0=self.S0 if start == 0 else None)

    def sequence(self, n: int) -> "Case":
        """Cut out sequence n as a batch of its own."""
        b, tokens = self.sequences()[n]
        cut = {name: getattr(self, name)[b : b + 1, tokens] for name in TOKENWISE}
        return self.but(
            **cut, S0=None if self.S0 is None else self.S0[n : n + 1], dS=self.dS[n : n + 1], cu_seqlens=None
        )

    def batch(self, order: np.ndarray) -> "Case":
        """Reorder the batch entries of an unpacked batch."""
        assert self.cu_seqlens is None
        moved = {name: getattr(self, name)[order] for name in TOKENWISE}
        return self.but(**moved, S0=None if self.S0 is None else self.S0[order], dS=self.dS[order])

    def heads(self, order: np.ndarray) -> "Case":
        """Reorder the query/key heads, each with its group of value heads."""
        group = self.HV // self.H
        values = (np.asarray(order)[:, None] * group + np.arange(group)).reshape(-1)
        moved = {name: getattr(self, name)[:, :, order] for name in ("q", "k")}
        moved |= {name: getattr(self, name)[:, :, values] for name in ("v", "g", "beta", "do")}
        A_log, dt_bias = self.activation.A_log, self.activation.dt_bias
        inside = replace(
            self.activation,
            A_log=None if A_log is None else A_log[values],
            dt_bias=None if dt_bias is None else dt_bias.reshape(self.HV, -1)[values].reshape(-1),
        )
        return self.but(
            **moved, S0=None if self.S0 is None else self.S0[:, values], dS=self.dS[:, values], activation=inside
        )

    def per_value_head(self, x: np.ndarray) -> np.ndarray:
        """Repeat an array of query/key heads [B, T, H, ...] for every value head of its group."""
        return np.repeat(x, self.HV // self.H, axis=2)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """Round to the dtype of q, k and v."""
        return round_to(x, self.dtype)
