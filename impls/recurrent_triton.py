"""Run Kimi Delta Attention token by token in Triton, in one launch: prefill for any length, and the decode step.

    P_t = Diag(exp g_t) S_{t-1}
    S_t = P_t + k_t (beta_t (v_t - P_t^T k_t))^T
    o_t = scale * S_t^T q_t

One program per sequence, value head and tile of value channels keeps its part of the state, transposed [BV, BK], in
float32 registers; a token is fetched while the one before it is worked on. All activations inside.
"""

import functools

import torch
import triton
import triton.language as tl

from impls.activations_triton import exp2, gate_parameters, inverse_norm, log2_decay, write_strength
from impls.call import call_raw
from impls.choice import recurrent_triton_config, recurrent_triton_launch, tuned_recurrent_triton
from impls.configs import RecurrentTritonConfig
from impls.launcher import forward_of
from impls.layout_triton import bounds, inside, spans_before, state_offsets
from impls.plan import Launch, Plan, Problem, options, tile_of
from impls.registration import register_raw
from impls.targets import Target
from impls.targets import of as target_of


@triton.jit(do_not_specialize=["T", "interval", "kept_rows"])
def recurrent(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial, o, final, kept, T, interval, kept_rows, scale,
    lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, V_FIRST: tl.constexpr,
):
    """Walk over the tokens of one sequence with BV columns of one head's state, transposed: S [BV, BK]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % TILES).to(tl.int32), (program // TILES % HV).to(tl.int32), program // (TILES * HV)
    first, length = bounds(cu_seqlens, i_n, T)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_s = o_k < K, o_v < V, inside(o_v, V, o_k, K, K == BK)
    of_state = state_offsets(i_n * HV + i_h, o_v, o_k, K, V, V_FIRST)
    S = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        S = tl.load(initial + of_state, mask=m_s, other=0.0).to(tl.float32)
    rate, bias = gate_parameters(A_log, dt_bias, i_h, o_k, K, GATE)
    q += (first * H + i_h // (HV // H)) * K
    k += (first * H + i_h // (HV // H)) * K
    g += (first * HV + i_h) * K
    v += (first * HV + i_h) * V
    o += (first * HV + i_h) * V
    beta += first * HV + i_h
    if kept is not None:
        i_kept = spans_before(cu_seqlens, i_n, T, interval)
    some = length > 0
    n_q, n_k = tl.load(q + o_k, mask=m_k & some, other=0.0), tl.load(k + o_k, mask=m_k & some, other=0.0)
    n_g, n_v = tl.load(g + o_k, mask=m_k & some, other=0.0), tl.load(v + o_v, mask=m_v & some, other=0.0)
    n_beta = tl.load(beta, mask=some, other=0.0)
    for i_t in range(0, length):
        b_q, b_k, b_v = n_q.to(tl.float32), n_k.to(tl.float32), n_v.to(tl.float32)
        b_g, b_beta = n_g.to(tl.float32), write_strength(n_beta.to(tl.float32), SIGMOID)
        q, k, v, g, beta = q + H * K, k + H * K, v + HV * V, g + HV * K, beta + HV
        some = i_t + 1 < length
        n_q, n_k = tl.load(q + o_k, mask=m_k & some, other=0.0), tl.load(k + o_k, mask=m_k & some, other=0.0)
        n_g, n_v = tl.load(g + o_k, mask=m_k & some, other=0.0), tl.load(v + o_v, mask=m_v & some, other=0.0)
        n_beta = tl.load(beta, mask=some, other=0.0)
        if kept is not None:  # noqa: SIM102 - what is known when compiling is not mixed with what is not
            if i_t % interval == 0:
                row = i_kept + i_t // interval
                m_kept = m_s & (row >= 0) & (row < kept_rows)
                tl.store(kept + state_offsets(row * HV + i_h, o_v, o_k, K, V, V_FIRST), S, mask=m_kept)
        b_q, b_k = b_q[None, :], b_k[None, :]
        if L2NORM:
            b_q *= inverse_norm(b_q, False)
            b_k *= inverse_norm(b_k, False)
        S *= exp2(log2_decay(b_g, rate, bias, lower_bound, GATE, False), False)[None, :]
        delta = b_beta * (b_v - tl.sum(S * b_k, 1))
        S += delta[:, None] * b_k
        tl.store(o + o_v, (tl.sum(S * b_q, 1) * scale).to(o.dtype.element_ty), mask=m_v)
        o += HV * V
    if final is not None:
        tl.store(final + of_state, S, mask=m_s)


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, config: RecurrentTritonConfig, target: Target) -> Plan:
    """Return the one launch of a call."""
    BV = min(config.value_tile, tile_of(problem.V))
    optional = {
        "A_log": problem.A_log,
        "dt_bias": problem.dt_bias,
        "cu_seqlens": problem.packed,
        "initial": problem.initial,
        "final": problem.final,
        "kept": problem.keeps,
    }
    sizes = {name: getattr(problem, name) for name in ("H", "HV", "K", "V", "BK")}
    modes = {"L2NORM": problem.l2norm, "GATE": problem.gate, "SIGMOID": problem.sigmoid, "V_FIRST": problem.v_first}
    launch = Launch(
        name="recurrent",
        kernel=recurrent,
        programs=problem.N * problem.HV * -(-problem.V // BV),
        buffers=("q", "k", "v", "g", "beta", "o", *(name for name, is_there in optional.items() if is_there)),
        constants=sizes | modes | {"BV": BV},
        options=options(config.warps, config.stages, config.registers),
    )
    return Plan((launch,), {})


def recurrent_triton(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.fused_recurrent_kda`.

    config: a RecurrentTritonConfig. Raises as `choice.recurrent_triton_launch` and `call.call_raw` do. Not
    differentiable.
    """
    launch = recurrent_triton_launch(config, chunk_size)
    return call_raw(op, q, k, v, g, beta, launch=launch, chunk_size=1, **keywords)


def _plan_of(problem: Problem, device: torch.device, interval: int, launch: tuple[int, ...]) -> Plan:
    target, config = target_of(device), tuned_recurrent_triton(launch, problem, str(device))
    if config is None:
        config = recurrent_triton_config(launch, problem.K, problem.V, problem.dtype, target)
    return plan(problem, config, target)


op = register_raw("recurrent_triton", forward_of(_plan_of))
