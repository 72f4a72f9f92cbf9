"""Resolve the keywords that users pass into one call of a registered op."""

from collections.abc import Callable, Sequence

import torch

from impls import checks
from impls.activations import compute_dtype, l2norm, log_decay, write_strength

SHORTEST_INTERVAL = 64
"""Tokens between intermediate states where no interval is asked for and no chunk is longer."""


def call_op(
    op: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    launch: Sequence[int],
    chunk_size: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    return_intermediate_states: bool = False,
    state_interval: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Check the keywords, activate, call the op: (o, final state or None), and the kept states where asked for.

    q to beta are checked already: which implementation fits depends on them. `safe_gate` changes nothing: our forms
    only ever multiply by decays, so any gate is safe. The meaning of the other keywords is that of `impls.chunk_kda`;
    `launch` and `chunk_size` are the implementation's own.
    """
    checks.check_flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        state_v_first=state_v_first,
        return_intermediate_states=return_intermediate_states,
    )
    checks.check_packing(q, cu_seqlens, cu_seqlens_cpu)
    checks.check_state(initial_state, q, v, cu_seqlens, state_v_first)
    checks.check_gate(g, use_gate_in_kernel, A_log, dt_bias, lower_bound)
    checks.check_scale(scale)
    tensors = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    checks.check_tangents(tensors)
    state_interval = max(SHORTEST_INTERVAL, chunk_size) if state_interval is None else state_interval
    checks.check_intermediate(return_intermediate_states, state_interval, chunk_size, tensors)
    dtype = compute_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, dtype), l2norm(k, dtype)
    if use_gate_in_kernel:
        g = log_decay(g, A_log, dt_bias, lower_bound, dtype)
    if use_beta_sigmoid_in_kernel:
        beta = write_strength(beta, allow_neg_eigval, dtype)
    if initial_state is not None and state_v_first:
        initial_state = initial_state.transpose(-1, -2)
    packing = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    kept = state_interval if return_intermediate_states else 0
    o, S, h = op(q, k, v, g, beta, initial_state, packing, scale, bool(output_final_state), kept, launch)
    if state_v_first:
        S, h = (x.transpose(-1, -2).contiguous() if x.ndim > 1 else x for x in (S, h))
    final_state = S if output_final_state else None
    return (o, final_state, h) if return_intermediate_states else (o, final_state)
