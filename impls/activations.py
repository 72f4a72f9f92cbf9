"""Turn raw projections into what the recurrence takes: plain differentiable torch, in float32 or float64."""

import torch
import torch.nn.functional as F

L2NORM_EPSILON = 1e-6


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that the mathematics runs in for inputs like x: float64 for float64, float32 for the rest."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x / sqrt(sum x^2 + 1e-6) over the last axis, in `dtype`; x [..., K]. Zero rows stay zero, gradients finite.

    The sum runs over a contiguous copy: torch adds in another order over other strides, and bits would depend on layout.
    """
    x = x.to(dtype).contiguous()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPSILON)


def log_decay(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return the log decay of raw gates g [B, T, HV, K], in `dtype`; A_log has HV values, dt_bias HV * K.

    -exp(A_log) softplus(g + dt_bias), or with a lower bound lower_bound * sigmoid(exp(A_log) (g + dt_bias)), where a
    missing A_log counts as 0.
    """
    HV, K = g.shape[-2:]
    g = g.to(dtype).contiguous()
    if dt_bias is not None:
        g = g + dt_bias.to(dtype).reshape(HV, K)
    rate = None if A_log is None else torch.exp(A_log.to(dtype)).reshape(HV, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    return rate * F.logsigmoid(-g)  # -softplus(g), without the threshold of torch's softplus (2e-9 off in float64)


def write_strength(beta: torch.Tensor, allow_neg_eigval: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return sigmoid(beta), or 2 sigmoid(beta) where negative eigenvalues are allowed, in `dtype`; beta [B, T, HV]."""
    strength = torch.sigmoid(beta.to(dtype).contiguous())
    return 2 * strength if allow_neg_eigval else strength
