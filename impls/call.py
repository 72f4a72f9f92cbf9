"""Resolve the keywords that users pass into one call of a registered op."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from impls import checks
from impls.activations import L2Norm, compute_dtype, log_decay, write_strength

SHORTEST_INTERVAL = 64
"""Tokens between intermediate states where no interval is asked for and no chunk is longer."""


@dataclass(frozen=True, eq=False)
class Call:
    """Hold the keywords of one call, checked and resolved; the meaning of each is that of `impls.chunk_kda`."""

    scale: float
    initial_state: torch.Tensor | None
    output_final_state: bool
    l2norm: bool
    gate: Literal["none", "softplus", "bounded"]
    lower_bound: float | None
    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    sigmoid: Literal["none", "once", "twice"]
    state_v_first: bool
    cu_seqlens: torch.Tensor | None
    cu_seqlens_cpu: torch.Tensor | None
    keeps: bool
    """Whether the intermediate states are wanted."""
    interval: int
    """Tokens between the states that are kept, 0 where none are."""


def checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
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
    disable_recompute: bool = False,
) -> Call:
    """Check the keywords and resolve their defaults; the errors are those of `impls.chunk_kda`.

    q to beta are checked already: which implementation fits depends on them. `safe_gate` changes nothing: our forms
    only ever multiply by decays, so any gate is safe. Nor does `disable_recompute`: what can do otherwise takes it out.
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
        disable_recompute=disable_recompute,
    )
    checks.check_packing(q, cu_seqlens, cu_seqlens_cpu)
    checks.check_state(initial_state, q, v, cu_seqlens, state_v_first)
    checks.check_gate(g, use_gate_in_kernel, A_log, dt_bias, lower_bound)
    checks.check_scale(scale)
    tensors = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    checks.check_tangents(tensors)
    state_interval = max(SHORTEST_INTERVAL, chunk_size) if state_interval is None else state_interval
    checks.check_intermediate(return_intermediate_states, state_interval, chunk_size, tensors)
    gate = "none" if not use_gate_in_kernel else "softplus" if lower_bound is None else "bounded"
    return Call(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        initial_state=initial_state,
        output_final_state=bool(output_final_state),
        l2norm=bool(use_qk_l2norm_in_kernel),
        gate=gate,
        lower_bound=lower_bound,
        A_log=A_log if use_gate_in_kernel else None,
        dt_bias=dt_bias if use_gate_in_kernel else None,
        sigmoid="none" if not use_beta_sigmoid_in_kernel else "twice" if allow_neg_eigval else "once",
        state_v_first=bool(state_v_first),
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        keeps=bool(return_intermediate_states),
        interval=state_interval if return_intermediate_states else 0,
    )


def call_activated(
    op: Callable, q, k, v, g, beta, *, launch: Sequence[int], chunk_size: int, **keywords
) -> tuple[torch.Tensor, ...]:
    """Check the keywords, activate, call an op of `registration.register`; `launch`, `chunk_size` are the op's own.

    Returns (o, final state or None), and the kept states where asked for.
    """
    call = checked(q, k, v, g, beta, chunk_size=chunk_size, **keywords)
    dtype, initial_state = compute_dtype(q), call.initial_state
    if call.l2norm:
        q, k = (L2Norm.apply(x.to(dtype).contiguous())[0] for x in (q, k))
    if call.gate != "none":
        g = log_decay(g, call.A_log, call.dt_bias, call.lower_bound, dtype)
    if call.sigmoid != "none":
        beta = write_strength(beta, call.sigmoid == "twice", dtype)
    if initial_state is not None and call.state_v_first:
        initial_state = initial_state.transpose(-1, -2)
    packing = call.cu_seqlens if call.cu_seqlens_cpu is None else call.cu_seqlens_cpu
    o, S, h = op(
        q, k, v, g, beta, initial_state, packing, call.scale, call.output_final_state, call.interval, launch
    )
    if call.state_v_first:
        S, h = _value_first(S), _value_first(h)
    return _returned(call, o, S, h)


def call_raw(
    op: Callable, q, k, v, g, beta, *, launch: Sequence[int], chunk_size: int, **keywords
) -> tuple[torch.Tensor, ...]:
    """Check the keywords and call an op of `registration.register_raw`, which activates inside; as `call_activated`."""
    call = checked(q, k, v, g, beta, chunk_size=chunk_size, **keywords)
    o, S, h = op(
        q, k, v, g, beta, call.A_log, call.dt_bias, call.initial_state, call.cu_seqlens, call.cu_seqlens_cpu,
        call.scale, call.lower_bound, call.l2norm, call.gate, call.sigmoid, call.state_v_first,
        call.output_final_state, call.interval, launch,
    )  # fmt: skip
    return _returned(call, o, S, h.to(v.dtype))


def _value_first(S: torch.Tensor) -> torch.Tensor:
    """Do what `pages.transposed` does for states that have gradients or are traced, as memory of ours may not be."""
    return S.mT.contiguous() if S.ndim > 1 else S


def _returned(call: Call, o: torch.Tensor, S: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    final_state = S if call.output_final_state else None
    return (o, final_state, h) if call.keeps else (o, final_state)
