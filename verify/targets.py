"""What is judged: a name from the table, a mutant, or anybody's `package.module:function` with FLA's signature.

A target is called with torch tensors made from a case: values exact, each buffer inside guard bands of NaN so that a
read past its ends shows, every allocation during the call poisoned with NaN so that an element never written shows.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch

from impls.contracts import PrecisionContract
from verify.cases import Case
from verify.poison import GUARD, poisoned_allocations
from verify.recipes import Recipe

STANDARD = frozenset(
    {
        "scale",
        "initial_state",
        "output_final_state",
        "use_qk_l2norm_in_kernel",
        "use_gate_in_kernel",
        "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval",
        "lower_bound",
        "A_log",
        "dt_bias",
        "state_v_first",
        "cu_seqlens",
        "chunk_size",
    }
)
"""FLA's keywords that a judge passes."""


OTHER_AXES = ("backward", "strided inputs", "state_v_first")
"""Axes of the domain that no recipe holds: they lie in how a call is made."""


class TargetError(ValueError):
    """The target cannot be judged as it was named: the message says what was expected and what came."""


class Malformed(Exception):
    """The target returned something other than (o, final_state); the message names what came."""


@dataclass(frozen=True, eq=False)
class Target:
    """An implementation under judgement: its function, its precision contract by input dtype, and what it refuses."""

    name: str
    function: Callable
    contract: Callable[[str], PrecisionContract]
    dtypes: tuple[str, ...]
    chunks: tuple[int, ...] = ()
    named: frozenset[str] = STANDARD
    backward: bool = True
    foreign: bool = False
    device: str = "cpu"
    form: str = "chunk"
    """Chunk or recurrent; somebody else's kernel counts as the first."""
    refused: dict[str, str] = field(default_factory=dict)
    settle: Callable[[Recipe], Recipe] = lambda recipe: recipe
    """The nearest recipe that it takes, where no axis says it."""
    inverse: Callable | None = None
    """(k, g, beta) to the chunks' (I + diag(beta) L)^-1 diag(beta) [B, HV, chunks, C, C], where the target keeps it."""

    @property
    def place(self) -> str:
        """Torch's device of the tensors: in Triton's interpreter they are on the CPU."""
        return "cpu" if self.device == "interpret" else self.device


@dataclass(frozen=True, eq=False)
class Result:
    """Outputs of one call as torch tensors in their own dtypes; `grads` is empty unless a backward was asked for."""

    o: torch.Tensor
    S: torch.Tensor | None
    grads: dict[str, torch.Tensor]

    def check_shapes(self, case: Case) -> None:
        """Raise Malformed where o or S is not of the size of its case: a property may index what it is given."""
        for name, x, shape in (("o", self.o, case.v.shape), ("S", self.S, (case.N, case.HV, case.K, case.V))):
            if x is not None and x.shape != shape:
                raise Malformed(f"{name} must have shape {shape}, got {tuple(x.shape)}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name every tensor: o, S and the gradients."""
        state = {} if self.S is None else {"S": self.S}
        return {"o": self.o, **state, **self.grads}

    def numbers(self) -> dict[str, np.ndarray]:
        """Return every tensor as a float64 array."""
        return {name: x.detach().cpu().double().numpy() for name, x in self.tensors().items()}


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a name."""
    return getattr(torch, name)


def default_contract(dtype: str) -> PrecisionContract:
    """Assume what kernels usually promise: operands in the input dtype, sums and state in float32 at least."""
    wide = "float64" if dtype == "float64" else "float32"
    return PrecisionContract(dtype, wide, wide, wide, dtype, output=dtype)


def guarded(x: np.ndarray, dtype: str, device: str) -> torch.Tensor:
    """Make a contiguous tensor with exactly these values inside a larger buffer of NaN."""
    buffer = torch.full((x.size + 2 * GUARD,), float("nan"), dtype=dtype_of(dtype), device=device)
    view = buffer[GUARD : GUARD + x.size].view(x.shape)
    return view.copy_(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)))


def arguments(
    case: Case, target: Target, state_v_first: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Make the tensors and keywords of a call. Keywords at their default are left out, for callees that lack them."""
    make = {
        "q": (case.q, case.dtype),
        "k": (case.k, case.dtype),
        "v": (case.v, case.dtype),
        "g": (case.g, case.gate_dtype),
        "beta": (case.beta, case.gate_dtype),
    }
    a, keywords = case.activation, {}
    if case.S0 is not None:
        state = np.swapaxes(case.S0, -1, -2) if state_v_first else case.S0
        make["initial_state"] = (state, case.state_dtype)
    if a.A_log is not None:
        make["A_log"] = (a.A_log, case.state_dtype)
    if a.dt_bias is not None:
        make["dt_bias"] = (a.dt_bias, case.state_dtype)
    tensors = {name: guarded(x, dtype, target.place) for name, (x, dtype) in make.items()}
    flags = {
        "scale": case.scale,
        "chunk_size": case.chunk_size,
        "lower_bound": a.lower_bound,
        "state_v_first": state_v_first or None,
        "use_qk_l2norm_in_kernel": a.l2norm or None,
        "use_gate_in_kernel": a.gate != "none" or None,
        "use_beta_sigmoid_in_kernel": a.sigmoid != "none" or None,
        "allow_neg_eigval": a.sigmoid == "twice" or None,
    }
    keywords |= {name: value for name, value in flags.items() if value is not None}
    if case.cu_seqlens is not None:
        keywords["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int64, device=target.place)
    return tensors, keywords


def call(
    target: Target,
    case: Case,
    backward: bool = False,
    rearrange: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
    final_state: bool = True,
    state_v_first: bool = False,
    do: bool = True,
    dS: bool = True,
    wanted: frozenset[str] | None = None,
) -> Result:
    """Run a target on a case.

    `rearrange` maps each input tensor, and do and dS, to an equal one with another layout. `do` and `dS` False leave
    that gradient out. `wanted`: the inputs that require a gradient, where not all do.
    Raises whatever the target raises; Malformed if it returns something other than (o, final_state).
    """
    tensors, keywords = arguments(case, target, state_v_first)
    leaves = {
        name: rearrange(x).detach().requires_grad_(backward and (wanted is None or name in wanted))
        for name, x in tensors.items()
    }
    return call_tensors(target, case, leaves, keywords, backward, final_state, state_v_first, do, dS, rearrange)


def call_tensors(
    target: Target,
    case: Case,
    leaves: dict[str, torch.Tensor],
    keywords: dict,
    backward: bool = False,
    final_state: bool = True,
    state_v_first: bool = False,
    do: bool = True,
    dS: bool = True,
    rearrange: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
    allocations: Callable[[], AbstractContextManager] = poisoned_allocations,
) -> Result:
    """Run a target on given tensors: the part of `call` after they are made; `allocations` poisons what it allocates.
    """
    positional = [leaves[name] for name in ("q", "k", "v", "g", "beta")]
    named = {name: x for name, x in leaves.items() if name not in ("q", "k", "v", "g", "beta")}
    with allocations(), torch.set_grad_enabled(backward):
        returned = target.function(*positional, **named, **keywords, output_final_state=final_state)
        o, S = _unpack(returned, final_state)
        starts = _starts(case, o, S, do, dS, target.place, state_v_first) if backward else []
        grads = _gradients(case, leaves, [(x, rearrange(start)) for x, start in starts]) if backward else {}
    S = None if S is None else S.detach()
    if state_v_first:
        S = None if S is None else S.transpose(-1, -2)
        grads = {name: x.transpose(-1, -2) if name == "dS0" else x for name, x in grads.items()}
    return Result(o.detach(), S, grads)


def _unpack(returned: object, final_state: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return o and S. Raises Malformed for anything but two tensors; S may be None where nobody asked for it."""
    if not isinstance(returned, tuple):
        raise Malformed(f"expected (o, final_state), two tensors, got {type(returned).__name__}")
    kinds = (torch.Tensor, torch.Tensor if final_state else torch.Tensor | None)
    if len(returned) != 2 or not all(isinstance(x, kind) for x, kind in zip(returned, kinds, strict=True)):
        came = ", ".join(type(x).__name__ for x in returned)
        raise Malformed(f"expected (o, final_state), two tensors, got ({came})")
    return returned


def _starts(
    case: Case, o: torch.Tensor, S: torch.Tensor | None, do: bool, dS: bool, device: str, state_v_first: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pair the outputs with the gradients that a backward starts from."""
    starts = [(o, guarded(case.do, case.dtype, device).to(o.dtype))] if do else []
    if dS and S is not None:
        start = np.swapaxes(case.dS, -1, -2) if state_v_first else case.dS
        starts.append((S, guarded(start, case.state_dtype, device).to(S.dtype)))
    return starts


def _gradients(case: Case, leaves: dict, starts: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = {"initial_state": "dS0"}
    wanted = {names.get(name, f"d{name}"): x for name, x in leaves.items() if x.requires_grad}
    if case.T == 0 or len(wanted) < len(leaves):  # what was computed from nothing of it has no gradient to give
        starts = [(x, start) for x, start in starts if x.requires_grad]
    outputs, given = zip(*starts, strict=True) if starts else ((), ())
    found = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True) if outputs else []
    found = found or [None] * len(wanted)
    grads = {name: x.new_zeros(x.shape) if d is None else d for (name, x), d in zip(wanted.items(), found, strict=True)}
    if "ddt_bias" in grads:
        grads["ddt_bias"] = grads["ddt_bias"].reshape(case.HV, case.K)
    return {name: d.detach() for name, d in grads.items()}


def named_keywords(function: Callable) -> frozenset[str]:
    """Return the standard keywords that a function's signature names; a bare **kwargs names none."""
    try:
        return frozenset(inspect.signature(function).parameters) & STANDARD
    except (TypeError, ValueError):
        return STANDARD
