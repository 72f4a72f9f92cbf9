"""The step of a whole KDA layer, between its projections, as rows that are timed beside each other.

    convolutions with SiLU of q, k and v      l2norm, gate, sigmoid, recurrence      gated norm

All take (qkv, g, beta, gate, inputs, state, *, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon) as
`impls.decode_layer` and change nothing that is given, and return (y, state).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from impls.contracts import at_least_float32
from impls.decode_layer import decode_layer
from impls.ops import fused_recurrent_kda
from impls.table import Impl


@dataclass(frozen=True)
class LayerImpl(Impl):
    """Describe an implementation of the whole step."""

    judged: str | None = None
    """The name by which python -m verify knows its core."""

    def call(self, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Run it: it checks what it is given by itself."""
        return self.load()(**arguments)


def in_one_call(*given, **named) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the step as one op."""
    y, _, S = decode_layer(*given, **named)
    return y, S


def in_parts(
    qkv, g, beta, gate, inputs, state, *, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the step as a model does without fusion: torch for convolutions and norm, around `fused_recurrent_kda`."""
    (HV, K, V), window = state.shape[1:], torch.cat((inputs, qkv[:, None]), 1)
    mixed = F.silu((window * weight.T).sum(1))
    key = (qkv.shape[1] - HV * V) // 2
    parts = zip(mixed.split((key, key, HV * V), 1), (K, K, V), strict=True)
    q, k, v = (x.unflatten(1, (-1, size))[:, None] for x, size in parts)
    o, S = fused_recurrent_kda(
        q, k, v, g[:, None], beta[:, None], A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, initial_state=state,
        output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip
    normed = F.rms_norm(o[:, 0].float(), norm_weight.shape, norm_weight.float(), epsilon)
    return (normed * gate.float().sigmoid()).to(qkv.dtype), S


def row(
    name: str, summary: str, function: Callable[[], Callable], devices: tuple[str, ...], judged: str | None = None
) -> LayerImpl:
    """Return the row of an implementation."""
    return LayerImpl(
        name=name,
        summary=summary,
        form="layer",
        load=function,
        contract=partial(at_least_float32, bitwise=frozenset()),
        devices=devices,
        dtypes=("float32", "bfloat16", "float16"),
        backward=False,
        chunk_sizes=None,
        judged=judged,
    )


def _one() -> Callable:
    return in_one_call


def _parts() -> Callable:
    return in_parts


CALL, PARTS = "a layer's step in one call", "a layer's step in parts, around fused_recurrent_kda"
ROWS = (
    row("layer_torch", CALL, _one, ("cpu",), "impls.decode_steps:by_torch"),
    row("layer_triton", CALL + ": two launches", _one, ("cuda",), "impls.decode_steps:by_triton"),
    row("parts_torch", PARTS, _parts, ("cpu",), "recurrent_torch"),
    row("parts_triton", PARTS, _parts, ("cuda",), "recurrent_triton"),
)
"""As rows beside `impls.table`: no public op chooses them."""
