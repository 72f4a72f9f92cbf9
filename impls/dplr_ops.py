"""Run general DPLR, whose free a and b KDA binds to k: a yardstick, and an oracle for the whole family.

    S_t = (Diag(exp g_t) - a_t b_t^T) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t         (section 6.2 of the report)

KDA is a = beta k, b = k exp g, v = beta v; DeltaNet, GDN, RWKV7 and Comba are in `kda_spec.family`.
"""

from collections.abc import Callable

import torch

from impls.checks import wants_gradient
from impls.dplr_checks import Dplr, checked

CHUNK_SIZES = (16, 32, 64)


def _torch() -> Callable[[Dplr, int], tuple[torch.Tensor, torch.Tensor]]:
    from impls.dplr_torch import dplr_torch

    return dplr_torch


def _triton() -> Callable[[Dplr, int], tuple[torch.Tensor, torch.Tensor]]:
    from impls.dplr_triton import dplr_triton

    return dplr_triton


FORMS = {"dplr_torch": _torch, "dplr_triton": _triton}
"""Name -> what imports it; dplr_triton has no backward."""


def dplr(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 16,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o [B, T, H, V] in q's dtype, final state [N, H, K, V] in float32, float64 for float64 inputs, or None).

    Args:
        q, k, a, b: [B, T, H, K]; v: [B, T, H, V]; all of one dtype. g: [B, T, H, K], natural log decay, -inf to 0.
        scale: K ** -0.5 where None. initial_state: [N, H, K, V], or [N, H, V, K] with state_v_first, as the final one.
        cu_seqlens: [N + 1], from 0 to T, B = 1 and N sequences packed along T. On a GPU its values are not read by
            dplr_triton: o behind the last sequence is undefined there.
        chunk_size: 16, 32 or 64.
        implementation: dplr_torch or dplr_triton; None for what fits: Triton on a GPU where nothing is differentiated.

    Raises TypeError and ValueError with what was expected and what came, KeyError for an unknown implementation.
    """
    call = checked(q, k, v, a, b, g, scale, initial_state, cu_seqlens, state_v_first)
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size must be one of {', '.join(map(str, CHUNK_SIZES))}, got {chunk_size}")
    differentiable = wants_gradient((q, k, v, a, b, g, initial_state))
    name = implementation or ("dplr_torch" if q.device.type == "cpu" or differentiable else "dplr_triton")
    if name not in FORMS:
        raise KeyError(f"unknown implementation {name!r}; known: {', '.join(FORMS)}")
    if name == "dplr_triton" and differentiable:
        raise ValueError("dplr_triton has no backward: expected inputs without gradients, or dplr_torch")
    o, S = FORMS[name]()(call, chunk_size)
    return o, (S.mT.contiguous() if state_v_first else S) if output_final_state else None
