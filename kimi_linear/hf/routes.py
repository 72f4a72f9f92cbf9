"""The functions that transformers' KDA layers are routed to, and the names by which the layers are found."""

import importlib
from types import ModuleType

import torch

from impls import fused_recurrent_kda, kda
from impls.activations import compute_dtype, l2norm_
from impls.choice import recurrent_torch_config, recurrent_torch_launch
from impls.pages import room
from impls.recurrent_torch import GROUP_ELEMENTS, step

FAMILIES = {
    "kimi_linear": "KimiLinearDeltaAttention",
    "glm5_next": "Glm5NextTextLinearAttention",
    "bailing_hybrid": "BailingHybridDeltaAttention",
}
"""Names of the modules, and of the layers whose calls are routed."""
UNEVEN = ("kimi_linear", "bailing_hybrid")
"""The families whose MLA has values narrower than keys."""
MLA = "KimiLinearAttention"
"""Name of the layer of kimi_linear whose steps can be absorbed."""


def modeling(family: str) -> ModuleType:
    """Import the module of a family's layers."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def chunk_kimi_delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the place of transformers' function of this name: `impls.kda`, which takes few tokens one by one.

    query, key, g [B, T, H, K], value [B, T, H, V], beta [B, T, H], initial_state [B, H, K, V]; g and beta activated.
    Packed sequences are told apart by cu_seqlens [N + 1]; seq_idx alone is a ValueError. others: what a layer passes
    on to whoever may want it; the library's functions drop it as well. Returns (o [B, T, H, V], state or None).
    """
    if seq_idx is not None and cu_seqlens is None:
        raise ValueError("packed sequences must be told apart by cu_seqlens, got seq_idx alone")
    if torch.compiler.is_compiling():
        # a part of the convolution's output, T apart: Inductor cannot save one for the backward where T is a symbol
        value = value.contiguous()
    return kda(
        query, key, value, g, beta, chunk_size=chunk_size, initial_state=initial_state, cu_seqlens=cu_seqlens,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def recurrent_kimi_delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    **others,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the place of transformers' function of this name: `impls.fused_recurrent_kda`; as for chunks."""
    if query.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _step(query, key, value, g, beta, initial_state, bool(output_final_state), bool(use_qk_l2norm_in_kernel))
    return fused_recurrent_kda(
        query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def _step(q, k, v, g, beta, initial_state, output_final_state: bool, normed: bool):
    """Do what `impls.fused_recurrent_kda` comes to on a CPU without gradients; small states on the shortest way."""
    small = _small(v, g, initial_state)
    if small and not recurrent_torch_config(recurrent_torch_launch(None, None, "cpu"), q, v, None).compile:
        o, S = _small_step(q, k, v, g, beta, initial_state, normed)
        return o, S if output_final_state else None
    return fused_recurrent_kda(
        q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=normed,
    )  # fmt: skip


def _small(v: torch.Tensor, g: torch.Tensor, initial_state: torch.Tensor | None) -> bool:
    """Tell whether a call is a step from states that the op would take in one go."""
    known = initial_state is not None and initial_state.numel() <= GROUP_ELEMENTS
    return known and v.shape[1] == 1 and g.shape[:3] == v.shape[:3]


def _small_step(q, k, v, g, beta, initial_state, normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the step without the op around it, with its bits.

    With 4 heads of 128 x 128 it takes 72 us instead of 111, transformers' own 91; with 16 heads 136, 182 and 193.
    """
    dtype, (B, HV, K, V) = compute_dtype(v), initial_state.shape
    qk = torch.stack((q, k)).to(dtype)
    if normed:
        l2norm_(qk)
    rows = [x.reshape(B * HV, 1, -1) for x in (*qk, *(x.to(dtype) for x in (v, g, beta)))]
    S, out = room((B, HV, K, V), dtype, v.device), torch.empty_like(rows[2])
    step(initial_state.flatten(0, 1), S.flatten(0, 1), *rows, out)
    return out.mul_(K**-0.5).view(v.shape).to(v.dtype), S


ROUTED = (chunk_kimi_delta_attention, recurrent_kimi_delta_attention)
"""What stands in the place of transformers' functions of these names."""
