"""Run Kimi Delta Attention chunk by chunk in Triton, in the tree form: two launches for any gate.

    intra   one program per chunk and value head: activations, the tree of `impls.tree_triton`, the inverse; stores
            A, X diag(beta), q before, k before, k after, and the chunk's decay
    walk    one program per sequence, value head and tile of value channels: chunk after chunk, the state in registers

            delta = X diag(beta) (v - (k before) S)     o = scale ((q before) S + A delta)
            S <- total S + (k after)^T delta

For few heads and long sequences the walk is cut into segments that run at the same time, in four launches: `walk` as a
summary of every segment (where it leaves a zero state, and its transition), `combine` to the states that enter the
segments, and `walk` again from those.
"""

import functools

import torch
import triton
import triton.language as tl

from impls.call import call_raw
from impls.checks import DTYPE_NAMES, wants_gradient
from impls.choice import chunk_triton_config, chunk_triton_launch, tuned_chunk_triton
from impls.chunk_triton_backward import CHUNK as SAVED_CHUNK
from impls.chunk_triton_backward import SAVED, adjoint, buffer_dtype, buffer_shapes, saving_plan, saving_tiling
from impls.configs import ChunkTritonConfig
from impls.defaults import CHUNK
from impls.launcher import forward_of
from impls.layout_triton import bounds, first_slot, inside, owner, spans_before, state_offsets, tile
from impls.plan import Launch, Plan, Problem, inverse_precision, narrow, options, tile_of
from impls.registration import register_raw, register_raw_backward, register_raw_trained
from impls.rows_triton import activated, load_rows, store_rows, store_square, worked
from impls.targets import Target
from impls.targets import of as target_of
from impls.tree_triton import decayed, inverse


@triton.jit(do_not_specialize=["T", "N"])
def intra(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, A, X, q_before, k_before, k_after, last, T, N, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    LEVELS: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr, RECOMPUTE: tl.constexpr,
):
    """Work on one chunk of one value head: activate, climb the tree, invert; store what the walk needs."""
    program = tl.program_id(0).to(tl.int64)
    slot, i_h = program // HV, (program % HV).to(tl.int32)
    i_n = owner(cu_seqlens, slot, T, N, C)
    first, length = bounds(cu_seqlens, i_n, T)
    begin = (slot - first_slot(cu_seqlens, i_n, T, C)) * C
    first, length = first + begin, (length - begin).to(tl.int32)
    if length <= 0:
        return
    i_c, o_k = slot * HV + i_h, tl.arange(0, BK)
    M: tl.constexpr = C // TILES
    A0, L0, beta0, qb, kb, ka, total = worked(
        q, k, g, beta, A_log, dt_bias, lower_bound, first, length, i_h, H, HV, K, BK, M, LEVELS,
        L2NORM, GATE, SIGMOID, OPERAND, APPROXIMATE, CONTIGUITY,
    )
    store_square(A, A0, i_c, 0, 0, C, M)
    if not RECOMPUTE:
        store_rows(q_before, qb, i_c * TILES, K, BK, M, CONTIGUITY)
        store_rows(k_before, kb, i_c * TILES, K, BK, M, CONTIGUITY)
        if TILES == 1:
            store_rows(k_after, ka, i_c, K, BK, M, CONTIGUITY)
            tl.store(last + i_c * K + o_k, tl.reshape(total, (BK,)), mask=o_k < K)
    X0 = inverse(L0, M, LEVELS, PRECISION)
    store_square(X, X0 * beta0[None, :], i_c, 0, 0, C, M)
    if TILES == 2:
        # the early tile's k after, in the operands' format, is what waits in registers
        k_early, early = ka.to(OPERAND), total
        A1, L1, beta1, qb, kb, ka, total = worked(
            q, k, g, beta, A_log, dt_bias, lower_bound, first + M, length - M, i_h, H, HV, K, BK, M, LEVELS,
            L2NORM, GATE, SIGMOID, OPERAND, APPROXIMATE, CONTIGUITY,
        )
        late = tl.reshape(tl.permute(tl.join(qb.to(OPERAND), kb.to(OPERAND)), (2, 0, 1)), (C, BK))
        P = tl.dot(late, tl.trans(k_early), input_precision="ieee")
        if not RECOMPUTE:
            store_rows(q_before, qb * early, i_c * 2 + 1, K, BK, M, CONTIGUITY)
            store_rows(k_before, kb * early, i_c * 2 + 1, K, BK, M, CONTIGUITY)
            store_rows(k_after, k_early.to(tl.float32) * total, i_c * 2, K, BK, M, CONTIGUITY)
            store_rows(k_after, ka, i_c * 2 + 1, K, BK, M, CONTIGUITY)
            tl.store(last + i_c * K + o_k, tl.reshape(early * total, (BK,)), mask=o_k < K)
        A10, L10 = tl.split(tl.permute(tl.reshape(P, (2, M, M)), (1, 2, 0)))
        X1 = inverse(L1, M, LEVELS, PRECISION)
        X10 = tl.dot(X1, L10 * beta1[:, None], input_precision=PRECISION)
        X10 = -tl.dot(X10, X0, input_precision=PRECISION)
        zero = tl.zeros([M, M], tl.float32)
        store_square(A, A10, i_c, M, 0, C, M)
        store_square(A, A1, i_c, M, M, C, M)
        store_square(A, zero, i_c, 0, M, C, M)
        store_square(X, X10 * beta0[None, :], i_c, M, 0, C, M)
        store_square(X, X1 * beta1[None, :], i_c, M, M, C, M)
        store_square(X, zero, i_c, 0, M, C, M)


@triton.jit(do_not_specialize=["T", "N", "segment", "interval", "kept_rows"])
def walk(
    q_before, k_before, k_after, last, q, k, g, A_log, dt_bias, v, A, X, cu_seqlens, initial, entering, left, o, final,
    kept, T, N, segment, interval, kept_rows, scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, V_FIRST: tl.constexpr, OPERAND: tl.constexpr,
    APPROXIMATE: tl.constexpr, CONTIGUITY: tl.constexpr, RECOMPUTE: tl.constexpr,
):
    """Walk over the chunks of one sequence or segment with BV columns of one head's state, transposed: S [BV, BK].

        delta = X diag(beta) (v - (k before) S)   o = scale ((q before) S + A delta)   S <- total S + (k after)^T delta

    With `entering` it walks over segments, from the states that enter them. With `left` it writes no outputs but where
    a segment leaves a zero state, and behind the V columns of that the K columns of its transition: where it leaves
    the unit vectors without any v.
    """
    SUMMARY: tl.constexpr = left is not None
    SEGMENTED: tl.constexpr = SUMMARY or entering is not None
    VALUES: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = VALUES + (K + BV - 1) // BV if SUMMARY else VALUES
    EVEN_K: tl.constexpr = K == BK
    EVEN_V: tl.constexpr = V % BV == 0 and not SUMMARY
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = (program % TILES).to(tl.int32), (program // TILES % HV).to(tl.int32), program // (TILES * HV)
    i_n, begin = i_s, 0 * program
    if SEGMENTED:
        i_n = owner(cu_seqlens, i_s, T, N, segment)
        begin = (i_s - first_slot(cu_seqlens, i_n, T, segment)) * segment
    first, length = bounds(cu_seqlens, i_n, T)
    length = (length - begin).to(tl.int32)
    leaves = True
    if SEGMENTED:
        leaves = length <= segment
        if (length <= 0 and begin > 0) or (SUMMARY and leaves):
            return
        length = tl.minimum(length, segment)
    first += begin
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    if SUMMARY:
        S = tl.where((o_v - VALUES * BV)[:, None] == o_k[None, :], 1.0, 0.0)
    elif entering is not None:
        of_entering = state_offsets(i_s * HV + i_h, o_v, o_k, K, V, True)
        S = tl.load(entering + of_entering, mask=inside(o_v, V, o_k, K, EVEN_K), other=0.0)
    elif initial is not None:
        of_initial = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
        S = tl.load(initial + of_initial, mask=inside(o_v, V, o_k, K, EVEN_K), other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BV, BK], tl.float32)
    i_c = (first_slot(cu_seqlens, i_n, T, C) + begin // C) * HV + i_h
    of_v, of_c = tile(o_c, o_v, HV * V, CONTIGUITY), o_c[:, None] * C + o_c[None, :]
    v += (first * HV + i_h) * V
    if not SUMMARY:
        o += (first * HV + i_h) * V
    if kept is not None:
        i_kept = spans_before(cu_seqlens, i_n, T, interval)
    # v and the decay are fetched a chunk ahead by hand: the compiler pipelines only what goes into products unchanged
    next_v = tl.load(v + of_v, mask=inside(o_c, length, o_v, V, EVEN_V), other=0.0)
    if not RECOMPUTE:
        next_total = tl.load(last + i_c * K + o_k, mask=(o_k < K) & (length > 0), other=0.0)
    for i_t in range(0, (length + C - 1) // C):
        rest, b_v = length - i_t * C, next_v
        v += C * HV * V
        next_v = tl.load(v + of_v, mask=inside(o_c, rest - C, o_v, V, EVEN_V), other=0.0)
        if RECOMPUTE:
            b_q, b_k, alpha = activated(
                q, k, g, A_log, dt_bias, lower_bound, first + i_t * C, rest, i_h,
                H, HV, K, BK, C, L2NORM, GATE, APPROXIMATE, CONTIGUITY,
            )
            qb, kb, ka, decay = decayed(b_q, b_k, alpha)
            qb, kb, ka = qb.to(OPERAND), kb.to(OPERAND), ka.to(OPERAND)
        else:
            kb, ka = load_rows(k_before, i_c, K, BK, C, CONTIGUITY), load_rows(k_after, i_c, K, BK, C, CONTIGUITY)
            if not SUMMARY:
                qb = load_rows(q_before, i_c, K, BK, C, CONTIGUITY)
            decay = next_total[None, :]
            next_total = tl.load(last + (i_c + HV) * K + o_k, mask=(o_k < K) & (rest > C), other=0.0)
        b_X = tl.load(X + i_c * (C * C) + of_c)
        if kept is not None:
            position = begin + i_t * C
            if position % interval == 0:
                row = i_kept + position // interval
                m_kept = inside(o_v, V, o_k, K, EVEN_K) & (row >= 0) & (row < kept_rows)
                tl.store(kept + state_offsets(row * HV + i_h, o_v, o_k, K, V, V_FIRST), S, mask=m_kept)
        narrow = S.to(OPERAND)
        r = tl.trans(b_v).to(tl.float32) - tl.dot(narrow, tl.trans(kb), input_precision="ieee")
        if not SUMMARY:
            b_o = tl.dot(narrow, tl.trans(qb), input_precision="ieee")
        delta = tl.dot(r.to(OPERAND), tl.trans(b_X), input_precision="ieee").to(OPERAND)
        # the next chunk waits for the state, nothing waits for the outputs
        S = tl.dot(delta, ka, S * decay, input_precision="ieee")
        if not SUMMARY:
            b_A = tl.load(A + i_c * (C * C) + of_c)
            b_o = tl.trans(tl.dot(delta, tl.trans(b_A), b_o, input_precision="ieee") * scale)
            tl.store(o + of_v, b_o.to(o.dtype.element_ty), mask=inside(o_c, rest, o_v, V, EVEN_V))
            o += C * HV * V
        i_c += HV
    if SUMMARY:
        o_s = tl.where(i_v < VALUES, o_v, V + o_v - VALUES * BV)
        of_left = ((i_s * HV + i_h) * (V + K) + o_s[:, None]) * K + o_k[None, :]
        tl.store(left + of_left, S, mask=inside(o_s, tl.where(i_v < VALUES, V, V + K), o_k, K, EVEN_K))
    elif final is not None:  # noqa: SIM102 - what is known when compiling is not mixed with what is not
        if leaves:
            of_final = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
            tl.store(final + of_final, S, mask=inside(o_v, V, o_k, K, EVEN_K))


@triton.jit(do_not_specialize=["T", "N", "segment"])
def combine(
    left, entering, initial, cu_seqlens, T, N, segment,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PIECE: tl.constexpr,
    V_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):
    """Turn what the segments of one sequence leave, and their transitions, into the states that enter them.

        S_0 = initial state,   S_(i+1) = where segment i leaves a zero state + transition_i S_i

    BV columns of one head at a time, transposed; the transition is read in pieces of PIECE rows.
    """
    VALUES: tl.constexpr = (V + BV - 1) // BV
    EVEN_K: tl.constexpr = K == BK
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % VALUES).to(tl.int32), (program // VALUES % HV).to(tl.int32), program // (VALUES * HV)
    o_v, o_k, o_p = i_v * BV + tl.arange(0, BV), tl.arange(0, BK), tl.arange(0, PIECE)
    pieces = tl.arange(0, BK // PIECE)[None, :, None]
    mask = inside(o_v, V, o_k, K, EVEN_K)
    S = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        of_initial = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
        S = tl.load(initial + of_initial, mask=mask, other=0.0).to(tl.float32)
    _, length = bounds(cu_seqlens, i_n, T)
    i_s = first_slot(cu_seqlens, i_n, T, segment) * HV + i_h
    for i_t in range(0, tl.maximum((length + segment - 1) // segment, 1)):
        tl.store(entering + state_offsets(i_s, o_v, o_k, K, V, True), S, mask=mask)
        if length > (i_t + 1) * segment:
            row = i_s * (V + K)
            following = tl.load(left + (row + o_v[:, None]) * K + o_k[None, :], mask=mask, other=0.0)
            parts = tl.reshape(S, (BV, BK // PIECE, PIECE))
            for p in range(BK // PIECE):
                o_j = p * PIECE + o_p
                of_transition = (row + V + o_j[:, None]) * K + o_k[None, :]
                transition = tl.load(left + of_transition, mask=inside(o_j, K, o_k, K, EVEN_K), other=0.0)
                part = tl.sum(tl.where(pieces == p, parts, 0.0), 1)
                following = tl.dot(part, transition, following, input_precision=PRECISION)
            S = following
        i_s += HV


OPERANDS = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}

COMBINED_COLUMNS = 16
"""Value channels of one program of `combine`: the fewest that a matrix instruction takes."""
RESIDENT = 2
"""Programs of the walk that fit a processor at once: 4 warps of some 200 registers."""
LAUNCH_STEPS, COMBINE_STEPS = 24, 7
"""What two launches more, and one segment more in `combine`, take, in steps of the walk over one chunk (0.4 us on an
H200 by estimate; 10 us and 3 us): not measured."""


def segments_by_rule(problem: Problem, config: ChunkTritonConfig, target: Target) -> int:
    """Return into how many segments T is cut: 1 unless there are few sequences and heads, and many chunks.

    A segment is walked twice, the first time with K columns more: as long as the processors hold the 2 G W programs of
    W walks cut into G segments, that takes 2 chunks / G steps instead of one per chunk, and combining takes G more.
    """
    walks = problem.N * problem.HV * -(-problem.V // value_tile(problem, config))
    most = target.processors * RESIDENT // max(1, 2 * walks)
    chunks = problem.spans(config.chunk_size) // max(1, problem.N)

    def steps(G: int) -> float:
        return chunks if G == 1 else 2 * chunks / G + LAUNCH_STEPS + COMBINE_STEPS * G

    best = min(range(1, max(1, min(most, chunks)) + 1), key=steps)
    return best * problem.N if problem.packed and best > 1 else best


def value_tile(problem: Problem, config: ChunkTritonConfig) -> int:
    """Return BV: the configured tile, or all value channels where they are fewer."""
    return min(config.value_tile, tile_of(problem.V))


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, config: ChunkTritonConfig, target: Target) -> Plan:
    """Return the launches and the workspace of one call."""
    C, chunks = config.chunk_size, (problem.spans(config.chunk_size), problem.HV)
    cut = config.segments or segments_by_rule(problem, config, target)
    segment = C * -(-problem.T // (C * cut))
    rows, squares = (problem.dtype, (*chunks, C, problem.K)), (problem.dtype, (*chunks, C, C))
    workspace = {"A": squares, "X": squares}
    if not config.recompute:
        workspace |= {"q_before": rows, "k_before": rows, "k_after": rows, "last": ("float32", (*chunks, problem.K))}
    launches = [_intra(problem, config, target)]
    if segment < problem.T:
        segments = problem.spans(segment)
        workspace["left"] = ("float32", (segments, problem.HV, problem.V + problem.K, problem.K))
        workspace["entering"] = ("float32", (segments, problem.HV, problem.V, problem.K))
        launches += [_walk(problem, config, target, segments, "summary"), _combine(problem, config, target)]
        launches.append(_walk(problem, config, target, segments, "segments"))
    else:
        launches.append(_walk(problem, config, target, problem.N, "sequences"))
    return Plan(tuple(launches), workspace, {"segment": segment})


def _constants(problem: Problem, config: ChunkTritonConfig, target: Target) -> dict:
    C = config.chunk_size
    return {
        **{name: getattr(problem, name) for name in ("H", "HV", "K", "V", "BK")},
        "BV": value_tile(problem, config),
        "C": C,
        "TILES": config.intra_tiles,
        "LEVELS": C.bit_length() - 1,
        "L2NORM": problem.l2norm,
        "GATE": problem.gate,
        "SIGMOID": problem.sigmoid,
        "V_FIRST": problem.v_first,
        "OPERAND": OPERANDS[problem.dtype],
        "PRECISION": inverse_precision(problem, target),
        "APPROXIMATE": narrow(problem.dtype) and target.nvidia,
        "RECOMPUTE": config.recompute,
    }


def _parameters(problem: Problem) -> tuple[str, ...]:
    present = {"A_log": problem.A_log, "dt_bias": problem.dt_bias, "cu_seqlens": problem.packed}
    return tuple(name for name, is_there in present.items() if is_there)


_STORED = ("q_before", "k_before", "k_after", "last")


def _intra(problem: Problem, config: ChunkTritonConfig, target: Target) -> Launch:
    constants = _constants(problem, config, target)
    constants |= {"LEVELS": (config.chunk_size // config.intra_tiles).bit_length() - 1}
    return Launch(
        name="intra",
        kernel=intra,
        programs=problem.spans(config.chunk_size) * problem.HV,
        buffers=("q", "k", "g", "beta", "A", "X", *_parameters(problem), *(() if config.recompute else _STORED)),
        constants=constants | {"CONTIGUITY": config.intra_contiguity},
        options=options(config.intra_warps, config.intra_stages, config.intra_registers),
    )


def _walk(problem: Problem, config: ChunkTritonConfig, target: Target, runs: int, mode: str) -> Launch:
    BV, summary = value_tile(problem, config), mode == "summary"
    columns = -(-problem.V // BV) + (-(-problem.K // BV) if summary else 0)
    wanted = {
        "q_before": not (summary or config.recompute),
        **dict.fromkeys(_STORED[1:], not config.recompute),
        **dict.fromkeys(("q", "k", "g"), config.recompute),
        "initial": problem.initial and mode == "sequences",
        "left": summary,
        "entering": mode == "segments",
        **dict.fromkeys(("A", "o"), not summary),
        "final": problem.final and not summary,
        "kept": problem.keeps and not summary,
    }
    return Launch(
        name="summary" if summary else "walk",
        kernel=walk,
        programs=runs * problem.HV * columns,
        buffers=("v", "X", *_parameters(problem), *(name for name, asked in wanted.items() if asked)),
        constants=_constants(problem, config, target) | {"CONTIGUITY": config.walk_contiguity},
        options=options(config.walk_warps, config.walk_stages, config.walk_registers),
    )


def _combine(problem: Problem, config: ChunkTritonConfig, target: Target) -> Launch:
    precision = "tf32x3" if narrow(problem.dtype) and target.tf32 else "ieee"
    optional = {"initial": problem.initial, "cu_seqlens": problem.packed}
    return Launch(
        name="combine",
        kernel=combine,
        programs=problem.N * problem.HV * -(-problem.V // COMBINED_COLUMNS),
        buffers=("left", "entering", *(name for name, is_there in optional.items() if is_there)),
        constants=_constants(problem, config, target)
        | {"BV": COMBINED_COLUMNS, "PIECE": min(32, problem.BK), "PRECISION": precision},
        options=options(4, 2),
    )


def chunk_triton(q, k, v, g, beta, *, config=None, chunk_size=None, disable_recompute=False, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.chunk_kda`.

    config: a ChunkTritonConfig. Raises as `choice.chunk_triton_launch` and `call.call_raw` do. Differentiable once, by
    `impls.chunk_triton_backward`, whose gradients are the same bits for every configuration that does not save; with
    disable_recompute they are those bits, too.
    """
    launch, saves = chunk_triton_launch(config, chunk_size, disable_recompute)
    others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
    trained = _saving if saves else op_trained
    to = trained if wants_gradient((q, k, v, g, beta, *others)) else op
    return call_raw(to, q, k, v, g, beta, launch=launch, chunk_size=launch[0] or CHUNK, **keywords)


def _saving(*arguments):
    return op_saving(*arguments)[:3]


def _plan_of(problem: Problem, device: torch.device, interval: int, launch: tuple[int, ...]) -> Plan:
    target, config = target_of(device), tuned_chunk_triton(launch, problem, str(device), interval)
    if config is None:
        config = chunk_triton_config(launch, problem.K, problem.V, problem.dtype, target, problem.keeps)
    return plan(problem, config, target)


def _saving_plan_of(problem: Problem, device: torch.device, interval: int, launch: tuple[int, ...]) -> Plan:
    target = target_of(device)
    if len(launch) == 1:  # what is tuned is tuned for other kernels
        return saving_plan(problem, saving_tiling(problem, target), target)
    return saving_plan(problem, chunk_triton_config(launch, problem.K, problem.V, problem.dtype, target), target)


def _saved(q, v, cu_seqlens) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what a forward that saves leaves; the sizes may be symbolic."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    packed = cu_seqlens is not None
    slots = T // SAVED_CHUNK + cu_seqlens.shape[0] - 1 if packed else B * ((T + SAVED_CHUNK - 1) // SAVED_CHUNK)
    shapes, dtype = buffer_shapes(slots, HV, K, V), DTYPE_NAMES[q.dtype]
    return [(shapes[name], getattr(torch, buffer_dtype(name, dtype))) for name in SAVED]


op = register_raw("chunk_triton", forward_of(_plan_of))
back = register_raw_backward("chunk_triton_backward", adjoint)
op_trained = register_raw_trained("chunk_triton_trained", forward_of(_plan_of), back)
op_saving = register_raw_trained("chunk_triton_saving", forward_of(_saving_plan_of, SAVED), back, _saved)
