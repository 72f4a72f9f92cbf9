"""Activate raw projections inside a Triton kernel: l2norm of q and k, both gates, beta's sigmoid; decays in base 2.

    gate 'none'      log decay g                         gate 'softplus'  -exp(A_log) softplus(g + dt_bias)
    gate 'bounded'   lower_bound sigmoid(exp(A_log) (g + dt_bias)), A_log = 0 where there is none

APPROXIMATE picks NVIDIA's ex2.approx (2 ulp) and lg2.approx (2^-22 absolute near 1): what they lose, at most 9e-4 of a
softplus at its smallest, hides behind operands of 8 or 11 bits. Elsewhere, and for float32 inputs, softplus keeps its
relative accuracy near 0: a gate of -1e-4 decays for 10,000 tokens.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2NORM_EPSILON = tl.constexpr(1e-6)


@triton.jit
def exp2(x, APPROXIMATE: tl.constexpr, PURE: tl.constexpr = True):
    """Return 2^x. Not PURE: the compiler may not compute it a second time for a second layout."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=PURE, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def softplus_base2(x, APPROXIMATE: tl.constexpr):
    """Return log2(1 + 2^x), which is softplus in base 2: softplus(y) = ln 2 * this at x = y log2 e."""
    if APPROXIMATE:
        t = exp2(x, True)
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + t], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.where(x > 28.0, x, tl.where(x < -12.0, t * LOG2E, log))
    else:
        t = tl.exp2(-tl.abs(x))
        above = 1.0 + t
        # log(1 + t) = t log(u) / (u - 1) with u = 1 + t rounded: the rounding of u cancels
        log = tl.where(above == 1.0, t * LOG2E, tl.log2(above) * (t / tl.where(above == 1.0, 1.0, above - 1.0)))
        return tl.maximum(x, 0.0) + log


@triton.jit
def inverse_norm(x, APPROXIMATE: tl.constexpr):
    """Return 1 / sqrt(sum x^2 + 1e-6) of the rows of x [.., K]: [.., 1]."""
    square = tl.sum(x * x, 1) + L2NORM_EPSILON
    if APPROXIMATE:
        return tl.rsqrt(square)[:, None]
    else:
        return (1.0 / tl.sqrt_rn(square))[:, None]


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), for any x without an overflow that would be NaN."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def log2_decay(x, rate, bias, lower_bound, GATE: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Return the log decay in base 2 of gates x [.., K] in float32; rate is exp(A_log), bias [.., K] dt_bias."""
    if GATE == "none":
        return x * LOG2E
    elif GATE == "softplus":
        return -rate * softplus_base2((x + bias) * LOG2E, APPROXIMATE)
    else:
        return sigmoid(rate * (x + bias)) * lower_bound * LOG2E


@triton.jit
def write_strength(x, SIGMOID: tl.constexpr):
    """Return beta of x in float32: itself, its sigmoid, or twice that."""
    if SIGMOID == "none":
        return x
    elif SIGMOID == "once":
        return sigmoid(x)
    else:
        return 2.0 * sigmoid(x)


@triton.jit
def gate_parameters(A_log, dt_bias, i_h, o_k, K: tl.constexpr, GATE: tl.constexpr):
    """Return exp(A_log) and dt_bias [BK] of head i_h: 1 and 0 where there is none."""
    rate = 1.0
    bias = tl.zeros_like(o_k).to(tl.float32)
    if GATE != "none":
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
        if dt_bias is not None:
            bias = tl.load(dt_bias + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return rate, bias
