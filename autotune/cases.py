"""What is timed: named shapes, each with the unbounded and with the bounded gate, and the inputs drawn for them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from autotune.outcomes import UsageError
from impls.training_steps import RESULTS as TRAINED
from kda_spec.types import Sizes

MIXED = (1300, 547, 2048, 963, 271, 3063)
"""Lengths of packed sequences that FlashKDA publishes its timings for: 8192 tokens together."""
LOWER_BOUND = -5.0
"""The bound that the models with a bounded gate use, and the lowest that the peers take."""
WIDTH = 4
"""Of the short convolutions of a layer."""


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
    def training(self) -> bool:
        """Say whether it is a training step: forward and backward."""
        return self.forms == ("training",)

    @property
    def results(self) -> tuple[str, ...]:
        """Name what its rows return."""
        return TRAINED if self.training else ("o", "final_state")

    @property
    def layer(self) -> bool:
        """Say whether it is the step of a whole layer: short convolutions before, a gated norm behind."""
        return self.forms == ("layer",)

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
        gate += f", a layer: convolutions of {WIDTH}, norm" if self.layer else ""
        gate += ", forward and backward" if self.training else ""
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
        yield Case(f"layer-b{N}-h32", N, 1, 32, always=False, forms=("layer",), initial=True)
    for shape, H, lengths in (("t8192-h64-fixed", 64, None), ("t8192-h64-mixed", 64, MIXED), ("t1024-h4", 4, None)):
        T = 1024 if H == 4 else 8192
        yield Case(f"train-{shape}", 1, T, H, lengths=lengths, always=False, forms=("training",))
    yield Case("train-t512-h8", 1, 512, 8, always=False, forms=("training",))
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


@dataclass(frozen=True)
class _Numbers:
    """Draw tensors on a device."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        """Return normal numbers in the dtype of the inputs."""
        of = {"generator": self.generator, "device": self.generator.device}
        return torch.randn(shape, dtype=torch.float32, **of).to(self.dtype)

    def uniform(self, size: int, low: float, high: float) -> torch.Tensor:
        """Return uniform numbers in float32."""
        of = {"generator": self.generator, "device": self.generator.device}
        return low + (high - low) * torch.rand(size, dtype=torch.float32, **of)


def draw(case: Case, device: str, dtype: str, seed: int = 0) -> dict[str, object]:
    """Draw the arguments of `impls.chunk_kda` for a case, on the device, q to beta in `dtype`.

    The final state is asked for, value-first, as an engine needs it and FlashKDA gives it. A_log is log U(1, 16) for
    the unbounded gate and 0 for the bounded one, dt_bias the inverse softplus of exp U(log 1e-3, log 1e-1): what
    models start from. For a layer those of `impls.decode_layer`, for a training step the gradient of o, and no state.
    """
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    numbers = _Numbers(torch.Generator(device).manual_seed(seed), getattr(torch, dtype))
    A_log = torch.zeros(H, device=device) if case.bounded else numbers.uniform(H, 1, 16).log()
    dt_bias = numbers.uniform(H * K, math.log(1e-3), math.log(1e-1)).exp().expm1().log()
    gate = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": case.lower_bound}
    if case.layer:
        return _layer(case, numbers) | gate
    normal = numbers.normal
    tokens = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "g": normal(B, T, H, K),
        "beta": normal(B, T, H),
    }
    arguments = tokens | gate | {
        "use_gate_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "output_final_state": True,
        "state_v_first": True,
    }  # fmt: skip
    if case.training:
        arguments |= {"output_final_state": False, "do": normal(B, T, H, V)}
    if case.initial:
        arguments["initial_state"] = normal(case.sizes.N, H, V, K).float()
    return arguments | _packing(case, device)


def _layer(case: Case, numbers: _Numbers) -> dict[str, object]:
    """Draw what is between the projections of a layer, one token of each sequence, and what it remembers."""
    N, H, K, V, normal = case.B, case.H, case.K, case.V, numbers.normal
    D = 2 * H * K + H * V
    return {
        "qkv": normal(N, D),
        "g": normal(N, H, K),
        "beta": normal(N, H),
        "gate": normal(N, H, V),
        "inputs": normal(N, WIDTH - 1, D),
        "state": normal(N, H, K, V).float(),
        "weight": normal(D, WIDTH),
        "norm_weight": normal(V),
        "epsilon": 1e-5,
    }


def _packing(case: Case, device: str) -> dict[str, torch.Tensor]:
    if case.lengths is None:
        return {}
    ends = torch.tensor((0, *case.lengths), dtype=torch.int64).cumsum(0)
    return {"cu_seqlens": ends.to(device), "cu_seqlens_cpu": ends}
