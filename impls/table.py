"""The table of implementations: one frozen record each; a new implementation is one more row."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

from impls.checks import DTYPE_NAMES, MAX_HEAD_DIM, check_inputs, wants_gradient
from impls.configs import (
    CHUNK_SIZES,
    TRITON_CHUNK_SIZES,
    ChunkTorchConfig,
    ChunkTritonConfig,
    DplrTorchConfig,
    DplrTritonConfig,
    RecurrentTorchConfig,
    RecurrentTritonConfig,
)
from impls.contracts import BITWISE_CLAIMS, PrecisionContract, at_least_float32, narrow_operands

HAS_TRITON = find_spec("triton") is not None
"""Looked up here: torch 2.11 traces calls of `Impl.supports`, and nothing that looks for a module."""


@dataclass(frozen=True)
class Impl:
    """Describe one implementation, without importing it: `load` does that. Rows can be pickled."""

    name: str
    summary: str
    form: Literal["chunk", "recurrent", "layer", "training"]
    """Whether it computes chunk by chunk or token by token: which of the public ops may choose it. A layer's step
    and a training step are for none of them: `impls.layer_steps`, `impls.training_steps`."""
    load: Callable[[], Callable]
    """Import the implementation and return its function: (q, k, v, g, beta, *, config=None, **keywords) -> results.

    The function relies on q to beta having passed `checks.check_inputs`, and on `supports`.
    """
    contract: Callable[[str], PrecisionContract]
    """Return what is rounded how, for inputs of the named dtype."""
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    backward: bool
    chunk_sizes: tuple[int, ...] | None
    """The chunk lengths C it takes, None where it has no chunks."""
    config: type | None = None
    """The dataclass of its launch configurations, None where nothing can be configured."""

    def call(self, q, k, v, g, beta, *, config=None, **keywords):
        """Run it, or fail: return (o, final state or None), and the kept states with return_intermediate_states.

        `keywords` are those of `impls.chunk_kda` by name, A_log, dt_bias, chunk_size and state_interval among them; an
        unknown one is a TypeError. `config` is a launch configuration of this implementation, None for its default.
        Raises ValueError with the reason for a device, dtype or size that it does not support.
        """
        check_inputs(q, k, v, g, beta)
        asked = described(q, v)
        if asked["device"] == "cpu" and "cpu" not in self.devices and interpreting():
            asked["device"] = "interpret"
        others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
        if reason := self.supports(backward=wants_gradient((q, k, v, g, beta, *others)), **asked):
            raise ValueError(reason)
        return self.load()(q, k, v, g, beta, config=config, **keywords)

    def supports(
        self,
        *,
        form: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        K: int = 1,
        V: int = 1,
        backward: bool = False,
        chunk_size: int | None = None,
    ) -> str | None:
        """Return None where it covers these inputs, otherwise the reason why it does not."""
        if form not in (None, self.form):
            return f"{self.name} is of the form {self.form}, not {form}"
        if device.split(":")[0] not in self.devices:
            where = f"{self.name} runs on {', '.join(self.devices)}, not on {device}"
            return where + INTERPRET_HINT if device == "cpu" and "interpret" in self.devices else where
        if "triton" in self.name and not HAS_TRITON:
            return f"{self.name} needs triton, which is not installed"
        if dtype not in self.dtypes:
            return f"{self.name} takes {', '.join(self.dtypes)}, not {dtype}"
        if not (1 <= K <= MAX_HEAD_DIM and 1 <= V <= MAX_HEAD_DIM):
            return f"{self.name} takes K and V from 1 to {MAX_HEAD_DIM}, not K = {K}, V = {V}"
        if backward and not self.backward:
            return f"{self.name} has no backward: call it under torch.no_grad(), or take chunk_torch"
        if chunk_size is not None and chunk_size not in (self.chunk_sizes or ()):
            return f"{self.name} takes chunk sizes {self.chunk_sizes or 'of no kind'}, not {chunk_size}"
        return None


INTERPRET_HINT = "; CPU tensors run in Triton's interpreter, where TRITON_INTERPRET=1 is set before triton is imported"


def interpreting() -> bool:
    """Tell whether Triton's interpreter runs the kernels of this process, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _recurrent_torch() -> Callable:
    from impls.recurrent_torch import recurrent_torch

    return recurrent_torch


def _chunk_torch() -> Callable:
    from impls.chunk_torch import chunk_torch

    return chunk_torch


def _recurrent_triton() -> Callable:
    from impls.recurrent_triton import recurrent_triton

    return recurrent_triton


def _chunk_triton() -> Callable:
    from impls.chunk_triton import chunk_triton

    return chunk_triton


def _dplr_torch() -> Callable:
    from impls.dplr_as_kda import by_torch

    return by_torch


def _dplr_triton() -> Callable:
    from impls.dplr_as_kda import by_triton

    return by_triton


_FLOATS = ("float64", "float32", "bfloat16", "float16")

# Of several rows that support the same inputs the first is chosen.
IMPLEMENTATIONS: tuple[Impl, ...] = (
    Impl(
        name="recurrent_triton",
        summary="token by token in Triton, one launch; on a GPU not measured",
        form="recurrent",
        load=_recurrent_triton,
        contract=partial(at_least_float32, bitwise=BITWISE_CLAIMS - {"value_slices"}),
        devices=("cuda", "interpret"),
        dtypes=_FLOATS[1:],
        backward=False,
        chunk_sizes=None,
        config=RecurrentTritonConfig,
    ),
    Impl(
        name="chunk_triton",
        summary="chunk by chunk in Triton, in the tree form, two launches, back in five; on a GPU not measured",
        form="chunk",
        load=_chunk_triton,
        contract=partial(narrow_operands, bitwise=frozenset({"layout"})),
        devices=("cuda", "interpret"),
        dtypes=_FLOATS[1:],
        backward=True,
        chunk_sizes=TRITON_CHUNK_SIZES,
        config=ChunkTritonConfig,
    ),
    Impl(
        name="recurrent_torch",
        summary="token by token in torch; the decode step; eager or compiled; cuda not measured",
        form="recurrent",
        load=_recurrent_torch,
        contract=partial(at_least_float32, bitwise=BITWISE_CLAIMS),
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        backward=True,
        chunk_sizes=None,
        config=RecurrentTorchConfig,
    ),
    Impl(
        name="chunk_torch",
        summary="chunk by chunk in torch, in the tree form; eager or compiled; cuda not measured",
        form="chunk",
        load=_chunk_torch,
        contract=partial(at_least_float32, bitwise=BITWISE_CLAIMS - {"value_slices", "split"}),
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        backward=True,
        chunk_sizes=CHUNK_SIZES,
        config=ChunkTorchConfig,
    ),
)


YARDSTICKS: tuple[Impl, ...] = (
    Impl(
        name="dplr_torch",
        summary="KDA as the member of general DPLR that it is, in torch: what binding a and b to k saves",
        form="chunk",
        load=_dplr_torch,
        contract=partial(at_least_float32, bitwise=frozenset()),
        devices=("cpu", "cuda"),
        dtypes=_FLOATS[:2],
        backward=False,
        chunk_sizes=TRITON_CHUNK_SIZES,
        config=DplrTorchConfig,
    ),
    Impl(
        name="dplr_triton",
        summary="the same in Triton, two launches; on a GPU not measured",
        form="chunk",
        load=_dplr_triton,
        contract=partial(at_least_float32, bitwise=frozenset()),
        devices=("cuda", "interpret"),
        dtypes=_FLOATS[1:2],
        backward=False,
        chunk_sizes=TRITON_CHUNK_SIZES,
        config=DplrTritonConfig,
    ),
)
"""Rows that are judged, tuned and timed by their names, and that no public op chooses by itself."""
NAMED = (*IMPLEMENTATIONS, *YARDSTICKS)


def find(name: str) -> Impl:
    """Return the implementation of that name; KeyError with the known names where there is none."""
    rows = (*IMPLEMENTATIONS, *YARDSTICKS)
    for implementation in rows:
        if implementation.name == name:
            return implementation
    raise KeyError(f"unknown implementation {name!r}; known: {', '.join(row.name for row in rows)}")


def described(q, v) -> dict[str, object]:
    """Say what kind of inputs q [B, T, H, K] and v [B, T, HV, V] are, in the keywords of `Impl.supports`."""
    return {"device": q.device.type, "dtype": DTYPE_NAMES[q.dtype], "K": q.shape[3], "V": v.shape[3]}


def chosen(**asked) -> Impl:
    """Return the first implementation of the table that supports what is asked: keywords as in `Impl.supports`.

    Raises ValueError with the reason of every row where none does.
    """
    reasons = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.supports(**asked)
        if reason is None:
            return implementation
        reasons.append(reason)
    raise ValueError(f"no implementation supports these inputs: {'; '.join(reasons)}")
