"""FlashKDA (package flash_kda: CUTLASS, Hopper and newer, inference only) as a row."""

from collections.abc import Callable
from functools import partial

import torch

from impls.contracts import PrecisionContract
from impls.table import Impl

HEAD_DIM = 128
FUSED = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
"""Done in its kernels always, so they must be asked for."""
ABSENT = ("allow_neg_eigval", "return_intermediate_states")
"""Asked of it they would be ignored, so they are refused."""


def contract(dtype_name: str) -> PrecisionContract:
    """Return what it rounds: bfloat16 operands and state, the chunk's inverse in float16."""
    return PrecisionContract(dtype_name, "float32", dtype_name, "float16", dtype_name, output=dtype_name)


def load() -> Callable:
    """Import flash_kda and return its forward as a row's function; ImportError where it is not installed."""
    import flash_kda

    return partial(_call, flash_kda.fwd)


def refusal(q, v, *, lower_bound=None, state_v_first=False, A_log=None, dt_bias=None, **keywords) -> str | None:
    """Return None for what FlashKDA covers, otherwise what it lacks; arguments as in `impls.chunk_kda`."""
    if lower_bound is None or not -5 <= lower_bound < 0:
        return f"it has the bounded gate only: lower_bound must lie in [-5, 0), got {lower_bound}"
    if (q.shape[3], v.shape[3]) != (HEAD_DIM, HEAD_DIM):
        return f"K and V must be {HEAD_DIM}, got K = {q.shape[3]}, V = {v.shape[3]}"
    if v.shape[2] != q.shape[2]:
        return f"HV must be H = {q.shape[2]}, got {v.shape[2]}"
    if missing := [name for name in FUSED if not keywords.get(name)]:
        return f"{', '.join(missing)} must be True"
    if A_log is None or dt_bias is None:
        return "A_log and dt_bias must be given"
    if not state_v_first:
        return "its states are [N, HV, V, K]: state_v_first must be True"
    if asked := [name for name in ABSENT if keywords.get(name)]:
        return f"{', '.join(asked)} must be False"
    return None


def _call(
    fwd,
    q,
    k,
    v,
    g,
    beta,
    *,
    config=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    **keywords,
):
    """Map `impls.chunk_kda`'s keywords to flash_kda.fwd, which writes into tensors that it is given."""
    if config is not None:
        raise ValueError(f"config must be None: FlashKDA has no configuration, got {config!r}")
    known = (*FUSED, *ABSENT, "lower_bound", "state_v_first", "A_log", "dt_bias")
    if unknown := keywords.keys() - set(known):
        raise TypeError(f"FlashKDA takes no {', '.join(sorted(unknown))}")
    if reason := refusal(q, v, **keywords):
        raise ValueError(f"FlashKDA: {reason}")
    H = q.shape[2]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(v)
    state = None
    if output_final_state:
        state = torch.empty(N, H, HEAD_DIM, HEAD_DIM, dtype=torch.float32, device=q.device)
    fwd(
        q,
        k,
        v,
        g,
        beta,
        HEAD_DIM**-0.5 if scale is None else scale,
        o,
        A_log=keywords["A_log"],
        dt_bias=keywords["dt_bias"].view(H, HEAD_DIM),
        lower_bound=keywords["lower_bound"],
        initial_state=initial_state,
        final_state=state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
    )
    return o, state


FLASH_KDA = Impl(
    name="flash_kda",
    summary="FlashKDA's forward: bfloat16, K = V = 128, lower_bound in [-5, 0), sm_90 and newer",
    form="chunk",
    load=load,
    contract=contract,
    devices=("cuda",),
    dtypes=("bfloat16",),
    backward=False,
    chunk_sizes=None,
)
