"""Turn raw projections into what the recurrence takes: plain differentiable torch, in float32 or float64."""

import torch
import torch.nn.functional as F

L2NORM_EPSILON = 1e-6


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that the mathematics runs in for inputs like x: float64 for float64, float32 for the rest."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x / sqrt(sum x^2 + 1e-6) over the last axis of x [..., K], in `dtype`; zero rows stay zero.

    The sum runs over a contiguous copy: over other strides torch adds in another order, and layout would change bits.
    """
    x = x.to(dtype).contiguous()
    return x / _length(x)


def l2norm_(x: torch.Tensor) -> None:
    """Do the same in place to rows x [..., K] with stride 1 in `dtype` already; the bits are those of `l2norm`."""
    x.div_(_length(x))


class L2Norm(torch.autograd.Function):
    """Differentiate `l2norm` of contiguous rows: dx = (dy - y <y, dy>) / |x|, half of the time of torch's formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of norm 1 and the norms of x."""
        length = _length(x)
        return x / length, length

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep both for the way back."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, dy: torch.Tensor, _) -> torch.Tensor:
        """Return dx. Like the gradients of the ops behind it, it is not differentiated again."""
        y, length = ctx.saved_tensors
        return torch.addcmul(dy, y, (y * dy).sum(-1, keepdim=True), value=-1) / length


def _length(x: torch.Tensor) -> torch.Tensor:
    return (x * x).contiguous().sum(-1, keepdim=True).add_(L2NORM_EPSILON).sqrt_()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-x)), with the same bits wherever an element lies.

    torch.sigmoid and softplus compute the last elements of a tensor by another routine than the rest (546 of 1,600
    slices differ on AVX-512), so that permuting heads would change bits; exp and logsigmoid do not.
    """
    positive = x >= 0
    small = torch.exp(torch.where(positive, -x, x))
    return torch.where(positive, 1.0, small) / (1 + small)


def log_decay(
    g: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    dtype: torch.dtype,
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
        return lower_bound * sigmoid(g if rate is None else rate * g)
    return rate * F.logsigmoid(-g)  # -softplus(g), without the threshold of torch's softplus (2e-9 off in float64)


def write_strength(beta: torch.Tensor, allow_neg_eigval: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return sigmoid(beta), or 2 sigmoid(beta) where negative eigenvalues are allowed, in `dtype`; beta [B, T, HV]."""
    strength = sigmoid(beta.to(dtype).contiguous())
    return 2 * strength if allow_neg_eigval else strength
