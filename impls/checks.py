"""Check the arguments of the public ops, once, at the edge; inside, the implementations only assert."""

import math

import torch
from torch.autograd.forward_ad import unpack_dual

MAX_HEAD_DIM = 256
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, x) -> None:
    """Refuse what is no dense tensor: TypeError."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def _number(name: str, x) -> None:
    if not isinstance(x, int | float):
        raise TypeError(f"{name} must be a Python number, got {type(x).__name__}")


def check_flag(name: str, x) -> None:
    """Refuse what is neither True nor False nor None (which callers pass for False): TypeError."""
    if x is not None and not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def check_shape(name: str, x: torch.Tensor, letters: str, expected: tuple[int, ...]) -> None:
    """Refuse another shape than the expected one, whose sizes are named by letters: ValueError."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape [{letters}] = {list(expected)}, got {list(x.shape)}")


def check_dtype(name: str, x: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a dtype that is not allowed: TypeError."""
    if x.dtype not in allowed:
        raise TypeError(f"{name} must be one of {_names(allowed)}, got {_names([x.dtype])}")


def check_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor on another device than q's: ValueError."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {x.device}")


def check_inputs(q, k, v, g, beta) -> None:
    """Check q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV]: ranks, sizes, dtypes, devices.

    Raises TypeError for what is no tensor of a supported dtype, ValueError for the rest. Values are never looked at.
    """
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, x in named.items():
        check_tensor(name, x)
        rank = 3 if name == "beta" else 4
        if x.ndim != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got {x.ndim}: {list(x.shape)}")
        check_dtype(name, x, (q.dtype,) if name in ("k", "v") else DTYPES)
        check_device(name, x, q.device)
    _check_sizes(q, k, v, g, beta)


def _check_sizes(q, k, v, g, beta) -> None:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    for letter, size, tensor in (("K", K, "q"), ("V", V, "v")):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{letter}, the last size of {tensor}, must be from 1 to {MAX_HEAD_DIM}, got {size}")
    if H < 1 or HV < 1 or HV % H:
        raise ValueError(f"HV, the heads of v, must be a positive multiple of H = {H}, the heads of q, got {HV}")
    check_shape("k", k, "B, T, H, K", (B, T, H, K))
    check_shape("v", v, "B, T, HV, V", (B, T, HV, V))
    check_shape("g", g, "B, T, HV, K", (B, T, HV, K))
    check_shape("beta", beta, "B, T, HV", (B, T, HV))


def check_packing(q, cu_seqlens, cu_seqlens_cpu) -> None:
    """Check type, rank and batch size of cu_seqlens [N + 1]; its values are read, and checked, by `bounds_of`."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu is the copy of cu_seqlens: expected both, got cu_seqlens=None")
        return
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an int64 or int32 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 1 or x.shape[0] < 1:
            raise ValueError(f"{name} must have shape [N + 1], got {list(x.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"q must have batch size B = 1 with cu_seqlens, got B = {q.shape[0]}")
    if cu_seqlens.shape[0] == 1 and q.shape[1] > 0:
        raise ValueError(f"cu_seqlens must run from 0 to T = {q.shape[1]}, got one element, for no sequence")
    check_device("cu_seqlens", cu_seqlens, q.device)
    if cu_seqlens_cpu is not None:
        _check_copy(cu_seqlens, cu_seqlens_cpu)


def _check_copy(cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor) -> None:
    """Check that cu_seqlens_cpu is a copy; its values only where both can be read without waiting for a device."""
    check_shape("cu_seqlens_cpu", cu_seqlens_cpu, "N + 1", tuple(cu_seqlens.shape))
    if cu_seqlens_cpu.device.type != "cpu":
        raise ValueError(f"cu_seqlens_cpu must be on cpu, got {cu_seqlens_cpu.device}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    expected, actual = cu_seqlens.tolist(), cu_seqlens_cpu.tolist()
    if expected != actual:
        raise ValueError(f"cu_seqlens_cpu must equal cu_seqlens = {expected}, got {actual}")


def bounds_of(cu_seqlens: torch.Tensor | None, T: int) -> list[int] | None:
    """Read cu_seqlens [N + 1] on the host: N + 1 positions from 0 to T that never fall, ValueError otherwise."""
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must run from 0 to T = {T}, got {bounds[0]} to {bounds[-1]}")
    for n, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if last < first:
            raise ValueError(f"cu_seqlens must never fall, got {first} then {last} at positions {n} and {n + 1}")
    return bounds


def check_state(initial_state, q, v, cu_seqlens, state_v_first: bool) -> None:
    """Check the initial state: [N, HV, K, V], or [N, HV, V, K] with state_v_first, on q's device, of a legal dtype."""
    if initial_state is None:
        return
    check_tensor("initial_state", initial_state)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, K, V = v.shape[2], q.shape[3], v.shape[3]
    if state_v_first:
        check_shape("initial_state", initial_state, "N, HV, V, K", (N, HV, V, K))
    else:
        check_shape("initial_state", initial_state, "N, HV, K, V", (N, HV, K, V))
    check_dtype("initial_state", initial_state, DTYPES if q.dtype == torch.float64 else DTYPES[1:])
    check_device("initial_state", initial_state, q.device)


def check_gate(g, use_gate_in_kernel: bool, A_log, dt_bias, lower_bound) -> None:
    """Check the parameters of the in-kernel gate: A_log of HV values, dt_bias of HV * K, a negative lower bound."""
    if lower_bound is not None:
        _number("lower_bound", lower_bound)
        if not -math.inf < lower_bound < 0:
            raise ValueError(f"lower_bound must be negative and finite, got {lower_bound}")
    if not use_gate_in_kernel:
        return
    if A_log is None and lower_bound is None:
        raise ValueError("A_log must be given with use_gate_in_kernel=True unless lower_bound is, got None for both")
    HV, K = g.shape[2:]
    for name, x, letters, size in (("A_log", A_log, "HV", HV), ("dt_bias", dt_bias, "HV * K", HV * K)):
        if x is None:
            continue
        check_tensor(name, x)
        check_dtype(name, x, DTYPES)
        check_device(name, x, g.device)
        if x.numel() != size:
            raise ValueError(f"{name} must have {letters} = {size} elements, got {x.numel()}: {list(x.shape)}")


def check_scale(scale) -> None:
    """Refuse a scale that is no number: as a tensor it would lose its gradient without a word."""
    if scale is not None:
        _number("scale", scale)


def check_tangents(tensors) -> None:
    """Refuse forward-mode differentiation, which torch would answer with zeros: the ops have a backward only."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("kda_forge ops have no forward-mode derivative, got inputs with tangents")


def check_flags(**flags) -> None:
    """Check flags by name; refuse allow_neg_eigval without the sigmoid that it would scale: ValueError."""
    for name, x in flags.items():
        check_flag(name, x)
    if flags["allow_neg_eigval"] and not flags["use_beta_sigmoid_in_kernel"]:
        raise ValueError(
            "allow_neg_eigval=True requires use_beta_sigmoid_in_kernel=True, got use_beta_sigmoid_in_kernel=False"
        )


def wants_gradient(tensors) -> bool:
    """Tell whether autograd would differentiate by one of these; what is no tensor is left to the other checks."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def check_intermediate(return_intermediate_states: bool, state_interval: int, chunk_size: int, tensors) -> None:
    """Check that intermediate states can be had: the interval a multiple of the chunk, nothing to differentiate."""
    if not isinstance(state_interval, int) or state_interval < 1:
        raise ValueError(f"state_interval must be a positive number of tokens, got {state_interval!r}")
    if not return_intermediate_states:
        return
    if state_interval % chunk_size:
        raise ValueError(f"state_interval must be a multiple of the chunk size {chunk_size}, got {state_interval}")
    if wants_gradient(tensors):
        raise ValueError(
            "return_intermediate_states=True needs torch.no_grad() or inference mode, got inputs that require grad"
        )
