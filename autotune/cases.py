"""What is timed: named shapes, each with the unbounded and with the bounded gate, and the inputs drawn for them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from autotune.outcomes import UsageError
from kda_spec.types import Sizes

MIXED = (1300, 547, 2048, 963, 271, 3063)
"""Lengths of packed sequences that FlashKDA publishes its timings for: 8192 tokens together."""
LOWER_BOUND = -5.0
"""The bound that the models with a bounded gate use, and the lowest that the peers take."""


@dataclass(frozen=True)
class Case:
    """One prefill or decode step: sizes, packing, gate. Gates, norms and sigmoids are computed inside, as in models."""

    name: str
    B: int
    T: int
    H: int
    K: int = 128
    V: int = 128
    lengths: tuple[int, ...] | None = None
    """Lengths of the sequences packed along T; None for B sequences of T tokens."""
    bounded: bool = False
    """Whether the gate is lower_bound * sigmoid(..), which the peers' fast paths need, or -exp(A_log) softplus(..)."""
    always: bool = True
    """Whether it runs when no case is named."""
    forms: tuple[str, ...] = ("chunk",)
    """Forms of ours that run: token by token is out of the question for long sequences."""
    initial: bool = False
    """Whether sequences go on from a state, as in decoding."""

    @property
    def sizes(self) -> Sizes:
        """Return the sizes in the terms of the definition."""
        N = self.B if self.lengths is None else len(self.lengths)
        return Sizes(B=self.B, T=self.T, H=self.H, HV=self.H, K=self.K, V=self.V, N=N)

    @property
    def lower_bound(self) -> float | None:
        """Return the bound of the gate, None where there is none."""
        return LOWER_BOUND if self.bounded else None

    @property
    def summary(self) -> str:
        """Say what it is in a line."""
        packing = "" if self.lengths is None else f", packed {'+'.join(map(str, self.lengths))}"
        gate = f"gate >= {LOWER_BOUND:g}" if self.bounded else "unbounded gate"
        gate += ", from a state" if self.initial else ""
        return f"B={self.B} T={self.T} H={self.H} K={self.K} V={self.V}{packing}, {gate}"


def _shapes() -> Iterable[Case]:
    for H in (64, 96):
        yield Case(f"t8192-h{H}-fixed", 1, 8192, H)
        yield Case(f"t8192-h{H}-mixed", 1, 8192, H, lengths=MIXED)
        yield Case(f"t8192-h{H}-8x1024", 1, 8192, H, lengths=(1024,) * 8)
    yield Case("t1024-h4", 1, 1024, 4)
    yield Case("t65536-h16", 1, 65536, 16)
    yield Case("b4-t4096-h64", 4, 4096, 64)
    for N in (1, 32, 256):
        yield Case(f"decode-b{N}-h32", N, 1, 32, always=False, forms=("recurrent",), initial=True)
    yield Case("small", 1, 256, 2, 64, 64, always=False, forms=("chunk", "recurrent"))


CASES = tuple(
    replace(shape, name=f"{shape.name}-{'bounded' if bounded else 'unbounded'}", bounded=bounded)
    for shape in _shapes()
    for bounded in (False, True)
)


_48B = {"H": 32, "K": 128, "V": 128}
PRESETS = {
    "kimi-linear-48b": {
        "chunk": (
            Case("prefill", 1, 8192, **_48B),
            Case("prefill-packed", 1, 8192, lengths=MIXED, **_48B),
            Case("prefill-long", 1, 65536, **_48B),
        ),
        "recurrent": tuple(Case(f"decode-{N}", N, 1, initial=True, **_48B) for N in (1, 32, 256)),
    },
}
"""Model -> form -> the shapes that it is tuned for, the one that matters most first."""


def selected(patterns: str | None) -> tuple[Case, ...]:
    """Return the cases whose name matches one of the comma-separated globs, all but the small ones for None.

    Raises UsageError for a pattern that matches nothing.
    """
    if patterns is None:
        return tuple(case for case in CASES if case.always)
    globs = [glob for glob in patterns.split(",") if glob]
    for glob in globs or [patterns]:
        if not any(fnmatchcase(case.name, glob) for case in CASES):
            raise UsageError(f"--cases {glob!r} matches none of {', '.join(case.name for case in CASES)}")
    return tuple(case for case in CASES if any(fnmatchcase(case.name, glob) for glob in globs))


def draw(case: Case, device: str, dtype: str, seed: int = 0) -> dict[str, object]:
    """Draw the arguments of `impls.chunk_kda` for a case, on the device, q to beta in `dtype`.

    The final state is asked for, value-first, as an engine needs it and FlashKDA gives it. A_log is log U(1, 16) for
    the unbounded gate and 0 for the bounded one, dt_bias the inverse softplus of exp U(log 1e-3, log 1e-1): what
    models start from.
    """
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(getattr(torch, dtype))

    def uniform(size: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device, dtype=torch.float32)

    A_log = torch.zeros(H, device=device) if case.bounded else uniform(H, 1, 16).log()
    dt_bias = uniform(H * K, math.log(1e-3), math.log(1e-1)).exp().expm1().log()
    arguments = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "g": normal(B, T, H, K),
        "beta": normal(B, T, H),
        "A_log": A_log,
        "dt_bias": dt_bias,
        "lower_bound": case.lower_bound,
        "use_gate_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "output_final_state": True,
        "state_v_first": True,
    }
    if case.initial:
        arguments["initial_state"] = normal(case.sizes.N, H, V, K).float()
    return arguments | _packing(case, device)


def _packing(case: Case, device: str) -> dict[str, torch.Tensor]:
    if case.lengths is None:
        return {}
    ends = torch.tensor((0, *case.lengths), dtype=torch.int64).cumsum(0)
    return {"cu_seqlens": ends.to(device), "cu_seqlens_cpu": ends}
