"""Take one decode step in Triton, in one launch: convolutions, activations, the states, the gated norm.

    P = Diag(exp g) S        delta = beta (v - P^T k)        S <- P + k delta^T        o = scale (P^T q + (q . k) delta)

One program per sequence, value head and tile of value channels keeps its part of the state, transposed [BV, BK], in
float32 registers; both sums over a state's rows are of P, so that neither waits for the other. A gated norm needs all
value channels of a head in one program. Only x of the grid is used, in parts of at most GRID programs.
"""

import functools
from contextlib import nullcontext
from dataclasses import replace

import torch
import triton
import triton.language as tl

from impls.activations_triton import exp2, gate_parameters, inverse_norm, log2_decay, sigmoid, write_strength
from impls.checks import DTYPE_NAMES
from impls.configs import RecurrentTritonConfig, invalid
from impls.decode import Step
from impls.launcher import check_interpreter
from impls.layout_triton import inside, state_offsets
from impls.plan import Launch, Problem, options, tile_of

TOKENS = ("q", "k", "v", "g", "beta", "norm_gate")
"""What is read where it lies, token by token."""
POOLS = ("state", "final", "q_ring", "k_ring", "v_ring")
"""What lies as it likes, slot by slot."""
STRIDES = (
    "Q_ROW", "K_ROW", "V_ROW", "G_ROW", "BETA_ROW", "Z_ROW", "STATE_SLOT", "FINAL_SLOT", "Q_SLOT", "Q_LINE", "K_SLOT",
    "K_LINE", "V_SLOT", "V_LINE",
)  # fmt: skip
"""Elements from a token to the next, from a slot of a pool to the next, and from a row of a ring to the next."""
GRID = 2**31 - 1
"""Programs of one launch."""


@triton.jit
def convolved(x, weight, ring, i_t, start, o_d, m_d, ROW, LINE, R, W: tl.constexpr, T: tl.constexpr):
    """Return silu of the convolution at token i_t, channels o_d of rows ROW apart; rows of its ring are LINE apart."""
    total = tl.load(x + i_t * ROW + o_d, mask=m_d, other=0.0).to(tl.float32)
    total *= tl.load(weight + o_d * W + (W - 1), mask=m_d, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        back = i_t - (W - 1) + w
        p = start + back
        m_old = m_d & (back < 0) & (p >= 0)
        b_x = tl.load(ring + tl.where(p >= 0, p % R, 0) * LINE + o_d, mask=m_old, other=0.0).to(tl.float32)
        if T > 1:
            b_x += tl.load(x + back * ROW + o_d, mask=m_d & (back >= 0), other=0.0).to(tl.float32)
        total += b_x * tl.load(weight + o_d * W + w, mask=m_d, other=0.0).to(tl.float32)
    return total * sigmoid(total)


@triton.jit
def remembered(x, ring, start, o_d, mask, ROW, LINE, R, T: tl.constexpr):
    """Write T rows of raw inputs into the ring of a sequence."""
    for i_t in range(T):
        row = tl.load(x + i_t * ROW + o_d, mask=mask, other=0.0)
        tl.store(ring + (start + i_t) % R * LINE + o_d, row.to(ring.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots", "rings", "R", "first_program"])
def decode(
    q, k, v, g, beta, A_log, dt_bias, state, final, indices, accepted, o,
    q_weight, k_weight, v_weight, q_ring, k_ring, v_ring, position, ring_indices, norm_weight, norm_gate,
    slots, rings, R, first_program, scale, lower_bound, epsilon,
    T: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, W: tl.constexpr, PER_TOKEN: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr,
    SIGMOID: tl.constexpr, V_FIRST: tl.constexpr, NORM: tl.constexpr, Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr, G_ROW: tl.constexpr, BETA_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    STATE_SLOT: tl.constexpr, FINAL_SLOT: tl.constexpr, Q_SLOT: tl.constexpr, Q_LINE: tl.constexpr,
    K_SLOT: tl.constexpr, K_LINE: tl.constexpr, V_SLOT: tl.constexpr, V_LINE: tl.constexpr,
):
    """Take T tokens of one sequence with BV columns of one head's state, transposed: S [BV, BK]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = first_program + tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = (program % TILES).to(tl.int32), (program // TILES % HV).to(tl.int32), program // (TILES * HV)
    i_k = i_h // (HV // H)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_s = o_k < K, o_v < V, inside(o_v, V, o_k, K, K == BK)
    slot, start = i_n, 0 * i_n
    if indices is not None:
        at = 0 * i_n
        if accepted is not None:
            at = tl.minimum(tl.maximum(tl.load(accepted + i_n).to(tl.int64), 1), T) - 1
        slot = tl.load(indices + (i_n * T + at if PER_TOKEN else i_n)).to(tl.int64)
    used = (slot >= 0) & (slot < slots)
    slot = tl.where(used, slot, 0)
    if W > 0:
        start += W - 1
        if position is not None:
            start = tl.maximum(tl.load(position + i_n).to(tl.int64), 0)
        # one ring serves a sequence whichever of its slots it goes on from: that of its first token
        of_ring = slot
        if ring_indices is not None:
            of_ring = tl.load(ring_indices + i_n).to(tl.int64)
        elif PER_TOKEN:
            of_ring = tl.load(indices + i_n * T).to(tl.int64)
        used = used & (of_ring >= 0) & (of_ring < rings)
        of_ring = tl.where(used, of_ring, 0)
        q_ring, k_ring, v_ring = q_ring + of_ring * Q_SLOT, k_ring + of_ring * K_SLOT, v_ring + of_ring * V_SLOT
    m_k, m_v_used, m_s = m_k & used, m_v & used, m_s & used
    q, k, v = q + i_n * T * Q_ROW, k + i_n * T * K_ROW, v + i_n * T * V_ROW
    g, beta, o = g + i_n * T * G_ROW + i_h * K, beta + i_n * T * BETA_ROW + i_h, o + (i_n * T * HV + i_h) * V
    d_k, d_v = i_k * K + o_k, i_h * V + o_v
    rate, bias = gate_parameters(A_log, dt_bias, i_h, o_k, K, GATE)
    of_state = state_offsets(i_h, o_v, o_k, K, V, V_FIRST)
    S = tl.load(state + slot * STATE_SLOT + of_state, mask=m_s, other=0.0).to(tl.float32)
    for i_t in range(T):
        if W > 0:
            b_q = convolved(q, q_weight, q_ring, i_t, start, d_k, m_k, Q_ROW, Q_LINE, R, W, T)
            b_k = convolved(k, k_weight, k_ring, i_t, start, d_k, m_k, K_ROW, K_LINE, R, W, T)
            b_v = convolved(v, v_weight, v_ring, i_t, start, d_v, m_v_used, V_ROW, V_LINE, R, W, T)
        else:
            b_q = tl.load(q + i_t * Q_ROW + d_k, mask=m_k, other=0.0).to(tl.float32)
            b_k = tl.load(k + i_t * K_ROW + d_k, mask=m_k, other=0.0).to(tl.float32)
            b_v = tl.load(v + i_t * V_ROW + d_v, mask=m_v_used, other=0.0).to(tl.float32)
        b_g = tl.load(g + i_t * G_ROW + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_beta = write_strength(tl.load(beta + i_t * BETA_ROW).to(tl.float32), SIGMOID)
        b_q, b_k = b_q[None, :], b_k[None, :]
        if L2NORM:
            b_q *= inverse_norm(b_q, False)
            b_k *= inverse_norm(b_k, False)
        S *= exp2(log2_decay(b_g, rate, bias, lower_bound, GATE, False), False)[None, :]
        of_k, of_q = tl.sum(S * b_k, 1), tl.sum(S * b_q, 1)
        delta = b_beta * (b_v - of_k)
        b_o = scale * (of_q + tl.sum(b_q * b_k, 1) * delta)
        S += delta[:, None] * b_k
        if NORM != "none":
            b_o *= tl.rsqrt(tl.sum(tl.where(m_v, b_o * b_o, 0.0), 0) / V + epsilon)
            b_z = tl.load(norm_gate + (i_n * T + i_t) * Z_ROW + d_v, mask=m_v_used, other=0.0).to(tl.float32)
            b_z = sigmoid(b_z) * b_z if NORM == "silu" else sigmoid(b_z)
            b_o *= tl.load(norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32) * b_z
        tl.store(o + i_t * HV * V + o_v, tl.where(used, b_o, 0.0).to(o.dtype.element_ty), mask=m_v)
        if PER_TOKEN:
            to = tl.load(indices + i_n * T + i_t).to(tl.int64)
            kept = (to >= 0) & (to < slots)
            to = tl.where(kept, to, 0) * FINAL_SLOT
            tl.store(final + to + of_state, S.to(final.dtype.element_ty), mask=m_s & kept)
    if not PER_TOKEN:
        tl.store(final + slot * FINAL_SLOT + of_state, S.to(final.dtype.element_ty), mask=m_s)
    if W > 0:
        m_first = m_k & (i_v == 0) & (i_h % (HV // H) == 0)
        remembered(q, q_ring, start, d_k, m_first, Q_ROW, Q_LINE, R, T)
        remembered(k, k_ring, start, d_k, m_first, K_ROW, K_LINE, R, T)
        remembered(v, v_ring, start, d_v, m_v_used, V_ROW, V_LINE, R, T)


@functools.lru_cache(maxsize=1024)
def plan(
    problem: Problem, config: RecurrentTritonConfig, W: int, per_token: bool, norm: str, given: tuple[str, ...],
    strides: tuple[int, ...],
) -> Launch:  # fmt: skip
    """Return the launch of a step of `problem.T` tokens, with the buffers that are given.

    strides: those of STRIDES, in elements.
    """
    tile = config.value_tile
    sizes = {name: getattr(problem, name) for name in ("T", "H", "HV", "K", "V", "BK")}
    modes = {"L2NORM": problem.l2norm, "GATE": problem.gate, "SIGMOID": problem.sigmoid, "V_FIRST": problem.v_first}
    return Launch(
        name="decode",
        kernel=decode,
        programs=problem.N * problem.HV * -(-problem.V // tile),
        buffers=given,
        constants=sizes | modes | {"BV": tile, "W": W, "PER_TOKEN": per_token, "NORM": norm}
        | dict(zip(STRIDES, strides, strict=True)),
        options=options(config.warps, config.stages, config.registers),
    )


def fitted(problem: Problem, W: int, norm: bool, config: RecurrentTritonConfig | None) -> RecurrentTritonConfig:
    """Return the configuration, its value tile no wider than V and with a norm all of V; else the default on sm_90.

    At K = V = 128 nothing spills; registers: plain, 16 channels on 4 warps, 48; with a convolution of 4, 32 on 4, 80;
    with the norm, 128 on 16, 125; with both 128. Chosen by estimates, in microseconds, of one sequence and of 256 (32
    heads; the bytes alone 1.0 and 249): 2.0 and 249; 3.2 and 249, where 64 channels on 8 warps took 4.3 and 540; 2.6
    and 249; 4.0 and 254, where 8 warps took 4.6 and 292. Nothing was measured.
    """
    if config is not None and not isinstance(config, RecurrentTritonConfig):
        raise TypeError(f"config must be a RecurrentTritonConfig for decode_triton, got {type(config).__name__}")
    if config is not None and (reason := invalid(config)):
        raise ValueError(reason)
    most = tile_of(problem.V)
    tile = most if norm else min(config.value_tile if config else 32 if W else 16, most)
    warps = tile * problem.BK // (1024 if norm or W else 512)
    return replace(config or RecurrentTritonConfig(warps=min(16, max(1, warps))), value_tile=tile)


def row_of(x: torch.Tensor) -> int | None:
    """Return the elements from a token of x [N, T, ..] to the next, None where tokens or what they hold lie otherwise.

    So parts of one projection are read where they are.
    """
    dense, (first, row, *inner) = 1, x.stride()
    for size, stride in zip(reversed(x.shape[2:]), reversed(inner), strict=True):
        if size > 1 and stride != dense:
            return None
        dense *= size
    if x.shape[1] == 1:
        return first if x.shape[0] > 1 else dense
    return row if x.shape[0] == 1 or first == x.shape[1] * row else None


def decode_triton(q, k, v, g, beta, step: Step, config: RecurrentTritonConfig | None = None) -> torch.Tensor:
    """Take a step: see `impls.decode.decode_kda`.

    Nothing is waited for, and nothing allocated but copies of inputs whose tokens are not dense, or not at one distance
    from each other: a CUDA graph can hold it.
    """
    check_interpreter(q)
    call, problem = step.call, problem_of(q, v, step)
    convolution, norm = step.convolution, step.norm
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": call.A_log, "dt_bias": call.dt_bias,
             "state": step.state, "final": step.final_state, "indices": step.indices, "accepted": step.accepted,
             "o": step.out}  # fmt: skip
    if convolution:
        given |= vars(convolution)
        given["ring_indices"] = given.pop("conv_state_indices")
    if norm:
        given |= {"norm_weight": norm.weight, "norm_gate": norm.gate}
    given = {name: x for name, x in given.items() if x is not None}
    lie = {name for name in TOKENS if name in given and row_of(given[name]) is not None} | set(POOLS)
    buffers = {name: x if name in lie else x.contiguous() for name, x in given.items()}
    W = convolution.q_weight.shape[1] if convolution else 0
    config = fitted(problem, W, norm is not None, config)
    activation, strides = norm.activation if norm else "none", _strides(buffers)
    launch = plan(problem, config, W, step.per_token, activation, tuple(buffers), strides)
    rings, R = convolution.q_ring.shape[:2] if convolution else (0, 1)
    scalars = {
        "slots": step.state.shape[0], "rings": rings, "R": R, "scale": call.scale,
        "lower_bound": call.lower_bound or 0.0, "epsilon": norm.epsilon if norm else 0.0,
    }  # fmt: skip
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for first in range(0, launch.programs, GRID):
            launch.run(buffers, scalars | {"first_program": first}, min(GRID, launch.programs - first))
    return step.out


def _strides(buffers: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Return the strides of STRIDES, 0 for what is not given."""
    rows = (row_of(buffers[name]) if name in buffers else 0 for name in TOKENS)
    rings = (buffers[name].stride()[:2] if name in buffers else (0, 0) for name in POOLS[2:])
    return (*rows, buffers["state"].stride(0), buffers["final"].stride(0), *(x for ring in rings for x in ring))


def problem_of(q, v, step: Step) -> Problem:
    """Describe a step in the terms of a plan."""
    (N, T, H, K), (HV, V), call = q.shape, v.shape[2:], step.call
    return Problem(
        B=N, T=T, N=N, H=H, HV=HV, K=K, V=V, dtype=DTYPE_NAMES[q.dtype], l2norm=call.l2norm, gate=call.gate,
        sigmoid=call.sigmoid, A_log=call.A_log is not None, dt_bias=call.dt_bias is not None, initial=True, final=True,
        v_first=call.state_v_first,
    )  # fmt: skip
