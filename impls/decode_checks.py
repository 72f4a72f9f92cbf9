"""Check the arguments of a decode step: `impls.decode`."""

import math

import torch

from impls.checks import DTYPES, check_device, check_dtype, check_shape, check_tensor, wants_gradient

KEYWORDS = (
    "scale", "A_log", "dt_bias", "lower_bound", "use_qk_l2norm_in_kernel", "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first",
)  # fmt: skip
POOLS = (torch.float32, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
LONGEST = 8
"""Tokens of a sequence in one step, at most: with more a chunk is the better form."""
WIDTHS = (2, 3, 4)
ACTIVATIONS = ("sigmoid", "silu")


def known(keywords: dict) -> dict:
    """Return the keywords; TypeError for one that a step does not have."""
    for name in keywords:
        if name not in KEYWORDS:
            raise TypeError(f"decode_kda() got an unexpected keyword argument {name!r}")
    return keywords


def _contiguous(name: str, x: torch.Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")


def _apart(name: str, x: torch.Tensor, dense: int) -> None:
    """Refuse what is not dense in its last dimensions, or whose others lie in one another; gaps are their owner's."""
    reach = 1
    for i, (size, stride) in reversed(list(enumerate(zip(x.shape, x.stride(), strict=True)))):
        if size > 1 and x.numel() and (stride != reach if i >= x.ndim - dense else stride < reach):
            last = "last dimension" if dense == 1 else f"last {dense} dimensions"
            raise ValueError(f"{name} must be dense in its {last} and apart in others, got strides {list(x.stride())}")
        reach += (size - 1) * stride


def check_inference(tensors) -> None:
    """Refuse inputs that autograd would differentiate by: a step writes its states in place."""
    if wants_gradient(tensors):
        raise ValueError("decode_kda is not differentiable: expected torch.no_grad() or inputs that need no gradient")


def check_step(q, v, state, final_state, v_first: bool) -> None:
    """Check the number of tokens, and the pools [S, HV, K, V] or [S, HV, V, K]."""
    T, K, (HV, V) = q.shape[1], q.shape[3], v.shape[2:]
    if not 1 <= T <= LONGEST:
        raise ValueError(f"q must have from 1 to {LONGEST} tokens a sequence, got T = {T}")
    if q.dtype == torch.float64:
        raise TypeError("q must be float32, bfloat16 or float16, got float64")
    for name, pool in (("state", state), ("final_state", final_state)):
        if name == "final_state" and pool is None:
            continue
        check_tensor(name, pool)
        slots = pool.shape[:1]
        letters, shape = ("S, HV, V, K", (V, K)) if v_first else ("S, HV, K, V", (K, V))
        check_shape(name, pool, letters, (*slots, HV, *shape))
        check_dtype(name, pool, POOLS)
        check_device(name, pool, q.device)
        _apart(name, pool, 3)
    if final_state is not None and (final_state.shape, final_state.dtype) != (state.shape, state.dtype):
        raise ValueError(
            f"final_state must be like state, {list(state.shape)} in {state.dtype}, got {list(final_state.shape)} in "
            f"{final_state.dtype}"
        )


def check_slots(q, state, indices, accepted) -> None:
    """Check the slots [N] or [N, T], and how many tokens were accepted [N]; on a CPU their values as well."""
    (N, T), S = q.shape[:2], state.shape[0]
    if indices is None:
        if S < N:
            raise ValueError(f"state must have a slot for each of N = {N} sequences, got S = {S}")
    else:
        _index("ssm_state_indices", indices, q)
        if tuple(indices.shape) not in ((N,), (N, T)):
            raise ValueError(f"ssm_state_indices must have shape [{N}] or [{N}, {T}], got {list(indices.shape)}")
    if accepted is not None:
        _index("num_accepted_tokens", accepted, q)
        check_shape("num_accepted_tokens", accepted, "N", (N,))
        if indices is None or indices.ndim != 2:
            raise ValueError("num_accepted_tokens needs ssm_state_indices [N, T], a slot for each token")
    if _readable(q):
        _check_values(S, T, indices, accepted)


def _index(name: str, x, q) -> None:
    check_tensor(name, x)
    check_dtype(name, x, INDICES)
    check_device(name, x, q.device)
    _contiguous(name, x)


def _readable(q) -> bool:
    """Tell whether values can be looked at without waiting for a device."""
    return q.device.type == "cpu"


def _check_named(name: str, indices, slots: int) -> None:
    """Refuse slots that are not there and such as are named twice."""
    if indices is None or not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if not -1 <= low <= high < slots:
        raise ValueError(f"{name} must be from -1 to {slots - 1}, got {low} to {high}")
    used = indices[indices >= 0]
    if used.unique().numel() != used.numel():
        raise ValueError(f"{name} must name no slot twice")


def _check_values(S: int, T: int, indices, accepted) -> None:
    _check_named("ssm_state_indices", indices, S)
    if accepted is not None and accepted.numel() and not 1 <= int(accepted.min()) <= int(accepted.max()) <= T:
        raise ValueError(
            f"num_accepted_tokens must be from 1 to {T}, got {int(accepted.min())} to {int(accepted.max())}"
        )


def slots_of_starts(indices: torch.Tensor, accepted: torch.Tensor | None) -> torch.Tensor:
    """Return the slot [N] that each sequence goes on from; indices [N] or [N, T], accepted [N] counts of tokens."""
    if indices.ndim == 1:
        return indices
    at = torch.zeros_like(indices[:, 0]) if accepted is None else accepted - 1
    return indices.gather(1, at.long().clamp(0, indices.shape[1] - 1)[:, None])[:, 0]


def _check_positions(rings: int, indices, accepted, convolution) -> None:
    own, position = convolution.conv_state_indices, convolution.position
    _check_named("convolution.conv_state_indices", own, rings)
    if position is None:
        return
    starts = None if indices is None else slots_of_starts(indices, accepted)
    first = None if indices is None or own is not None else indices.reshape(len(indices), -1)[:, 0]
    named = [x >= 0 for x in (starts, first, own) if x is not None]
    used = position[torch.stack(named).all(0)] if named else position
    if used.numel() and int(used.min()) < 0:
        raise ValueError(f"convolution.position must be from 0 on, got {int(used.min())}")


def check_convolution(q, v, state, indices, accepted, convolution) -> None:
    """Check weights [D, W], rings [S, R, D] and positions [N] of the short convolutions; on a CPU values as well."""
    if convolution is None:
        return
    for name, x in vars(convolution).items():
        if x is not None or name not in ("position", "conv_state_indices"):
            check_tensor(f"convolution.{name}", x)
    N, T = q.shape[:2]
    W, R = (x.shape[1] if x.ndim > 1 else 0 for x in (convolution.q_weight, convolution.q_ring))
    if W not in WIDTHS:
        raise ValueError(f"convolution.q_weight must be [H * K, W] with W from 2 to 4, got W = {W}")
    if R < W - 1 + T:
        raise ValueError(f"convolution.q_ring must have at least W - 1 + T = {W - 1 + T} rows, got {R}")
    own, rings = convolution.conv_state_indices, convolution.q_ring.shape[0]
    for name in ("q", "k", "v"):
        D = v.shape[2] * v.shape[3] if name == "v" else q.shape[2] * q.shape[3]
        weight, ring = (getattr(convolution, f"{name}_{part}") for part in ("weight", "ring"))
        check_shape(f"convolution.{name}_weight", weight, "D, W", (D, W))
        check_shape(f"convolution.{name}_ring", ring, "S, R, D", (state.shape[0] if own is None else rings, R, D))
        check_dtype(f"convolution.{name}_weight", weight, DTYPES)
        check_dtype(f"convolution.{name}_ring", ring, (q.dtype, torch.float32))
        for part, x in ((f"{name}_weight", weight), (f"{name}_ring", ring)):
            check_device(f"convolution.{part}", x, q.device)
        _contiguous(f"convolution.{name}_weight", weight)
        _apart(f"convolution.{name}_ring", ring, 1)
    for name in ("position", "conv_state_indices"):
        if (x := getattr(convolution, name)) is not None:
            _index(f"convolution.{name}", x, q)
            check_shape(f"convolution.{name}", x, "N", (N,))
    if _readable(q):
        _check_positions(rings, indices, accepted, convolution)


def check_norm(q, v, norm) -> None:
    """Check the weight [V], the gate [N, T, HV, V] and the activation of the gated norm."""
    if norm is None:
        return
    for name, letters, shape in (("weight", "V", (v.shape[3],)), ("gate", "N, T, HV, V", tuple(v.shape))):
        x = getattr(norm, name)
        check_tensor(f"norm.{name}", x)
        check_shape(f"norm.{name}", x, letters, shape)
        check_dtype(f"norm.{name}", x, DTYPES)
        check_device(f"norm.{name}", x, q.device)
    if not isinstance(norm.epsilon, (int, float)) or not 0 <= norm.epsilon < math.inf:
        raise ValueError(f"norm.epsilon must be a number from 0 on, got {norm.epsilon!r}")
    if norm.activation not in ACTIVATIONS:
        raise ValueError(f"norm.activation must be one of {', '.join(ACTIVATIONS)}, got {norm.activation!r}")


def check_out(v, out) -> None:
    """Check where o is written: like v, contiguous."""
    if out is None:
        return
    check_tensor("out", out)
    check_shape("out", out, "N, T, HV, V", tuple(v.shape))
    check_dtype("out", out, (v.dtype,))
    check_device("out", out, v.device)
    _contiguous("out", out)
