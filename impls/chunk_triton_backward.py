"""Differentiate Kimi Delta Attention chunk by chunk in Triton: the adjoint of `impls.chunk_triton`, written by hand.

With A, L, the rows and the total of `impls.tree_triton`, of activated inputs, and S the state that enters a chunk,

    r = v - (k before) S     e = (I + L diag(beta))^-1 r     delta = beta e     o = scale ((q before) S + A delta)
    S_next = total S + (k after)^T delta

goes back, with y = (I + diag(beta) L)^-T (scale A^T do + (k after) dS_next) and the rows W = [scale do; -beta y], as

    dv = beta y     dbeta = <y, e>     [dA; dL] = W delta^T (on and below the diagonal; L as it multiplies beta)
    d[q before; k before] = W S^T     d(k after) = delta dS_next^T     dS = total dS_next + [q before; k before]^T W

in at most five launches, of which those run that the wanted gradients need:

    within        one program per chunk and value head: activations and the tree; stores A, both inverses, the rows, the
                  total, beta
    replay        one program per sequence, value head and tile of value channels: forward over the chunks; stores the
                  state that enters each, and e; in a forward that saves, the outputs too
    walk_back     the same programs, the last chunk first: stores dv, dS0, the gradient of the state that leaves each
                  chunk, and y
    token_gradients  one program per chunk and query head: dq, dk, dg, dbeta of the raw inputs, value head after value
                  head, tile after tile; and what the chunk gives to A_log and dt_bias
    parameters    one program per value head: sums that over the chunks

By recomputation nothing is saved but the inputs. A forward that saves is `within` and `replay` itself: their buffers
stay until the backward, whose three launches then find the same bits. No atomics: every sum has one order. Decays are
only multiplied, and gates get sums of what the logarithms of products received, level by level, never a total minus a
prefix: any gate is safe, -inf too.
"""

import functools
from dataclasses import replace

import triton
import triton.language as tl

from impls.activations_triton import LOG2E, gate_parameters, inverse_norm, sigmoid, softplus_base2
from impls.configs import ChunkTritonConfig
from impls.defaults import default_chunk, family
from impls.launcher import backward_of
from impls.layout_triton import bounds, first_slot, inside, owner, state_offsets, tile
from impls.plan import Launch, Plan, Problem, Wanted, inverse_precision, narrow, options, tile_of
from impls.rows_triton import activated, load_rows, store_rows, store_square, strengths
from impls.targets import Target
from impls.targets import of as target_of
from impls.tree_triton import inverse, tree


@triton.jit
def times(a, b, OPERAND: tl.constexpr, PRODUCTS: tl.constexpr):
    """Return a b in float32, of operands rounded to the format of products."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRODUCTS)


@triton.jit
def placed(cu_seqlens, slot, T, N, C: tl.constexpr):
    """Return the first row on the flat token axis and the number of tokens, at most 0 for none, of a slot's chunk."""
    i_n = owner(cu_seqlens, slot, T, N, C)
    first, length = bounds(cu_seqlens, i_n, T)
    begin = (slot - first_slot(cu_seqlens, i_n, T, C)) * C
    return first + begin, (length - begin).to(tl.int32)


@triton.jit(do_not_specialize=["T", "N"])
def within(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, A, X, Z, q_before, k_before, k_after, last, strength,
    T, N, scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, TREE: tl.constexpr, PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Work on one chunk of one value head: what the walks need of it, A and q before times scale.

    X = (I + diag(beta) L)^-1, Z = (I + L diag(beta))^-1 = I - L X diag(beta).
    """
    program = tl.program_id(0).to(tl.int64)
    slot, i_h = program // HV, (program % HV).to(tl.int32)
    first, length = placed(cu_seqlens, slot, T, N, C)
    if length <= 0:
        return
    i_c, o_c, o_k = program, tl.arange(0, C), tl.arange(0, BK)
    b_q, b_k, alpha = activated(
        q, k, g, A_log, dt_bias, lower_bound, first, length, i_h,
        H, HV, K, BK, C, L2NORM, GATE, APPROXIMATE, CONTIGUITY,
    )
    b_beta = strengths(beta, first, length, i_h, HV, C, SIGMOID)
    b_A, L, qb, kb, ka, total = tree(b_q, b_k, alpha, C, BK, LEVELS, TREE)
    if A is not None:
        store_square(A, b_A * scale, i_c, 0, 0, C, C)
        store_rows(q_before, qb * scale, i_c, K, BK, C, CONTIGUITY)
    store_rows(k_before, kb, i_c, K, BK, C, CONTIGUITY)
    store_rows(k_after, ka, i_c, K, BK, C, CONTIGUITY)
    tl.store(last + i_c * K + o_k, tl.reshape(total, (BK,)), mask=o_k < K)
    tl.store(strength + i_c * C + o_c, b_beta)
    b_X = inverse(L * b_beta[:, None], C, LEVELS, PRECISION)
    store_square(X, b_X, i_c, 0, 0, C, C)
    if Z is not None:
        identity = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
        store_square(Z, identity - tl.dot(L, b_X, input_precision=PRECISION) * b_beta[None, :], i_c, 0, 0, C, C)


@triton.jit(do_not_specialize=["T", "N"])
def replay(
    k_before, k_after, last, Z, strength, v, cu_seqlens, initial, states, errors, q_before, A, o, final, T, N,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    V_FIRST: tl.constexpr, OPERAND: tl.constexpr, PRODUCTS: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Walk over the chunks of one sequence with BV columns of one head's state, transposed: S [BV, BK].

        e = Z (v - (k before) S)        S <- total S + (k after)^T (beta e)

    With `o` it is the walk of a forward, too: o = (q before) S + A (beta e), both times scale already.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % TILES).to(tl.int32), (program // TILES % HV).to(tl.int32), program // (TILES * HV)
    first, length = bounds(cu_seqlens, i_n, T)
    length = length.to(tl.int32)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_S = inside(o_v, V, o_k, K, K == BK)
    S = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        of_initial = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
        S = tl.load(initial + of_initial, mask=m_S, other=0.0).to(tl.float32)
    i_c = first_slot(cu_seqlens, i_n, T, C) * HV + i_h
    of_v, of_e = tile(o_c, o_v, HV * V, CONTIGUITY), tile(o_c, o_v, V, CONTIGUITY)
    of_c = o_c[:, None] * C + o_c[None, :]
    v += (first * HV + i_h) * V
    if o is not None:
        o += (first * HV + i_h) * V
    # fetched a chunk ahead by hand: the compiler pipelines only what goes into products unchanged
    next_v = tl.load(v + of_v, mask=inside(o_c, length, o_v, V, V % BV == 0), other=0.0)
    next_total = tl.load(last + i_c * K + o_k, mask=(o_k < K) & (length > 0), other=0.0)
    next_beta = tl.load(strength + i_c * C + o_c, mask=o_c < length, other=0.0)
    for i_t in range(0, (length + C - 1) // C):
        rest, b_v, decay, b_beta = length - i_t * C, next_v, next_total[None, :], next_beta[None, :]
        v += C * HV * V
        next_v = tl.load(v + of_v, mask=inside(o_c, rest - C, o_v, V, V % BV == 0), other=0.0)
        next_total = tl.load(last + (i_c + HV) * K + o_k, mask=(o_k < K) & (rest > C), other=0.0)
        next_beta = tl.load(strength + (i_c + HV) * C + o_c, mask=o_c < rest - C, other=0.0)
        kb, ka = load_rows(k_before, i_c, K, BK, C, CONTIGUITY), load_rows(k_after, i_c, K, BK, C, CONTIGUITY)
        if states is not None:
            tl.store(states + state_offsets(i_c, o_v, o_k, K, V, True), S.to(states.dtype.element_ty), mask=m_S)
        r = tl.trans(b_v).to(tl.float32) - times(S, tl.trans(kb), OPERAND, PRODUCTS)
        if o is not None:
            b_o = times(S, tl.trans(load_rows(q_before, i_c, K, BK, C, CONTIGUITY)), OPERAND, PRODUCTS)
        e = times(r, tl.trans(tl.load(Z + i_c * (C * C) + of_c)), OPERAND, PRODUCTS)
        delta = e * b_beta
        S = S * decay + times(delta, ka, OPERAND, PRODUCTS)
        if o is not None:
            b_o += times(delta, tl.trans(tl.load(A + i_c * (C * C) + of_c)), OPERAND, PRODUCTS)
            m_o = inside(o_c, rest, o_v, V, V % BV == 0)
            tl.store(o + of_v, tl.trans(b_o).to(o.dtype.element_ty), mask=m_o)
            o += C * HV * V
        m_e = inside(o_c, C, o_v, V, V % BV == 0)
        tl.store(errors + i_c * (C * V) + of_e, tl.trans(e).to(errors.dtype.element_ty), mask=m_e)
        i_c += HV
    if final is not None:
        of_final = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
        tl.store(final + of_final, S, mask=m_S)


@triton.jit(do_not_specialize=["T", "N"])
def walk_back(
    q_before, k_before, k_after, last, A, X, strength, do, cu_seqlens, dS, adjoints, solved, dv, dS0, T, N,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    V_FIRST: tl.constexpr, OPERAND: tl.constexpr, PRODUCTS: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Walk back over the chunks of one sequence with BV columns of the gradient of one head's state: dS [BV, BK].

        y = X^T (A^T do + (k after) dS)     dv = beta y     dS <- total dS + (q before)^T do - (k before)^T dv
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % TILES).to(tl.int32), (program // TILES % HV).to(tl.int32), program // (TILES * HV)
    first, length = bounds(cu_seqlens, i_n, T)
    length = length.to(tl.int32)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_S, of_S = inside(o_v, V, o_k, K, K == BK), state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
    b_dS = tl.zeros([BV, BK], tl.float32)
    if dS is not None:
        b_dS = tl.load(dS + of_S, mask=m_S, other=0.0).to(tl.float32)
    chunks = (length + C - 1) // C
    i_c = (first_slot(cu_seqlens, i_n, T, C) + chunks - 1) * HV + i_h
    of_v, of_y = tile(o_c, o_v, HV * V, CONTIGUITY), tile(o_c, o_v, V, CONTIGUITY)
    of_c = o_c[:, None] * C + o_c[None, :]
    of_row = ((first + (chunks - 1) * C) * HV + i_h) * V
    rest = tl.minimum(length - (chunks - 1) * C, length)
    # fetched a chunk ahead by hand: the compiler pipelines only what goes into products unchanged
    next_total = tl.load(last + i_c * K + o_k, mask=(o_k < K) & (rest > 0), other=0.0)
    next_beta = tl.load(strength + i_c * C + o_c, mask=o_c < rest, other=0.0)
    for i_t in range(0, chunks):
        decay, b_beta = next_total[None, :], next_beta[None, :]
        more = i_t + 1 < chunks
        next_total = tl.load(last + (i_c - HV) * K + o_k, mask=(o_k < K) & more, other=0.0)
        next_beta = tl.load(strength + (i_c - HV) * C + o_c, mask=(o_c < C) & more, other=0.0)
        kb, ka = load_rows(k_before, i_c, K, BK, C, CONTIGUITY), load_rows(k_after, i_c, K, BK, C, CONTIGUITY)
        if adjoints is not None:
            tl.store(adjoints + state_offsets(i_c, o_v, o_k, K, V, True), b_dS.to(adjoints.dtype.element_ty), mask=m_S)
        d_delta = times(b_dS, tl.trans(ka), OPERAND, PRODUCTS)
        b_dS *= decay
        if do is not None:
            b_do = tl.trans(tl.load(do + of_row + of_v, mask=inside(o_c, rest, o_v, V, V % BV == 0), other=0.0))
            d_delta += times(b_do, tl.load(A + i_c * (C * C) + of_c), OPERAND, PRODUCTS)
            b_dS += times(b_do, load_rows(q_before, i_c, K, BK, C, CONTIGUITY), OPERAND, PRODUCTS)
        y = times(d_delta, tl.load(X + i_c * (C * C) + of_c), OPERAND, PRODUCTS)
        dr = y * b_beta
        b_dS -= times(dr, kb, OPERAND, PRODUCTS)
        if solved is not None:
            m_y = inside(o_c, C, o_v, V, V % BV == 0)
            tl.store(solved + i_c * (C * V) + of_y, tl.trans(y).to(solved.dtype.element_ty), mask=m_y)
        if dv is not None:
            m_v = inside(o_c, rest, o_v, V, V % BV == 0)
            tl.store(dv + of_row + of_v, tl.trans(dr).to(dv.dtype.element_ty), mask=m_v)
        i_c -= HV
        of_row -= C * HV * V
        rest = 0 * rest + C
    if dS0 is not None:
        tl.store(dS0 + of_S, b_dS.to(dS0.dtype.element_ty), mask=m_S)


@triton.jit
def stacked(x, y, C: tl.constexpr, W: tl.constexpr):
    """Stack x and y [C, W] as [2 C, W]."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (2 * C, W))


@triton.jit
def unstacked(x, C: tl.constexpr, W: tl.constexpr):
    """Split x [2 C, W] into its upper and its lower half."""
    return tl.split(tl.permute(tl.reshape(x, (2, C, W)), (1, 2, 0)))


@triton.jit
def summed(chosen, x, EXACT: tl.constexpr):
    """Return for each row the sum of the chosen rows of x [C, BK]; chosen [C, C]."""
    return tl.dot(tl.where(chosen, 1.0, 0.0), x, input_precision=EXACT)


@triton.jit
def joined(before, after, n, row, column, EXACT: tl.constexpr):
    """Return the decays [C, BK] to the ends of parts of 2^(n + 1) tokens, given those of 2^n tokens."""
    is_late = ((row >> n) & 1) == 1
    sibling = summed(column == (((((row >> n) ^ 1) + 1) << n) - 1), before, EXACT)
    return tl.where(is_late, before * sibling, before), tl.where(is_late, after, after * sibling)


@triton.jit
def whole_chunk(b_alpha, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """Return the decays [C, BK] of every token from the chunk's beginning, itself included, and to its end."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    before, after = b_alpha, tl.full([C, BK], 1.0, tl.float32)
    for n in range(LEVELS):
        before, after = joined(before, after, n, row, column, EXACT)
    return before, after


@triton.jit
def level_gradients(
    b_dq, b_dk, b_dg, b_q, b_k, b_alpha, dP, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    OPERAND: tl.constexpr, PRODUCTS: tl.constexpr, EXACT: tl.constexpr,
):
    """Return dq, dk and dg [C, BK] with what the levels add. dP [C, 2 C]: dA^T beside dL^T."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    of_pair = (tl.arange(0, 2 * C) % C)[None, :]
    before, after = b_alpha, tl.full([C, BK], 1.0, tl.float32)
    for n in range(LEVELS):
        pair = ((row >> (n + 1)) == (of_pair >> (n + 1))) & ((row >> n) < (of_pair >> n))
        b_dP = tl.where(pair, dP, 0.0)
        late = stacked((b_q * before).to(OPERAND), (b_k * before).to(OPERAND), C, BK)
        of_early = times(b_dP, late, OPERAND, PRODUCTS) * after
        of_q, of_k = unstacked(times(tl.trans(b_dP), b_k * after, OPERAND, PRODUCTS), C, BK)
        of_q, of_k = of_q * before, of_k * before + of_early
        b_dq, b_dk = b_dq + of_q, b_dk + of_k
        # times the rows: what the logarithm of `before` received in late rows, that of `after` in early ones
        is_late, same = ((row >> n) & 1) == 1, (row >> n) == (column >> n)
        part_of = same & ((is_late & (column >= row)) | ((row > column) & (is_late == 0)))
        b_dg += summed(part_of, of_q * b_q + of_k * b_k, EXACT)
        before, after = joined(before, after, n, row, column, EXACT)
    return b_dq, b_dk, b_dg


@triton.jit
def value_sums(
    do, states, adjoints, errors, solved, i_c, first, length, i_h,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OPERAND: tl.constexpr, PRODUCTS: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Return do S^T, y S^T, e dS^T [C, BK], e [do; y]^T [C, 2 C], <do, e>, <y, e> [C], <S, dS> [BK] over all values.

    do and y are stacked: no product is square, whose rows Triton would give to the warps, all columns to each of them.
    """
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    of_both, of_e = tl.zeros([2 * C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    with_e, to_total = tl.zeros([C, 2 * C], tl.float32), tl.zeros([BK], tl.float32)
    diagonal, product = (tl.zeros([C], tl.float32),) * 2
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        of_state, m_S = state_offsets(i_c, o_v, o_k, K, V, True), inside(o_v, V, o_k, K, K == BK)
        of_v, m_v = i_c * (C * V) + o_c[:, None] * V + o_v[None, :], inside(o_c, C, o_v, V, V % BV == 0)
        e = tl.load(errors + of_v, mask=m_v, other=0.0)
        b_do, y = tl.zeros([C, BV], OPERAND), tl.zeros([C, BV], OPERAND)
        if solved is not None:
            y = tl.load(solved + of_v, mask=m_v, other=0.0)
            product += tl.sum(y.to(tl.float32) * e.to(tl.float32), 1)
        if states is not None:
            S = tl.load(states + of_state, mask=m_S, other=0.0)
            if do is not None:
                of_do = (first * HV + i_h) * V + tile(o_c, o_v, HV * V, CONTIGUITY)
                b_do = tl.load(do + of_do, mask=inside(o_c, length, o_v, V, V % BV == 0), other=0.0).to(OPERAND)
                diagonal += tl.sum(b_do.to(tl.float32) * e.to(tl.float32), 1)
            both = stacked(b_do, y, C, BV)
            of_both += times(both, S, OPERAND, PRODUCTS)
            with_e += times(e, tl.trans(both), OPERAND, PRODUCTS)
            if adjoints is not None:
                b_dS = tl.load(adjoints + of_state, mask=m_S, other=0.0)
                of_e += times(e, b_dS, OPERAND, PRODUCTS)
                to_total += tl.sum(S.to(tl.float32) * b_dS.to(tl.float32), 0)
    of_q, of_y = unstacked(of_both, C, BK)
    return of_q, of_y, of_e, with_e, diagonal, product, to_total


@triton.jit
def gate_slope(x, rate, lower_bound, GATE: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Return the derivatives of the log decay by the raw gate x, dt_bias added, and by A_log."""
    if GATE == "softplus":
        return -rate * sigmoid(x), -rate * (softplus_base2(x * LOG2E, APPROXIMATE) / LOG2E)
    else:
        s = sigmoid(rate * x)
        slope = lower_bound * rate * (s * (1.0 - s))
        return slope, tl.where(slope == 0.0, 0.0, slope * x)


@triton.jit
def store_raw(
    x, dx, b_dx, first, length, i_h, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    L2NORM: tl.constexpr, APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Store the gradients of raw rows of x [.., H, K], given those of the normalised ones."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    mask = inside(o_c, length, o_k, K, K == BK)
    of_x = (first * H + i_h) * K + tile(o_c, o_k, H * K, CONTIGUITY)
    if L2NORM:
        b_x = tl.load(x + of_x, mask=mask, other=0.0).to(tl.float32)
        by_length = inverse_norm(b_x, APPROXIMATE)
        b_x *= by_length
        b_dx = (b_dx - b_x * tl.sum(b_x * b_dx, 1)[:, None]) * by_length
    tl.store(dx + of_x, b_dx.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def store_gates(
    g, A_log, dt_bias, dg, of_A_log, of_dt_bias, b_dg, first, length, i_c, i_h, lower_bound,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Store the gradients of raw gates, given those of log decays [C, BK], and what they give to A_log and dt_bias."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    mask = inside(o_c, length, o_k, K, K == BK)
    of_g = (first * HV + i_h) * K + tile(o_c, o_k, HV * K, CONTIGUITY)
    if GATE != "none":
        x = tl.load(g + of_g, mask=mask, other=0.0).to(tl.float32)
        rate, bias = gate_parameters(A_log, dt_bias, i_h, o_k, K, GATE)
        by_x, by_A = gate_slope(x + bias[None, :], rate, lower_bound, GATE, APPROXIMATE)
        if of_A_log is not None:
            # where the decay is 0 its gradient is, and a derivative may be infinite
            tl.store(of_A_log + i_c, tl.sum(tl.sum(tl.where(mask & (b_dg != 0.0), b_dg * by_A, 0.0), 1), 0))
        b_dg *= by_x
        if of_dt_bias is not None:
            tl.store(of_dt_bias + i_c * K + o_k, tl.sum(tl.where(mask, b_dg, 0.0), 0), mask=o_k < K)
    if dg is not None:
        tl.store(dg + of_g, b_dg.to(dg.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "N"])
def token_gradients(
    q, k, g, A_log, dt_bias, strength, do, states, adjoints, errors, solved, cu_seqlens,
    dq, dk, dg, dbeta, of_A_log, of_dt_bias, T, N, scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
    OPERAND: tl.constexpr, PRODUCTS: tl.constexpr, EXACT: tl.constexpr, APPROXIMATE: tl.constexpr,
    CONTIGUITY: tl.constexpr,
):
    """Store the gradients of one chunk of one query head, and of the value heads that share it, one after the other."""
    R: tl.constexpr = HV // H
    program = tl.program_id(0).to(tl.int64)
    slot, i_q = program // H, (program % H).to(tl.int32)
    first, length = placed(cu_seqlens, slot, T, N, C)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    if length <= 0:
        for i_r in range(R):
            i_c = slot * HV + i_q * R + i_r
            if of_A_log is not None:
                tl.store(of_A_log + i_c, 0.0)
            if of_dt_bias is not None:
                tl.store(of_dt_bias + i_c * K + o_k, tl.zeros([BK], tl.float32), mask=o_k < K)
        return
    sum_q, sum_k = (tl.zeros([C, BK], tl.float32),) * 2
    for i_r in range(R):
        i_h = i_q * R + i_r
        i_c = slot * HV + i_h
        of_q, of_y, of_e, dP, diagonal, product, to_total = value_sums(
            do, states, adjoints, errors, solved, i_c, first, length, i_h,
            HV, K, V, BK, BV, C, OPERAND, PRODUCTS, CONTIGUITY,
        )
        b_beta = tl.load(strength + i_c * C + o_c)
        if dbeta is not None:
            if SIGMOID == "once":
                product *= b_beta * (1.0 - b_beta)
            elif SIGMOID == "twice":
                product *= b_beta * (1.0 - 0.5 * b_beta)
            of_beta = (first + o_c) * HV + i_h
            tl.store(dbeta + of_beta, product.to(dbeta.dtype.element_ty), mask=o_c < length)
        if states is not None:
            b_q, b_k, alpha = activated(
                q, k, g, A_log, dt_bias, lower_bound, first, length, i_h,
                H, HV, K, BK, C, L2NORM, GATE, APPROXIMATE, CONTIGUITY,
            )
            o_p = tl.arange(0, 2 * C)
            of_late = tl.where(o_p < C, scale, -tl.load(strength + i_c * C + o_p % C))
            before, after = whole_chunk(alpha, C, BK, LEVELS, EXACT)
            of_q, of_y, of_e = of_q * before * scale, of_y * before * -b_beta[:, None], of_e * after * b_beta[:, None]
            diagonal = (diagonal * b_beta * scale)[:, None]
            sum_q += of_q + diagonal * b_k
            sum_k += of_y + of_e + diagonal * b_q
            earlier = o_c[None, :] < o_c[:, None]
            b_dg = summed(earlier == 0, of_q * b_q + of_y * b_k, EXACT) + summed(earlier, of_e * b_k, EXACT)
            b_dg += (to_total * tl.sum(tl.where((o_c == C - 1)[:, None], before, 0.0), 0))[None, :]
            sum_q, sum_k, b_dg = level_gradients(
                sum_q, sum_k, b_dg, b_q, b_k, alpha, dP * b_beta[:, None] * of_late[None, :],
                C, BK, LEVELS, OPERAND, PRODUCTS, EXACT,
            )
            if dg is not None or of_A_log is not None or of_dt_bias is not None:
                store_gates(
                    g, A_log, dt_bias, dg, of_A_log, of_dt_bias, b_dg, first, length, i_c, i_h, lower_bound,
                    HV, K, BK, C, GATE, APPROXIMATE, CONTIGUITY,
                )
    if dq is not None:
        store_raw(q, dq, sum_q, first, length, i_q, H, K, BK, C, L2NORM, APPROXIMATE, CONTIGUITY)
    if dk is not None:
        store_raw(k, dk, sum_k, first, length, i_q, H, K, BK, C, L2NORM, APPROXIMATE, CONTIGUITY)


@triton.jit(do_not_specialize=["slots"])
def parameters(
    of_A_log, of_dt_bias, dA_log, ddt_bias, slots,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
):
    """Sum what every slot gives to A_log and dt_bias of one value head, in one order."""
    i_h, o_r, o_k = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BK)
    for_A, for_bias = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BK], tl.float32)
    for start in range(0, slots, ROWS):
        i_c = (start + o_r).to(tl.int64) * HV + i_h
        if dA_log is not None:
            for_A += tl.load(of_A_log + i_c, mask=start + o_r < slots, other=0.0)
        if ddt_bias is not None:
            mask = (start + o_r < slots)[:, None] & (o_k < K)[None, :]
            for_bias += tl.load(of_dt_bias + i_c[:, None] * K + o_k[None, :], mask=mask, other=0.0)
    if dA_log is not None:
        tl.store(dA_log + i_h, tl.sum(for_A, 0).to(dA_log.dtype.element_ty))
    if ddt_bias is not None:
        tl.store(ddt_bias + i_h * K + o_k, tl.sum(for_bias, 0).to(ddt_bias.dtype.element_ty), mask=o_k < K)


CHUNK = 16
"""Tokens per chunk, whatever the forward took: rows of a chunk twice as long find no registers."""
SUMMED_ROWS = 16
"""Chunks that one step of `parameters` adds up side by side."""
_WALKS = {
    ("sm_80", 256): {"value_tile": 32, "walk_warps": 8, "walk_stages": 2},
    ("sm_90", 128): {"walk_stages": 2},
    ("sm_100", 256): {"value_tile": 32, "walk_warps": 8, "walk_stages": 2},
}
"""(family, BK) -> where the walks differ from the forward's: with its tiles both together spill 4920, 16, 104 bytes."""
_SAVING_WALKS = {
    ("sm_80", "bfloat16", 128): (32, 8, 2),
    ("sm_100", "bfloat16", 128): (64, 8, 2),
    ("sm_90", "float16", 128): (64, 8, 2),
    ("sm_100", "float16", 128): (64, 8, 1),
    ("sm_90", "bfloat16", 256): (64, 8, 2),
    ("sm_100", "bfloat16", 256): (64, 8, 1),
}
"""(family, dtype, BK) -> value tile, warps and stages where `replay` with outputs differs: with the tiles of the one
without, it spills 168, 160, 336, 384, 48 and 2912 bytes; with these none but the last two, 48 and 64 bytes."""
OPERANDS = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


SAVED = ("A", "X", "q_before", "k_before", "k_after", "last", "strength", "errors", "states")
"""What a forward that saves leaves for the backward, beside its inputs."""


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, wanted: Wanted, target: Target, saved: bool = False) -> Plan:
    """Return the launches and the workspace of one backward: only those that the wanted gradients need.

    saved: a forward by `saving_plan` left the buffers SAVED.
    """
    slots, kinds = problem.spans(CHUNK), _kinds(problem)
    replays = wanted.rows or wanted.beta
    needed = {
        **dict.fromkeys(("A", "q_before"), wanted.do),
        **dict.fromkeys(("X", "k_before", "k_after", "last", "strength"), True),
        **dict.fromkeys(("Z", "errors"), replays),
        "states": wanted.rows,
        "solved": wanted.solved,
        "adjoints": wanted.solved and wanted.rows,
        "of_A_log": wanted.A_log,
        "of_dt_bias": wanted.dt_bias,
    }
    buffers = {name: kinds[name] for name, is_needed in needed.items() if is_needed}
    steps = {
        "within": not saved,
        "replay": replays and not saved,
        "walk_back": wanted.solved or wanted.v or wanted.initial,
        "token_gradients": replays,
        "parameters": wanted.A_log or wanted.dt_bias,
    }
    given = {"do": wanted.do, "dS": wanted.dS, **wanted.gradients}
    there, config = _there(problem, buffers, given), tiling(problem, target)
    launches = tuple(_launch(name, problem, config, target, there) for name, needed in steps.items() if needed)
    workspace = {name: kind for name, kind in buffers.items() if not (saved and name in (*SAVED, "Z"))}
    return Plan(launches, workspace, {"slots": slots})


@functools.lru_cache(maxsize=1024)
def saving_plan(problem: Problem, config: ChunkTritonConfig, target: Target) -> Plan:
    """Return the launches of a forward that leaves SAVED in its workspace: the first two of the backward."""
    kinds = _kinds(problem)
    workspace = {name: kinds[name] for name in (*SAVED, "Z")}
    there = _there(problem, workspace, {"o": True, "final": problem.final})
    return Plan(tuple(_launch(name, problem, config, target, there) for name in ("within", "replay")), workspace)


def _kinds(problem: Problem) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every buffer."""
    shapes = buffer_shapes(problem.spans(CHUNK), problem.HV, problem.K, problem.V)
    return {name: (buffer_dtype(name, problem.dtype), shape) for name, shape in shapes.items()}


def buffer_shapes(slots: int, HV: int, K: int, V: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every buffer: in all 21 times q where K = V = 128, 16 of them the two kinds of states."""
    chunks = slots, HV
    rows, squares, values, states = ((*chunks, *x) for x in ((CHUNK, K), (CHUNK, CHUNK), (CHUNK, V), (V, K)))
    return {
        **dict.fromkeys(("A", "X", "Z"), squares),
        **dict.fromkeys(("q_before", "k_before", "k_after"), rows),
        "last": (*chunks, K),
        "strength": (*chunks, CHUNK),
        **dict.fromkeys(("errors", "solved"), values),
        **dict.fromkeys(("states", "adjoints"), states),
        "of_A_log": chunks,
        "of_dt_bias": (*chunks, K),
    }


def buffer_dtype(name: str, dtype: str) -> str:
    """Return the dtype of a buffer, for inputs of a dtype."""
    return "float32" if name in _EXACT else product_dtype(dtype)


_EXACT = ("last", "strength", "of_A_log", "of_dt_bias")


def product_dtype(dtype: str) -> str:
    """Return what operands of products are rounded to and kept in for inputs of a dtype.

    float16 has no room for gradients of states, which sum over all tokens: float32, multiplied in tf32, as precise.
    """
    return "float32" if dtype == "float16" else dtype


_KERNELS = {kernel.__name__: kernel for kernel in (within, replay, walk_back, token_gradients, parameters)}
_INPUTS = ("q", "k", "v", "g", "beta")


def _there(problem: Problem, buffers: dict, given: dict[str, bool]) -> dict[str, str | None]:
    """Return what kernels may point to: inputs, what is given and wanted, and buffers with their dtypes."""
    optional = {"A_log": problem.A_log, "dt_bias": problem.dt_bias, "cu_seqlens": problem.packed}
    optional |= {"initial": problem.initial, **given}
    tensors = (*_INPUTS, *(x for x, is_there in optional.items() if is_there))
    return dict.fromkeys(tensors) | {name: dtype for name, (dtype, _) in buffers.items()}


def _launch(name: str, problem: Problem, config: ChunkTritonConfig, target: Target, there: dict) -> Launch:
    kernel, BV, slots = _KERNELS[name], min(config.value_tile, tile_of(problem.V)), problem.spans(CHUNK)
    unread = ("A", "q_before") if name == "replay" and "o" not in there else ()
    sizes = {x: getattr(problem, x) for x in ("H", "HV", "K", "V", "BK")}
    flags = {"L2NORM": problem.l2norm, "GATE": problem.gate, "SIGMOID": problem.sigmoid, "V_FIRST": problem.v_first}
    stored = product_dtype(problem.dtype)
    rounding = {
        "OPERAND": OPERANDS[stored],
        "EXACT": "tf32x3" if narrow(problem.dtype) and target.tf32 else "ieee",
        "PRODUCTS": "ieee" if stored == problem.dtype or not target.tf32 else "tf32",
        "TREE": OPERANDS[problem.dtype],
        "PRECISION": inverse_precision(problem, target),
        "APPROXIMATE": narrow(problem.dtype) and target.nvidia,
    }
    programs = {"within": slots * problem.HV, "token_gradients": slots * problem.H, "parameters": problem.HV}
    walks = problem.N * problem.HV * -(-problem.V // BV)
    tiles, chosen = _tiles(name, problem, config, BV)
    return Launch(
        name=name,
        kernel=kernel,
        programs=programs.get(name, walks),
        buffers=tuple(x for x in kernel.arg_names if x in there and x not in unread),
        constants=sizes | flags | rounding | {"C": CHUNK, "LEVELS": CHUNK.bit_length() - 1} | tiles,
        options=chosen,
        dtypes={x: dtype for x, dtype in there.items() if dtype},
    )


def tiling(problem: Problem, target: Target) -> ChunkTritonConfig:
    """Return the forward's default, with the tiles of the walks that the way back needs; float16 is float32 there."""
    config = default_chunk(problem.K, problem.V, problem.dtype, target, CHUNK)
    if narrow(problem.dtype):
        config = replace(config, **_WALKS.get((family(target), problem.BK), {}))
    if problem.dtype == "float16":
        warps = {"intra_warps": max(4, config.intra_warps), "walk_warps": max(4, config.walk_warps)}
        config = replace(config, value_tile=min(32, config.value_tile), **warps)
    return config


def saving_tiling(problem: Problem, target: Target) -> ChunkTritonConfig:
    """Return the default of a forward that saves."""
    config = replace(tiling(problem, target), saves=True)
    value_tile, warps, stages = _SAVING_WALKS.get(
        (family(target), problem.dtype, problem.BK), (config.value_tile, config.walk_warps, config.walk_stages)
    )
    return replace(config, value_tile=value_tile, walk_warps=warps, walk_stages=stages)


def _tiles(name: str, problem: Problem, config, BV: int) -> tuple[dict, dict]:
    """Return the tiles of a kernel and its options."""
    if name == "within":
        chosen = options(config.intra_warps, config.intra_stages, config.intra_registers)
        return {"CONTIGUITY": config.intra_contiguity}, chosen
    if name == "token_gradients":
        # the sums over a group of value heads take registers of their own
        grouped = problem.H < problem.HV
        tiles = {"CONTIGUITY": 4 if grouped and problem.dtype == "bfloat16" else 8, "BV": min(32, BV)}
        return tiles, options(min(8, problem.BK // 16), 1 if grouped else 2)
    if name == "parameters":
        return {"ROWS": SUMMED_ROWS}, options(4, 2)
    chosen = options(config.walk_warps, config.walk_stages, config.walk_registers)
    return {"CONTIGUITY": config.walk_contiguity, "BV": BV}, chosen


def _plan_of(problem: Problem, wanted: Wanted, device, saved: bool) -> Plan:
    return plan(problem, wanted, target_of(device), saved)


adjoint = backward_of(_plan_of, SAVED)
