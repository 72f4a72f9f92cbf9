"""Say what a call launches before anything is launched: the problem, the kernels in order, the workspace between them.

One plan serves the launcher, the report of what the compiler makes of each kernel, and the static count of bytes.
"""

from dataclasses import dataclass, field
from typing import Any

from impls.targets import Target

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """Hold what is known of a call without looking at a value. Everything here may be compiled into a kernel."""

    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int
    dtype: str
    """Of q, k, v and o."""
    packed: bool = False
    """Whether cu_seqlens says where N sequences lie along T."""
    l2norm: bool = False
    gate: str = "none"
    sigmoid: str = "none"
    A_log: bool = False
    dt_bias: bool = False
    initial: bool = False
    final: bool = False
    keeps: bool = False
    v_first: bool = False

    @property
    def bounded(self) -> bool:
        """Tell whether 0 <= beta |k|^2 <= 1 is certain: then the inverse has no large elements."""
        return self.l2norm and self.sigmoid == "once"

    @property
    def BK(self) -> int:
        """Key channels of a tile: a power of two, at least the 16 that a matrix instruction takes."""
        return tile_of(self.K)

    def spans(self, span: int) -> int:
        """Count the slots for spans of so many tokens: see `impls.layout_triton`."""
        return self.T // span + self.N if self.packed else self.N * -(-self.T // span)


def tile_of(channels: int) -> int:
    """Return the smallest power of two that holds the channels, at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


@dataclass(frozen=True)
class Wanted:
    """Say which gradients are wanted, and which of the outputs' gradients are given."""

    q: bool = True
    k: bool = True
    v: bool = True
    g: bool = True
    beta: bool = True
    A_log: bool = False
    dt_bias: bool = False
    initial: bool = False
    do: bool = True
    dS: bool = False

    @property
    def gradients(self) -> dict[str, bool]:
        """Name the tensors of gradients, and tell which of them are wanted."""
        return {_GRADIENTS.get(x, f"d{x}"): getattr(self, x) for x in WANTED}

    @property
    def decays(self) -> bool:
        """Tell whether gradients of log decays are wanted."""
        return self.g or self.A_log or self.dt_bias

    @property
    def rows(self) -> bool:
        """Tell whether gradients of rows of q, k or g are wanted: then states are kept."""
        return self.q or self.k or self.decays

    @property
    def solved(self) -> bool:
        """Tell whether y is needed behind the walk back."""
        return self.k or self.beta or self.decays


WANTED = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial")
"""What may want a gradient, in the order of the op's results."""
_GRADIENTS = {"initial": "dS0"}


@dataclass(frozen=True)
class Launch:
    """One kernel of a plan: how many programs, which buffers by name, and what is compiled into it."""

    name: str
    kernel: Any
    programs: int
    buffers: tuple[str, ...]
    """The pointers that it gets; its other pointers are None."""
    constants: dict[str, Any] = field(compare=False)
    options: dict[str, int] = field(compare=False)
    dtypes: dict[str, str] = field(default_factory=dict, compare=False)
    """Of buffers whose dtype neither their name nor the inputs' dtype tells."""

    def run(self, buffers: dict[str, Any], scalars: dict[str, int | float], programs: int | None = None) -> None:
        """Launch the kernel, or only so many programs, on tensors and numbers by name; nothing where there is none."""
        programs = self.programs if programs is None else programs
        if programs == 0:
            return
        known = {**{name: buffers[name] for name in self.buffers}, **scalars, **self.constants}
        self.kernel[(programs,)](*(known.get(name) for name in self.kernel.arg_names), **self.options)


@dataclass(frozen=True)
class Plan:
    """The launches of one call in order, and the buffers that live between them: name -> (dtype, shape)."""

    launches: tuple[Launch, ...]
    workspace: dict[str, tuple[str, tuple[int, ...]]] = field(compare=False)
    scalars: dict[str, int] = field(default_factory=dict, compare=False)


def options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    """Return launch options in Triton's names; 0 registers means that the compiler decides.

    Fused multiply-adds are asked for: Triton 3.10 flips what it does unasked.
    """
    cap = {"maxnreg": registers} if registers else {}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **cap}


def narrow(dtype: str) -> bool:
    """Tell whether products have operands of 16 bits."""
    return ITEMSIZE[dtype] == 2


def inverse_precision(problem: Problem, target: Target) -> str:
    """Return how products inside the inverse round their float32 operands: a matter of the contract, never tuned.

    tf32 loses 1e-3 of the inverse where beta |k|^2 <= 1, which operands in bfloat16 hide, and 1e-2 where eigenvalues
    may be negative: there three products of tf32 stand for one. AMD has no such mode: full float32.
    """
    if not (narrow(problem.dtype) and target.tf32):
        return "ieee"
    return "tf32" if problem.bounded else "tf32x3"
