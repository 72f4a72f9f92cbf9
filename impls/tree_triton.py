"""Compute the tree-chunk form of one chunk inside a Triton program: decays by products only, and two C x C matrices.

Take alpha = exp(g). Groups of s = 1, 2, .., C/2 tokens are merged two by two. Per token and channel

    before   the product of decays from the group's start up to and including the token
    after    the product of decays behind the token to the group's end

For token i in the late and j in the early half of a merged group the decay between them is before_i after_j, so each
level adds one product of late rows with early rows to

    A = strict and diagonal  q_i (decay k_j)          L = strict  beta_i k_i (decay k_j)

and X = (I + L)^-1 grows block by block: X <- X - X L_level X. After log2(C) levels before and after are the decays
that the state update needs. Decays are never divided: any gate is safe, -inf too, and no bit of a row hangs on what
follows it. What is carried from level to level are the rows q before, k before and k after themselves: they are the
operands of the next level, and at the end what the state update multiplies with.

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
def merge(q_before, k_before, k_after, total, M: tl.constexpr, s: tl.constexpr, BK: tl.constexpr):
    """Merge groups of s tokens two by two: rows [C, BK] and totals [C / s, BK] become those of groups twice as long."""
    early, late = tl.split(tl.permute(tl.reshape(total, (M, 2, BK)), (0, 2, 1)))
    q_early, q_late = halves(q_before, M, s, BK)
    k_early, k_late = halves(k_before, M, s, BK)
    a_early, a_late = halves(k_after, M, s, BK)
    q_before = weave(q_early, q_late * early[:, None, :], M, s, BK)
    k_before = weave(k_early, k_late * early[:, None, :], M, s, BK)
    k_after = weave(a_early * late[:, None, :], a_late, M, s, BK)
    return q_before, k_before, k_after, early * late


@triton.jit
def product(a, b):
    """Return a b."""
    return a * b


@triton.jit
def excluding(product_a, excluding_a, product_b, excluding_b):
    """Append run b of factors to run a: the product of all, and that of all but the last one."""
    return product_a * product_b, product_a * excluding_b


@triton.jit
def decayed(q, k, alpha):
    """Return q before, k before, k after [C, BK] and the total decay [1, BK] of a chunk of q, k, alpha [C, BK].

    Two scans instead of the levels of `tree`: where no product of a level is needed, Triton 3.6 carries the levels'
    layout changes through to the operands of the walk and spills 8,288 bytes on sm_90, or does not end on gfx942.
    """
    before = tl.associative_scan(alpha, 0, product)
    _, after = tl.associative_scan((alpha, tl.full(alpha.shape, 1.0, tl.float32)), 0, excluding, reverse=True)
    return q * before, k * before, k * after, tl.reduce(alpha, 0, product, keep_dims=True)


@triton.jit
def spread(P, C: tl.constexpr, M: tl.constexpr, s: tl.constexpr):
    """Move rows and columns of one level's products [C/2, C/2], late by early, to their places in [C, C]."""
    zero = tl.zeros([C // 2, M, s], tl.float32)
    P = tl.permute(tl.join(tl.reshape(P, (C // 2, M, s)), zero), (0, 1, 3, 2))
    return weave(tl.zeros([M, s, C], tl.float32), tl.reshape(P, (M, s, C)), M, s, C)


@triton.jit
def level(
    q_before, k_before, k_after, n: tl.constexpr, M: tl.constexpr, s: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):
    """Return what merging groups of s = 2^n tokens adds to A and L [C, C]: late rows of q and k times early k."""
    _, q_late = halves(q_before, M, s, BK)
    _, k_late = halves(k_before, M, s, BK)
    k_early, _ = halves(k_after, M, s, BK)
    q_late = tl.reshape(q_late, (C // 2, BK)).to(OPERAND)
    k_late = tl.reshape(k_late, (C // 2, BK)).to(OPERAND)
    k_early = tl.reshape(k_early, (C // 2, BK)).to(OPERAND)
    late = tl.reshape(tl.permute(tl.join(q_late, k_late), (2, 0, 1)), (C, BK))
    P = tl.dot(late, tl.trans(k_early), input_precision="ieee")
    row, column = tl.arange(0, C), tl.arange(0, C // 2)
    P = tl.where(((row % (C // 2))[:, None] >> n) == (column[None, :] >> n), P, 0.0)
    of_q, of_k = tl.split(tl.permute(tl.reshape(P, (2, C // 2, C // 2)), (1, 2, 0)))
    return spread(of_q, C, M, s), spread(of_k, C, M, s)


@triton.jit
def tree(q, k, alpha, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr):
    """Return A, K K^T decayed [C, C] (strict), and what `decayed` returns, of q, k, alpha [C, BK] in float32."""
    o_c = tl.arange(0, C)
    diagonal = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee")
    A = tl.where(o_c[:, None] == o_c[None, :], diagonal, 0.0)
    L = tl.zeros([C, C], tl.float32)
    q_before, k_before, k_after, total = q * alpha, k * alpha, k, alpha
    for n in tl.static_range(LEVELS):
        more_A, more_L = level(q_before, k_before, k_after, n, C >> (n + 1), 1 << n, C, BK, OPERAND)
        A, L = A + more_A, L + more_L
        q_before, k_before, k_after, total = merge(q_before, k_before, k_after, total, C >> (n + 1), 1 << n, BK)
    return A, L, q_before, k_before, k_after, total


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
