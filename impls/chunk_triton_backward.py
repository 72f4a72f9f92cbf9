"""Differentiate Kimi Delta Attention chunk by chunk in Triton: the adjoint of `impls.chunk_triton`, written by hand.

    states      one program per sequence, value head and tile of value channels: forward over the chunks; stores the
                states that enter each
    walk_back   the same grid, the last chunk first: stores dv and the gradients of the states that leave each chunk
    gradients   one program per chunk and value head: dq, dk, dg, dbeta, summed over the tiles of value channels

What a chunk is without a state is computed again in each (the equations are those of `impls.tree_backward_torch`), so
nothing is saved but the inputs. No atomics: every sum has one order. Decays are only multiplied: any gate is safe.
Inputs are activated already, and sequences equally long; nothing calls this yet but its tests.
"""

import torch
import triton
import triton.language as tl

from impls.configs import SMALLEST_TILE
from impls.tree_triton import inverse, merge, tree

CHUNK = 16
VALUE_TILE = 64


@triton.jit
def rows(x, first, length, stride, width: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, start):
    """Load rows [C, BW] in float32, columns `start` onwards of `width`, zero where there are none."""
    o_c, o_w = tl.arange(0, C), start + tl.arange(0, BW)
    mask = (o_c < length)[:, None] & (o_w < width)[None, :]
    return tl.load(x + first + o_c[:, None] * stride + o_w[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put_rows(x, b, first, length, stride, width: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, start):
    """Store what `rows` loads."""
    o_c, o_w = tl.arange(0, C), start + tl.arange(0, BW)
    mask = (o_c < length)[:, None] & (o_w < width)[None, :]
    tl.store(x + first + o_c[:, None] * stride + o_w[None, :], b.to(x.dtype.element_ty), mask=mask)


@triton.jit
def state_places(K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, start):
    """Return the offsets [BK, BV] of a tile of a state [K, V], columns `start` onwards, and which of them there are."""
    o_k, o_v = tl.arange(0, BK), start + tl.arange(0, BV)
    return o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@triton.jit
def chunk_of(
    q, k, g, beta, i_n, i_h, i_c, T, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr,
):
    """Return row `first` of a chunk [int64], its tokens, and its q, k, alpha [C, BK] and beta [C] in float32."""
    first = i_n.to(tl.int64) * T + i_c * C
    length = T - i_c * C
    of_q = (first * H + i_h // (HV // H)) * K
    b_q, b_k = rows(q, of_q, length, H * K, K, C, BK, 0), rows(k, of_q, length, H * K, K, C, BK, 0)
    b_alpha = tl.exp(rows(g, (first * HV + i_h) * K, length, HV * K, K, C, BK, 0))
    o_c = tl.arange(0, C)
    b_beta = tl.load(beta + (first + o_c) * HV + i_h, mask=o_c < length, other=0.0).to(tl.float32)
    return first, length, b_q, b_k, b_alpha, b_beta


@triton.jit
def times(a, b):
    """Return a b, summed in float32 and multiplied in it."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def states(
    q, k, v, g, beta, S0, kept, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_STATE: tl.constexpr,
):
    """Store the states [B, chunks, HV, K, V] in float32 that enter the chunks."""
    i_n, i_h, start = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.program_id(1) * BV
    o_s, mask = state_places(K, V, BK, BV, start)
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        b_S += tl.load(S0 + (i_n * HV + i_h).to(tl.int64) * K * V + o_s, mask=mask, other=0.0).to(tl.float32)
    for i_c in range(chunks):
        first, length, b_q, b_k, b_alpha, b_beta = chunk_of(q, k, g, beta, i_n, i_h, i_c, T, H, HV, K, C, BK)
        tl.store(kept + ((i_n.to(tl.int64) * chunks + i_c) * HV + i_h) * K * V + o_s, b_S, mask=mask)
        _, L, _, k_before, k_after, total = tree(b_q, b_k, b_alpha, C, BK, LEVELS, tl.float32)
        X = inverse(L * b_beta[:, None], C, LEVELS, "ieee")
        b_v = rows(v, (first * HV + i_h) * V, length, HV * V, V, C, BV, start)
        delta = times(X, b_beta[:, None] * (b_v - times(k_before, b_S)))
        b_S = b_S * tl.trans(total) + times(tl.trans(k_after), delta)


@triton.jit
def walk_back(
    q, k, g, beta, do, dS, dv, left, dS0, scale, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_DO: tl.constexpr, HAS_DS: tl.constexpr,
):
    """Store dv, and the gradients [B, chunks, HV, K, V] of the states that leave the chunks and of the initial ones."""
    i_n, i_h, start = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.program_id(1) * BV
    o_s, mask = state_places(K, V, BK, BV, start)
    of_state = (i_n * HV + i_h).to(tl.int64) * K * V + o_s
    b_dS = tl.zeros([BK, BV], tl.float32)
    if HAS_DS:
        b_dS += tl.load(dS + of_state, mask=mask, other=0.0).to(tl.float32)
    for back in range(chunks):
        i_c = chunks - 1 - back
        first, length, b_q, b_k, b_alpha, b_beta = chunk_of(q, k, g, beta, i_n, i_h, i_c, T, H, HV, K, C, BK)
        tl.store(left + ((i_n.to(tl.int64) * chunks + i_c) * HV + i_h) * K * V + o_s, b_dS, mask=mask)
        A, L, q_before, k_before, k_after, total = tree(b_q, b_k, b_alpha, C, BK, LEVELS, tl.float32)
        X = inverse(L * b_beta[:, None], C, LEVELS, "ieee")
        of_v, d_delta = (first * HV + i_h) * V, times(k_after, b_dS)
        if HAS_DO:
            b_do = scale * rows(do, of_v, length, HV * V, V, C, BV, start)
            d_delta += times(tl.trans(A), b_do)
        dr = b_beta[:, None] * times(tl.trans(X), d_delta)
        put_rows(dv, dr, of_v, length, HV * V, V, C, BV, start)
        b_dS = b_dS * tl.trans(total) - times(tl.trans(k_before), dr)
        if HAS_DO:
            b_dS += times(tl.trans(q_before), b_do)
    tl.store(dS0 + of_state, b_dS, mask=mask)


@triton.jit
def gate_sums(to_before, to_after, n: tl.constexpr, C: tl.constexpr):
    """Return what each gate gets of groups of 2^n tokens: sums over its own and later rows, and over earlier ones."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    same = (row >> n) == (column >> n)
    of_before = times(tl.where(same & (column >= row), 1.0, 0.0), to_before)
    return of_before + times(tl.where(same & (column < row), 1.0, 0.0), to_after)


@triton.jit
def level_gradients(b_q, b_k, b_alpha, dA, dL, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr):
    """Return what the levels give to dq, dk, dg [C, BK], and `before` and `after` of the whole chunk."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    diagonal = tl.sum(tl.where(row == column, dA, 0.0), 1)[:, None]
    dq, dk, dg = diagonal * b_k, diagonal * b_q, tl.zeros([C, BK], tl.float32)
    before, after, total = b_alpha, tl.full([C, BK], 1.0, tl.float32), b_alpha
    for n in tl.static_range(LEVELS):
        pair = ((row >> (n + 1)) == (column >> (n + 1))) & ((row >> n) > (column >> n))
        of_A, of_L = tl.where(pair, dA, 0.0), tl.where(pair, dL, 0.0)
        q_late, k_late, early = b_q * before, b_k * before, b_k * after
        dq_late, dk_late = times(of_A, early), times(of_L, early)
        d_early = times(tl.trans(of_A), q_late) + times(tl.trans(of_L), k_late)
        dq, dk = dq + dq_late * before, dk + dk_late * before + d_early * after
        dg += gate_sums(dq_late * q_late + dk_late * k_late, d_early * early, n, C)
        before, _, after, total = merge(before, before, after, total, C >> (n + 1), 1 << n, BK)
    return dq, dk, dg, before, after


@triton.jit
def gradients(
    q, k, v, g, beta, do, kept, left, dq, dk, dg, dbeta, scale, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_DO: tl.constexpr,
):
    """Store dq, dk, dg [B, T, HV, K] and dbeta [B, T, HV] of one chunk and value head."""
    i_c, i_h, i_n = tl.program_id(0) % chunks, tl.program_id(0) // chunks % HV, tl.program_id(0) // chunks // HV
    first, length, b_q, b_k, b_alpha, b_beta = chunk_of(q, k, g, beta, i_n, i_h, i_c, T, H, HV, K, C, BK)
    A, L, q_before, k_before, k_after, total = tree(b_q, b_k, b_alpha, C, BK, LEVELS, tl.float32)
    X = inverse(L * b_beta[:, None], C, LEVELS, "ieee")
    dA, dL = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    of_q, of_k, of_early = (tl.zeros([C, BK], tl.float32),) * 3
    b_dbeta, to_total = tl.zeros([C], tl.float32), tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        o_s, mask = state_places(K, V, BK, BV, start)
        of_state = ((i_n.to(tl.int64) * chunks + i_c) * HV + i_h) * K * V + o_s
        b_S, b_dS = tl.load(kept + of_state, mask=mask, other=0.0), tl.load(left + of_state, mask=mask, other=0.0)
        of_v, d_delta = (first * HV + i_h) * V, times(k_after, b_dS)
        residual = rows(v, of_v, length, HV * V, V, C, BV, start) - times(k_before, b_S)
        delta = times(X, b_beta[:, None] * residual)
        if HAS_DO:
            b_do = scale * rows(do, of_v, length, HV * V, V, C, BV, start)
            d_delta += times(tl.trans(A), b_do)
            dA += times(b_do, tl.trans(delta))
            of_q += times(b_do, tl.trans(b_S))
        y = times(tl.trans(X), d_delta)
        dr = b_beta[:, None] * y
        dL -= times(dr, tl.trans(delta))
        of_k -= times(dr, tl.trans(b_S))
        of_early += times(delta, tl.trans(b_dS))
        b_dbeta += tl.sum(y * (residual - times(L, delta)), 1)
        to_total += tl.sum(b_S * b_dS, 1)
    b_dq, b_dk, b_dg, before, after = level_gradients(b_q, b_k, b_alpha, dA, dL, C, BK, LEVELS)
    last = tl.arange(0, C)[:, None] == C - 1
    to_before = of_q * q_before + of_k * k_before + tl.where(last, to_total[None, :] * total, 0.0)
    b_dg += gate_sums(to_before, of_early * k_after, LEVELS, C)
    b_dq, b_dk = b_dq + of_q * before, b_dk + of_k * before + of_early * after
    of_row, stride = (first * HV + i_h) * K, HV * K
    put_rows(dq, b_dq, of_row, length, stride, K, C, BK, 0)
    put_rows(dk, b_dk, of_row, length, stride, K, C, BK, 0)
    put_rows(dg, b_dg, of_row, length, stride, K, C, BK, 0)
    o_c = tl.arange(0, C)
    tl.store(dbeta + (first + o_c) * HV + i_h, b_dbeta.to(dbeta.dtype.element_ty), mask=o_c < length)


def adjoint(q, k, v, g, beta, initial_state, scale, do, dS):
    """Return the gradients of <do, o> + <dS, S_T> for q, k, v, g, beta and the initial state (zeros' where None).

    q, k [B, T, H, K], v, do [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV], states [B, HV, K, V], all contiguous and
    activated; do and dS count as zero where None. Results are in the dtypes of the inputs, dS0 in float32.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    BK, BV = (max(SMALLEST_TILE, triton.next_power_of_2(x)) for x in (K, min(V, VALUE_TILE)))
    chunks, tiles = triton.cdiv(T, CHUNK), triton.cdiv(V, BV)
    kept, left = (q.new_empty((B, chunks, HV, K, V), dtype=torch.float32) for _ in range(2))
    dv, dg, dbeta = (torch.empty_like(x) for x in (v, g, beta))
    dq, dk = (q.new_empty((B, T, HV, K), dtype=torch.float32) for _ in range(2))
    dS0 = q.new_empty((B, HV, K, V), dtype=torch.float32)
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "C": CHUNK, "LEVELS": CHUNK.bit_length() - 1, "BK": BK, "BV": BV}
    has = {"HAS_DO": do is not None}
    grid, asked = (B * HV, tiles), (T, chunks)
    states[grid](q, k, v, g, beta, initial_state, kept, *asked, HAS_STATE=initial_state is not None, **sizes)
    walk_back[grid](q, k, g, beta, do, dS, dv, left, dS0, scale, *asked, HAS_DS=dS is not None, **has, **sizes)
    if chunks:
        gradients[(B * HV * chunks,)](
            q, k, v, g, beta, do, kept, left, dq, dk, dg, dbeta, scale, *asked, **has, **sizes
        )
    dq, dk = (x.view(B, T, H, HV // H, K).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dS0
