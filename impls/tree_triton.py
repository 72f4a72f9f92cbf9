"""Compute the tree-chunk form of one chunk inside a Triton program: decays by products only, and two C x C matrices.

Take alpha = exp(g). Groups of s = 1, 2, .., C/2 tokens are merged two by two. Per token and channel

    before   the product of decays from the group's start up to and including the token
    after    the product of decays behind the token to the group's end

For token i in the late and j in the early half of a merged group the decay between them is before_i after_j, so each
level adds one product of late rows with early rows to

    A = strict and diagonal  q_i (decay k_j)          L = strict  beta_i k_i (decay k_j)

and X = (I + L)^-1 grows block by block: X <- X - X L_level X. After log2(C) levels before and after are the decays
that the state update needs. Decays are never divided: any gate is safe, -inf too, and no bit of a row hangs on what
follows it.

A thread that owns whole columns of a tile (rows in registers) makes halves, weave and totals register moves; the layout
comes from the loads, see `contiguity` in `impls.configs`.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x, M: tl.constexpr, s: tl.constexpr, W: tl.constexpr):
    """Split x [M 2 s, W] into the early and the late halves of its M groups: [M, s, W] each."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, s, W)), (0, 2, 3, 1)))


@triton.jit
def weave(early, late, M: tl.constexpr, s: tl.constexpr, W: tl.constexpr):
    """Join what `halves` split: [M, s, W] twice to [M 2 s, W]."""
    return tl.reshape(tl.permute(tl.join(early, late), (0, 3, 1, 2)), (M * 2 * s, W))


@triton.jit
def merge(before, after, total, M: tl.constexpr, s: tl.constexpr, BK: tl.constexpr):
    """Merge groups of s tokens two by two: before, after [C, BK], total [C / s, BK] of the groups twice as long."""
    before_early, before_late = halves(before, M, s, BK)
    after_early, after_late = halves(after, M, s, BK)
    early, late = tl.split(tl.permute(tl.reshape(total, (M, 2, BK)), (0, 2, 1)))
    before = weave(before_early, before_late * early[:, None, :], M, s, BK)
    after = weave(after_early * late[:, None, :], after_late, M, s, BK)
    return before, after, early * late


@triton.jit
def decays(alpha, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr):
    """Return before, after [C, BK] and total [1, BK] of a whole chunk with decays alpha [C, BK]."""
    before, after, total = alpha, tl.full([C, BK], 1.0, tl.float32), alpha
    for n in tl.static_range(LEVELS):
        before, after, total = merge(before, after, total, C >> (n + 1), 1 << n, BK)
    return before, after, total


@triton.jit
def spread(P, C: tl.constexpr, M: tl.constexpr, s: tl.constexpr):
    """Move rows and columns of one level's products [C/2, C/2], late by early, to their places in [C, C]."""
    zero = tl.zeros([C // 2, M, s], tl.float32)
    P = tl.permute(tl.join(tl.reshape(P, (C // 2, M, s)), zero), (0, 1, 3, 2))
    return weave(tl.zeros([M, s, C], tl.float32), tl.reshape(P, (M, s, C)), M, s, C)


@triton.jit
def level(
    q, k, before, after, n: tl.constexpr, M: tl.constexpr, s: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):
    """Return what merging groups of s = 2^n tokens adds to A and L [C, C]: late rows of q and k times early k."""
    _, before_late = halves(before, M, s, BK)
    after_early, _ = halves(after, M, s, BK)
    k_early, k_late = halves(k, M, s, BK)
    _, q_late = halves(q, M, s, BK)
    q_late = tl.reshape(q_late * before_late, (C // 2, BK)).to(OPERAND)
    k_late = tl.reshape(k_late * before_late, (C // 2, BK)).to(OPERAND)
    k_early = tl.reshape(k_early * after_early, (C // 2, BK)).to(OPERAND)
    late = tl.reshape(tl.permute(tl.join(q_late, k_late), (2, 0, 1)), (C, BK))
    P = tl.dot(late, tl.trans(k_early), input_precision="ieee")
    row, column = tl.arange(0, C), tl.arange(0, C // 2)
    P = tl.where(((row % (C // 2))[:, None] >> n) == (column[None, :] >> n), P, 0.0)
    of_q, of_k = tl.split(tl.permute(tl.reshape(P, (2, C // 2, C // 2)), (1, 2, 0)))
    return spread(of_q, C, M, s), spread(of_k, C, M, s)


@triton.jit
def tree(q, k, alpha, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr):
    """Return A, K K^T decayed [C, C] (strict), before, after [C, BK], total [1, BK] of q, k, alpha [C, BK], float32."""
    o_c = tl.arange(0, C)
    before, after, total = alpha, tl.full([C, BK], 1.0, tl.float32), alpha
    diagonal = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee")
    A = tl.where(o_c[:, None] == o_c[None, :], diagonal, 0.0)
    L = tl.zeros([C, C], tl.float32)
    for n in tl.static_range(LEVELS):
        more_A, more_L = level(q, k, before, after, n, C >> (n + 1), 1 << n, C, BK, OPERAND)
        A, L = A + more_A, L + more_L
        before, after, total = merge(before, after, total, C >> (n + 1), 1 << n, BK)
    return A, L, before, after, total


@triton.jit
def inverse(L, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + L)^-1 of a strictly lower triangular L [C, C]: blocks of 1, 2, 4, .. rows, never a power of L."""
    o_c = tl.arange(0, C)
    row, column = o_c[:, None], o_c[None, :]
    X = tl.where(row == column, 1.0, 0.0) - tl.where((row >> 1) == (column >> 1), L, 0.0)
    for n in tl.static_range(1, LEVELS):
        level = ((row >> (n + 1)) == (column >> (n + 1))) & ((row >> n) != (column >> n))
        XL = tl.dot(X, tl.where(level, L, 0.0), input_precision=PRECISION)
        X -= tl.dot(XL, X, input_precision=PRECISION)
    return X
