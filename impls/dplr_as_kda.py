"""Run Kimi Delta Attention as the member of general DPLR that it is, so that `impls.dplr` is judged as any op.

    python -m verify impls.dplr_as_kda:by_torch
    python -m verify impls.dplr_as_kda:by_triton --device interpret        or cuda:0

a = beta k, b = k exp g, v = beta v (section 6.2 of the report), in float32 at least. Forward only: the gradient of g
would be the sum of what b and the decay received, which cancel in part: 3.5 times the float32 error of KDA's own, where
the judge allows 3.
"""

from functools import partial

import torch

from impls.activations import compute_dtype, l2norm, log_decay, write_strength
from impls.checks import wants_gradient
from impls.dplr_ops import dplr


def as_kda(
    implementation: str, q, k, v, g, beta, *, A_log=None, dt_bias=None, lower_bound=None,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    **keywords,
):  # fmt: skip
    """Return (o [B, T, HV, V], final state or None); arguments as `impls.chunk_kda`, for whom nothing is kept."""
    if wants_gradient((q, k, v, g, beta, A_log, dt_bias, keywords.get("initial_state"))):
        raise ValueError("impls.dplr_as_kda is not differentiable: expected inputs that need no gradient")
    dtype, ratio = compute_dtype(q), v.shape[2] // q.shape[2]
    q, k = (x.to(dtype).repeat_interleave(ratio, 2) for x in (q, k))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, dtype), l2norm(k, dtype)
    g = log_decay(g, A_log, dt_bias, lower_bound, dtype) if use_gate_in_kernel else g.to(dtype)
    beta = write_strength(beta, allow_neg_eigval, dtype) if use_beta_sigmoid_in_kernel else beta.to(dtype)
    strength = beta[..., None]
    rows = q, k, strength * v, strength * k, k * torch.exp(g), g
    o, S = dplr(*rows, implementation=implementation, **keywords)
    return o.to(v.dtype), S


by_triton, by_torch = partial(as_kda, "dplr_triton"), partial(as_kda, "dplr_torch")
