"""Run general DPLR, whose free a and b KDA binds to k: a yardstick, and an oracle for the whole family.

    S_t = (Diag(exp g_t) - a_t b_t^T) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t         (section 6.2 of the report)

KDA is a = beta k, b = k exp g, v = beta v; DeltaNet, GDN, RWKV7 and Comba are in `kda_spec.family`.
"""

from collections.abc import Callable

import torch

from impls.checks import DTYPE_NAMES, wants_gradient
from impls.configs import TRITON_CHUNK_SIZES, DplrTorchConfig, DplrTritonConfig, invalid
from impls.dplr_checks import Dplr, checked
from impls.tuned import Shape, looked_up

Config = DplrTorchConfig | DplrTritonConfig
Form = Callable[[Dplr, int | None, Config | None], tuple[torch.Tensor, torch.Tensor]]


def _torch() -> Form:
    from impls.dplr_torch import dplr_torch

    return dplr_torch


def _triton() -> Form:
    from impls.dplr_triton import dplr_triton

    return dplr_triton


FORMS = {"dplr_torch": _torch, "dplr_triton": _triton}
"""Name -> what imports it; dplr_triton has no backward."""
CONFIGS = {"dplr_torch": DplrTorchConfig, "dplr_triton": DplrTritonConfig}


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
    chunk_size: int | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o [B, T, H, V] in q's dtype, final state [N, H, K, V] in float32, float64 for float64 inputs, or None).

    Args:
        q, k, a, b: [B, T, H, K]; v: [B, T, H, V]; all of one dtype. g: [B, T, H, K], natural log decay, -inf to 0.
        scale: K ** -0.5 where None. initial_state: [N, H, K, V], or [N, H, V, K] with state_v_first, as the final one.
        cu_seqlens: [N + 1], from 0 to T, B = 1 and N sequences packed along T. On a GPU its values are not read by
            dplr_triton: o behind the last sequence is undefined there.
        chunk_size: 16, 32 or 64; None for that of the configuration.
        implementation: dplr_torch or dplr_triton; None for what fits: Triton on a GPU where nothing is differentiated.
        config: a DplrTorchConfig or a DplrTritonConfig; None for what is tuned for the call, else the default.

    Raises TypeError and ValueError with what was expected and what came, KeyError for an unknown implementation.
    """
    call = checked(q, k, v, a, b, g, scale, initial_state, cu_seqlens, state_v_first)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size not in TRITON_CHUNK_SIZES):
        raise ValueError(f"chunk_size must be one of {', '.join(map(str, TRITON_CHUNK_SIZES))}, got {chunk_size!r}")
    differentiable = wants_gradient((q, k, v, a, b, g, initial_state))
    name = implementation or ("dplr_torch" if q.device.type == "cpu" or differentiable else "dplr_triton")
    if name not in FORMS:
        raise KeyError(f"unknown implementation {name!r}; known: {', '.join(FORMS)}")
    if name == "dplr_triton" and differentiable:
        raise ValueError("dplr_triton has no backward: expected inputs without gradients, or dplr_torch")
    _check_config(name, config, chunk_size)
    o, S = FORMS[name]()(call, chunk_size, config or _tuned(name, call, chunk_size))
    return o, (S.mT.contiguous() if state_v_first else S) if output_final_state else None


def _check_config(name: str, config: Config | None, chunk_size: int | None) -> None:
    if config is None:
        return
    if not isinstance(config, CONFIGS[name]):
        raise TypeError(f"config must be a {CONFIGS[name].__name__} for {name}, got {config!r}")
    if chunk_size not in (None, config.chunk_size):
        raise ValueError(f"chunk_size must be config.chunk_size = {config.chunk_size}, got {chunk_size}")
    if reason := invalid(config):
        raise ValueError(reason)


def _tuned(name: str, call: Dplr, chunk_size: int | None) -> Config | None:
    """Return what is tuned for the shape of a call, where its C is no other than the one asked for."""
    q, v, packing = call.tokens[0], call.tokens[2], call.cu_seqlens
    N = q.shape[0] if packing is None else packing.shape[0] - 1
    shape = Shape(q.shape[1], N, q.shape[2], q.shape[3], v.shape[3], DTYPE_NAMES[q.dtype], packing is not None)
    found = looked_up(name, str(q.device), shape)
    return found.config if found and chunk_size in (None, found.config.chunk_size) else None
