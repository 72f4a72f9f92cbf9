"""Load and activate the rows of one chunk inside a Triton program, and keep what is found of it between launches."""

import triton
import triton.language as tl

from impls.activations_triton import exp2, gate_parameters, inverse_norm, log2_decay, write_strength
from impls.layout_triton import inside, tile
from impls.tree_triton import tree


@triton.jit
def activated(
    q, k, g, A_log, dt_bias, lower_bound, first, length, i_h,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Return q, k and alpha [C, BK] in float32 of `length` rows from row `first` on; behind them 0, 0 and 1."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    mask = inside(o_c, length, o_k, K, K == BK)
    of_q = (first * H + i_h // (HV // H)) * K + tile(o_c, o_k, H * K, CONTIGUITY)
    of_g = (first * HV + i_h) * K + tile(o_c, o_k, HV * K, CONTIGUITY)
    b_q = tl.load(q + of_q, mask=mask, other=0.0).to(tl.float32)
    b_k = tl.load(k + of_q, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(g + of_g, mask=mask, other=0.0).to(tl.float32)
    if L2NORM:
        b_q *= inverse_norm(b_q, APPROXIMATE)
        b_k *= inverse_norm(b_k, APPROXIMATE)
    rate, bias = gate_parameters(A_log, dt_bias, i_h, o_k, K, GATE)
    b_g = log2_decay(b_g, rate, bias[None, :], lower_bound, GATE, APPROXIMATE)
    if GATE != "none":
        b_g = tl.where(mask, b_g, 0.0)
    return b_q, b_k, exp2(b_g, APPROXIMATE, False)


@triton.jit
def strengths(beta, first, length, i_h, HV: tl.constexpr, C: tl.constexpr, SIGMOID: tl.constexpr):
    """Return beta [C] in float32 of `length` rows from row `first` on, and 0 behind them."""
    o_c = tl.arange(0, C)
    b_beta = tl.load(beta + (first + o_c) * HV + i_h, mask=o_c < length, other=0.0).to(tl.float32)
    return tl.where(o_c < length, write_strength(b_beta, SIGMOID), 0.0)


@triton.jit
def worked(
    q, k, g, beta, A_log, dt_bias, lower_bound, first, length, i_h,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, OPERAND: tl.constexpr,
    APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Return A, L [C, C], beta [C], q before, k before, k after [C, BK], total [1, BK] of rows `first` onwards."""
    b_q, b_k, alpha = activated(
        q, k, g, A_log, dt_bias, lower_bound, first, length, i_h,
        H, HV, K, BK, C, L2NORM, GATE, APPROXIMATE, CONTIGUITY,
    )
    b_beta = strengths(beta, first, length, i_h, HV, C, SIGMOID)
    b_A, L, qb, kb, ka, total = tree(b_q, b_k, alpha, C, BK, LEVELS, OPERAND)
    return b_A, L * b_beta[:, None], b_beta, qb, kb, ka, total


@triton.jit
def store_rows(x, b_x, i_r, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, CONTIGUITY: tl.constexpr):
    """Store b_x [C, BK] at x [.., C, K], tile i_r."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    offsets = i_r * (C * K) + tile(o_c, o_k, K, CONTIGUITY)
    tl.store(x + offsets, b_x.to(x.dtype.element_ty), mask=inside(o_c, C, o_k, K, K == BK))


@triton.jit
def store_square(x, b_x, i_c, row, column, C: tl.constexpr, M: tl.constexpr):
    """Store the block b_x [M, M] at (row, column) of x [.., C, C], chunk i_c."""
    o_m = tl.arange(0, M)
    tl.store(x + i_c * (C * C) + (row + o_m)[:, None] * C + column + o_m[None, :], b_x.to(x.dtype.element_ty))


@triton.jit
def load_rows(x, i_c, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, CONTIGUITY: tl.constexpr):
    """Load tile i_c of x [.., C, K] as [C, BK]."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    offsets = i_c * (C * K) + tile(o_c, o_k, K, CONTIGUITY)
    return tl.load(x + offsets, mask=inside(o_c, C, o_k, K, K == BK), other=0.0)
