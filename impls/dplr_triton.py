"""Run general DPLR chunk by chunk in Triton, in the tree form, forward: two launches, as `impls.chunk_triton`.

    intra   one program per chunk and head: the tree with four products a level instead of two, the inverse; stores
            A_qk, A_qa, A_bk, X, q', b', k', a' and the chunk's decay, with the meaning of `impls.dplr_torch`
    walk    one program per sequence, head and tile of value channels: chunk after chunk, the state in registers

            x = X (b' S + A_bk v)      o = scale (q' S + A_qk v - A_qa x)      S <- total S + k'^T v - a'^T x
"""

import functools

import torch
import triton
import triton.language as tl

from impls.activations_triton import LOG2E, exp2
from impls.checks import DTYPE_NAMES
from impls.chunk_triton import OPERANDS, load_rows, store_rows, store_square
from impls.configs import DplrTritonConfig
from impls.defaults import default_dplr
from impls.dplr_checks import Dplr
from impls.footprint import unfit
from impls.launcher import check_interpreter, contiguous, run_plan
from impls.layout_triton import bounds, first_slot, inside, owner, state_offsets, tile
from impls.plan import Launch, Plan, Problem, narrow, options, tile_of
from impls.targets import Target
from impls.targets import of as target_of
from impls.tree_triton import halves, inverse, spread, weave


@triton.jit
def late_rows(x, M: tl.constexpr, s: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr):
    """Return the late halves of x [C, BK] as one operand [C / 2, BK]."""
    _, late = halves(x, M, s, BK)
    return tl.reshape(late, (C // 2, BK)).to(OPERAND)


@triton.jit
def early_rows(x, M: tl.constexpr, s: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr):
    """Return the early halves of x [C, BK] as one operand [C / 2, BK]."""
    early, _ = halves(x, M, s, BK)
    return tl.reshape(early, (C // 2, BK)).to(OPERAND)


@triton.jit
def stacked(x, y, C: tl.constexpr, BK: tl.constexpr):
    """Return x above y, [C / 2, BK] each."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (C, BK))


@triton.jit
def decay_late(x, early_total, M: tl.constexpr, s: tl.constexpr, BK: tl.constexpr):
    """Return rows x [C, BK] whose late halves are multiplied by the decay of the early ones [M, BK]."""
    early, late = halves(x, M, s, BK)
    return weave(early, late * early_total[:, None, :], M, s, BK)


@triton.jit
def decay_early(x, late_total, M: tl.constexpr, s: tl.constexpr, BK: tl.constexpr):
    """Return rows x [C, BK] whose early halves are multiplied by the decay of the late ones [M, BK]."""
    early, late = halves(x, M, s, BK)
    return weave(early * late_total[:, None, :], late, M, s, BK)


@triton.jit
def quarters(P, C: tl.constexpr):
    """Split P [C, C] of stacked rows q, b and stacked columns k, a into q k, q a, b k, b a, [C / 2, C / 2] each."""
    of_q, of_b = tl.split(tl.permute(tl.reshape(P, (2, C // 2, C)), (1, 2, 0)))
    qk, qa = tl.split(tl.permute(tl.reshape(of_q, (C // 2, 2, C // 2)), (0, 2, 1)))
    bk, ba = tl.split(tl.permute(tl.reshape(of_b, (C // 2, 2, C // 2)), (0, 2, 1)))
    return qk, qa, bk, ba


@triton.jit
def on_diagonal(x, y, C: tl.constexpr, OPERAND: tl.constexpr):
    """Return diag(x y^T) [C, C] of rows [C, BK]."""
    o_c = tl.arange(0, C)
    P = tl.dot(x.to(OPERAND), tl.trans(y.to(OPERAND)), input_precision="ieee")
    return tl.where(o_c[:, None] == o_c[None, :], P, 0.0)


@triton.jit
def level_of_four(
    of_q, of_b, of_k, of_a, n: tl.constexpr, M: tl.constexpr, s: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):
    """Return what merging groups of s = 2^n tokens adds to A_qk, A_qa, A_bk and A_ba [C, C]."""
    late = stacked(late_rows(of_q, M, s, C, BK, OPERAND), late_rows(of_b, M, s, C, BK, OPERAND), C, BK)
    early = stacked(early_rows(of_k, M, s, C, BK, OPERAND), early_rows(of_a, M, s, C, BK, OPERAND), C, BK)
    P = tl.dot(late, tl.trans(early), input_precision="ieee")
    pair = (tl.arange(0, C) % (C // 2)) >> n
    qk, qa, bk, ba = quarters(tl.where(pair[:, None] == pair[None, :], P, 0.0), C)
    return spread(qk, C, M, s), spread(qa, C, M, s), spread(bk, C, M, s), spread(ba, C, M, s)


@triton.jit
def merge_four(of_q, of_b, of_k, of_a, total, M: tl.constexpr, s: tl.constexpr, BK: tl.constexpr):
    """Merge groups of s tokens two by two: rows [C, BK] and totals [C / s, BK] of groups twice as long."""
    early, late = tl.split(tl.permute(tl.reshape(total, (M, 2, BK)), (0, 2, 1)))
    of_q, of_b = decay_late(of_q, early, M, s, BK), decay_late(of_b, early, M, s, BK)
    return of_q, of_b, decay_early(of_k, late, M, s, BK), decay_early(of_a, late, M, s, BK), early * late


@triton.jit
def tree_of_four(q, k, a, b, alpha, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr):
    """Return A_qk, A_qa, A_bk, A_ba [C, C], q', b', k', a' [C, BK] and the total decay [1, BK] of a chunk."""
    qk, qa = on_diagonal(q, k, C, OPERAND), on_diagonal(q, a, C, OPERAND)
    bk, ba = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    of_q, of_b, of_k, of_a, total = q * alpha, b, k, a, alpha
    for n in tl.static_range(LEVELS):
        more_qk, more_qa, more_bk, more_ba = level_of_four(
            of_q, of_b, of_k, of_a, n, C >> (n + 1), 1 << n, C, BK, OPERAND
        )
        qk, qa, bk, ba = qk + more_qk, qa + more_qa, bk + more_bk, ba + more_ba
        of_q, of_b, of_k, of_a, total = merge_four(of_q, of_b, of_k, of_a, total, C >> (n + 1), 1 << n, BK)
    return qk, qa, bk, ba, of_q, of_b, of_k, of_a, total


@triton.jit
def rows_of(x, of_x, mask):
    """Load rows in float32, 0 behind the last one."""
    return tl.load(x + of_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N"])
def intra(
    q, k, a, b, g, cu_seqlens, A_qk, A_qa, A_bk, X, q_before, b_before, k_after, a_after, last, T, N,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Work on one chunk of one head: climb the tree, invert; store what the walk needs."""
    program = tl.program_id(0).to(tl.int64)
    slot, i_h = program // H, (program % H).to(tl.int32)
    i_n = owner(cu_seqlens, slot, T, N, C)
    first, length = bounds(cu_seqlens, i_n, T)
    begin = (slot - first_slot(cu_seqlens, i_n, T, C)) * C
    first, length = first + begin, (length - begin).to(tl.int32)
    if length <= 0:
        return
    i_c, o_c, o_k = slot * H + i_h, tl.arange(0, C), tl.arange(0, BK)
    mask = inside(o_c, length, o_k, K, K == BK)
    of_x = (first * H + i_h) * K + tile(o_c, o_k, H * K, CONTIGUITY)
    b_q, b_k, b_a, b_b = rows_of(q, of_x, mask), rows_of(k, of_x, mask), rows_of(a, of_x, mask), rows_of(b, of_x, mask)
    alpha = exp2(rows_of(g, of_x, mask) * LOG2E, APPROXIMATE, False)
    qk, qa, bk, ba, of_q, of_b, of_k, of_a, total = tree_of_four(b_q, b_k, b_a, b_b, alpha, C, BK, LEVELS, OPERAND)
    store_square(A_qk, qk, i_c, 0, 0, C, C)
    store_square(A_qa, qa, i_c, 0, 0, C, C)
    store_square(A_bk, bk, i_c, 0, 0, C, C)
    store_rows(q_before, of_q, i_c, K, BK, C, CONTIGUITY)
    store_rows(b_before, of_b, i_c, K, BK, C, CONTIGUITY)
    store_rows(k_after, of_k, i_c, K, BK, C, CONTIGUITY)
    store_rows(a_after, of_a, i_c, K, BK, C, CONTIGUITY)
    tl.store(last + i_c * K + o_k, tl.reshape(total, (BK,)), mask=o_k < K)
    store_square(X, inverse(ba, C, LEVELS, PRECISION), i_c, 0, 0, C, C)


@triton.jit(do_not_specialize=["T"])
def walk(
    q_before, b_before, k_after, a_after, last, v, A_qk, A_qa, A_bk, X, cu_seqlens, initial, o, final, T, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OPERAND: tl.constexpr, CONTIGUITY: tl.constexpr,
):
    """Walk over the chunks of one sequence with BV columns of one head's state, transposed: S [BV, BK]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    EVEN_K: tl.constexpr = K == BK
    EVEN_V: tl.constexpr = V % BV == 0
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % TILES).to(tl.int32), (program // TILES % H).to(tl.int32), program // (TILES * H)
    first, length = bounds(cu_seqlens, i_n, T)
    length = length.to(tl.int32)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    of_state, m_state = state_offsets(i_n * H + i_h, o_v, o_k, K, V, False), inside(o_v, V, o_k, K, EVEN_K)
    S = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        S = tl.load(initial + of_state, mask=m_state, other=0.0).to(tl.float32)
    i_c = first_slot(cu_seqlens, i_n, T, C) * H + i_h
    of_v, of_c = tile(o_c, o_v, H * V, CONTIGUITY), o_c[:, None] * C + o_c[None, :]
    v, o = v + (first * H + i_h) * V, o + (first * H + i_h) * V
    next_v = tl.load(v + of_v, mask=inside(o_c, length, o_v, V, EVEN_V), other=0.0)
    next_total = tl.load(last + i_c * K + o_k, mask=(o_k < K) & (length > 0), other=0.0)
    for i_t in range(0, (length + C - 1) // C):
        rest, b_v, decay = length - i_t * C, tl.trans(next_v), next_total[None, :]
        v += C * H * V
        next_v = tl.load(v + of_v, mask=inside(o_c, rest - C, o_v, V, EVEN_V), other=0.0)
        next_total = tl.load(last + (i_c + H) * K + o_k, mask=(o_k < K) & (rest > C), other=0.0)
        bb, ka = load_rows(b_before, i_c, K, BK, C, CONTIGUITY), load_rows(k_after, i_c, K, BK, C, CONTIGUITY)
        qb, aa = load_rows(q_before, i_c, K, BK, C, CONTIGUITY), load_rows(a_after, i_c, K, BK, C, CONTIGUITY)
        b_X, bk = tl.load(X + i_c * (C * C) + of_c), tl.load(A_bk + i_c * (C * C) + of_c)
        operand = S.to(OPERAND)
        x = tl.dot(b_v, tl.trans(bk), tl.dot(operand, tl.trans(bb), input_precision="ieee"), input_precision="ieee")
        b_o = tl.dot(operand, tl.trans(qb), input_precision="ieee")
        x = tl.dot(x.to(OPERAND), tl.trans(b_X), input_precision="ieee").to(OPERAND)
        # the next chunk waits for the state, nothing waits for the outputs
        S = tl.dot(b_v, ka, S * decay, input_precision="ieee") - tl.dot(x, aa, input_precision="ieee")
        qk, qa = tl.load(A_qk + i_c * (C * C) + of_c), tl.load(A_qa + i_c * (C * C) + of_c)
        b_o = tl.dot(b_v, tl.trans(qk), b_o, input_precision="ieee") - tl.dot(x, tl.trans(qa), input_precision="ieee")
        tl.store(o + of_v, tl.trans(b_o * scale).to(o.dtype.element_ty), mask=inside(o_c, rest, o_v, V, EVEN_V))
        o += C * H * V
        i_c += H
    if final is not None:
        tl.store(final + of_state, S, mask=m_state)


SQUARES, ROWS = ("A_qk", "A_qa", "A_bk", "X"), ("q_before", "b_before", "k_after", "a_after")


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, config: DplrTritonConfig, target: Target) -> Plan:
    """Return the two launches and the workspace of one call."""
    C, chunks = config.chunk_size, (problem.spans(config.chunk_size), problem.HV)
    BV = min(config.value_tile, tile_of(problem.V))
    workspace = dict.fromkeys(SQUARES, (problem.dtype, (*chunks, C, C)))
    workspace |= dict.fromkeys(ROWS, (problem.dtype, (*chunks, C, problem.K)))
    workspace["last"] = ("float32", (*chunks, problem.K))
    packing = ("cu_seqlens",) if problem.packed else ()
    optional = (*packing, *(name for name in ("initial", "final") if getattr(problem, name)))
    common = {"H": problem.HV, "K": problem.K, "BK": problem.BK, "C": C, "OPERAND": OPERANDS[problem.dtype]}
    first = Launch(
        name="intra",
        kernel=intra,
        programs=problem.spans(C) * problem.HV,
        buffers=("q", "k", "a", "b", "g", *packing, *workspace),
        constants=common | {
            "LEVELS": C.bit_length() - 1,
            "PRECISION": "tf32x3" if narrow(problem.dtype) and target.tf32 else "ieee",
            "APPROXIMATE": narrow(problem.dtype) and target.nvidia,
            "CONTIGUITY": config.intra_contiguity,
        },
        options=options(config.intra_warps, config.intra_stages, config.intra_registers),
    )  # fmt: skip
    second = Launch(
        name="walk",
        kernel=walk,
        programs=problem.N * problem.HV * -(-problem.V // BV),
        buffers=("v", "o", *workspace, *optional),
        constants=common | {"V": problem.V, "BV": BV, "CONTIGUITY": config.walk_contiguity},
        options=options(config.walk_warps, config.walk_stages, config.walk_registers),
    )
    return Plan((first, second), workspace)


def dplr_triton(
    call: Dplr, chunk_size: int | None = None, config: DplrTritonConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o [B, T, H, V] in v's dtype and the states [N, H, K, V] in float32: see `impls.dplr`.

    Raises ValueError for a configuration that the device has too little shared memory for, with what would fit.
    """
    q, k, v, a, b, g = call.tokens
    if q.dtype == torch.float64:
        raise TypeError("q must be float32, bfloat16 or float16 for dplr_triton, got float64")
    check_interpreter(q)
    (B, T, H, K), V, packed = q.shape, v.shape[3], call.cu_seqlens is not None
    N = call.cu_seqlens.shape[0] - 1 if packed else B
    problem = Problem(
        B=B, T=T, N=N, H=H, HV=H, K=K, V=V, dtype=DTYPE_NAMES[q.dtype], packed=packed,
        initial=call.initial_state is not None, final=True,
    )  # fmt: skip
    target = target_of(q.device)
    config = config or default_dplr(K, V, problem.dtype, target, chunk_size)
    if reason := unfit(config, K, V, problem.dtype, target):
        raise ValueError(reason)
    made = plan(problem, config, target)
    given = contiguous(q=q, k=k, v=v, a=a, b=b, g=g, initial=call.initial_state, cu_seqlens=call.cu_seqlens)
    outputs = {"o": v.new_empty(v.shape), "final": v.new_empty((N, H, K, V), dtype=torch.float32)}
    run_plan(made, given | outputs, {"T": T, "N": N, "scale": call.scale}, v)
    return outputs["o"], outputs["final"]
