"""A small recurrent KDA kernel in Triton with the signature of FLA's chunk_kda, and a copy with one fault.

One program per sequence and value head; K and V are padded to the next powers of two of at least 2.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _walk(
    q, k, v, g, beta, S0, o, S, bounds, scale, T, H, HV, K, V, BK: tl.constexpr, BV: tl.constexpr, HALVED: tl.constexpr
):
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_S = (i_n * HV + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_S = tl.load(S0 + p_S, mask=m_S, other=0.0)
    for t in range(start, stop):
        p_k = (t * H + i_h // (HV // H)) * K + o_k
        b_k = tl.load(k + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_k, mask=m_k, other=0.0).to(tl.float32) * scale
        b_g = tl.load(g + (t * HV + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + (t * HV + i_h) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_beta = tl.load(beta + t * HV + i_h).to(tl.float32)
        if HALVED and t - start == 9:
            b_beta = b_beta * 0.5
        b_S = b_S * tl.exp(b_g)[:, None]
        b_v = b_v - tl.sum(b_S * b_k[:, None], 0)
        b_S += (b_beta * b_k)[:, None] * b_v[None, :]
        tl.store(o + (t * HV + i_h) * V + o_v, tl.sum(b_S * b_q[:, None], 0), mask=m_v)
    tl.store(S + p_S, b_S, mask=m_S)


def recurrent(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    halved=False,
):
    """Run KDA token by token in float32; with `halved` the tenth token of a sequence writes half of what it should."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    bounds = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens
    N = bounds.shape[0] - 1
    o, S = torch.empty_like(v), q.new_empty(N, HV, K, V, dtype=torch.float32)
    S0 = torch.zeros_like(S) if initial_state is None else initial_state.float().contiguous()
    scale = K**-0.5 if scale is None else scale
    sizes = {"BK": max(2, triton.next_power_of_2(K)), "BV": max(2, triton.next_power_of_2(V))}
    _walk[(N, HV)](q, k, v, g, beta, S0, o, S, bounds, scale, T, H, HV, K, V, **sizes, HALVED=halved)
    return o, S if output_final_state else None


def wrong_tenth(q, k, v, g, beta, **keywords):
    """The tenth token of each sequence writes half of what it should."""
    return recurrent(q, k, v, g, beta, halved=True, **keywords)
