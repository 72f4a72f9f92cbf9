"""Check the arguments of general DPLR: `impls.dplr`."""

from dataclasses import dataclass

import torch

from impls.checks import (
    DTYPES,
    MAX_HEAD_DIM,
    bounds_of,
    check_device,
    check_dtype,
    check_flag,
    check_packing,
    check_scale,
    check_shape,
    check_state,
    check_tangents,
    check_tensor,
)


@dataclass(frozen=True, eq=False)
class Dplr:
    """Hold a call of `impls.dplr`, checked and resolved."""

    tokens: tuple[torch.Tensor, ...]
    """q, k, v, a, b, g."""
    scale: float
    initial_state: torch.Tensor | None
    """[N, H, K, V]."""
    cu_seqlens: torch.Tensor | None
    bounds: list[int] | None
    """The values of cu_seqlens, on a CPU."""


def checked(q, k, v, a, b, g, scale, initial_state, cu_seqlens, state_v_first) -> Dplr:
    """Check shapes, dtypes and devices, once: TypeError and ValueError with what was expected and what came."""
    named = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    for name, x in named.items():
        check_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.ndim}: {list(x.shape)}")
        check_dtype(name, x, DTYPES if name == "g" else (q.dtype,) if name != "q" else DTYPES)
        check_device(name, x, q.device)
        if name != "v":
            check_shape(name, x, "B, T, H, K", tuple(q.shape))
    (B, T, H, K), V = q.shape, v.shape[3]
    check_shape("v", v, "B, T, H, V", (B, T, H, V))
    for letter, size in (("K", K), ("V", V)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{letter} must be from 1 to {MAX_HEAD_DIM}, got {size}")
    check_scale(scale)
    check_flag("state_v_first", state_v_first)
    check_packing(q, cu_seqlens, None)
    check_state(initial_state, q, v, cu_seqlens, state_v_first)
    check_tangents((*named.values(), initial_state))
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT
    bounds = bounds_of(cu_seqlens, T) if cu_seqlens is not None and q.device.type == "cpu" else None
    return Dplr((q, k, v, a, b, g), K**-0.5 if scale is None else float(scale), initial_state, cu_seqlens, bounds)
