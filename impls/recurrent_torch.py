"""Run Kimi Delta Attention token by token in torch: prefill for any length, and the decode step.

    P_t = Diag(exp g_t) S_{t-1}
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    o_t = scale * S_t^T q_t

One state per sequence and value head, float32 (float64 for float64 inputs), is worked on in the final state's own
memory. Sequences and heads take their steps in groups whose states stay in the caches between the passes of a step and
over a block of tokens, so that main memory sees a state read once and written once per block; a decode step is one
block. Memory is inputs, outputs, and the inputs of 64 tokens.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from impls import again
from impls.activations import L2NORM_EPSILON, compute_dtype, l2norm_, log_decay, write_strength
from impls.adjoint_torch import adjoint
from impls.call import call_activated, call_raw, checked
from impls.checks import bounds_of, wants_gradient
from impls.choice import recurrent_torch_config, recurrent_torch_launch
from impls.compiler_cpu import ROW_TILES, can_compile, compiled, vectors
from impls.configs import RecurrentTorchConfig
from impls.pages import like, room, transposed
from impls.registration import in_full_precision, register, register_raw, unobserved
from impls.sequences import CHANNEL_MULTIPLE, Runs, by_token, flat, runs_of, scatter
from impls.states import States

BLOCK_TOKENS = 64
GROUP_ELEMENTS = 2**20
"""How many elements the states of a group may have: 4 MiB in float32."""
ROWS = 16
LIBRARY_FROM = 400
"""Products of fewer elements torch takes in a loop of its own, whose sums have other bits than the library's."""
LANES = (32, 4, 1)
"""How many states the compiled steps take: others are taken in parts, so that no number of them compiles again."""
Step = Callable[..., None]


def recurrent_torch(q, k, v, g, beta, *, config=None, chunk_size=None, **keywords):
    """Return (o [B, T, HV, V], final state [N, HV, K, V] or None); arguments as `impls.fused_recurrent_kda`.

    config: a RecurrentTorchConfig. Raises as `choice.recurrent_torch_launch` and `call.call_activated` do.
    """
    launch = recurrent_torch_launch(config, chunk_size, q.device.type)
    tensors = (q, k, v, g, beta, *map(keywords.get, again.NAMED))
    if wants_gradient(tensors):
        return call_activated(op, q, k, v, g, beta, launch=launch, chunk_size=1, **keywords)
    if q.device.type != "cpu" or not unobserved(tensors):
        return call_raw(op_raw, q, k, v, g, beta, launch=launch, chunk_size=1, **keywords)
    found = call_raw(run_raw, q, k, v, g, beta, launch=launch, chunk_size=1, **keywords)
    if len(q) and q.shape[1] == 1 and tensors[5] is not None and not (q.shape[3] | v.shape[3]) % CHANNEL_MULTIPLE:
        again.learn(tensors, config, again.options(keywords), lambda: _OneMore(config, q, k, v, g, beta, keywords))
    return found


def step(S0: torch.Tensor, S: torch.Tensor, q, k, v, g, beta, out: torch.Tensor) -> None:
    """Take states S0 [M, K, V] over one token into S, which may be S0, and write S^T q into out [M, 1, V].

    q, k, v, g are rows [M, 1, K or V], beta [M, 1, 1]. States of 16 x 16 get null columns, or a slice of the values
    would have other bits than the whole: so they had on Intel's CPUs.
    """
    if S.shape[1] * S.shape[2] < LIBRARY_FROM:
        wide = [F.pad(x, (0, S.shape[2])) for x in (S0, S, v, out)]
        step(wide[0], wide[1], q, k, wide[2], g, beta, wide[3])
        S.copy_(wide[1][..., : S.shape[2]]), out.copy_(wide[3][..., : S.shape[2]])
        return
    torch.mul(S0, g.exp().mT, out=S)
    delta = torch.bmm(k, S)
    torch.sub(v, delta, out=delta).mul_(beta)
    S.addcmul_(k.mT, delta)
    torch.bmm(q, S, out=out)


def step_in_two_passes(products, scale, normed, S0: torch.Tensor, S: torch.Tensor, q, k, v, g, beta, out: torch.Tensor):
    """Do the same for the compiler, with out times scale [] and, where normed [], with k and q over their lengths.

    One pass reads the states for k and q, another writes them: S^T q is (alpha S0)^T q + (q . k) delta. Where S is S0,
    each element is read before it is written. The lengths divide sums and not rows: it costs no pass over them.
    products: read by a product of two rows, in float32 and for vectors that ROW_TILES has, or by sums.
    """
    alpha = g.exp()
    of_k, of_q = (_product_of if products else _sums_of)(k, q, alpha, S0)
    lengths = (torch.where(normed, (x * x).sum(-1, keepdim=True) + L2NORM_EPSILON, 1.0).sqrt() for x in (k, q))
    for_k, for_q = (a / length for a, length in zip((1, scale), lengths, strict=True))
    delta = beta * for_k * (v - for_k * of_k)
    out.copy_(for_q * (of_q + (q * k).sum(-1, keepdim=True) * delta))
    S.copy_(alpha.mT * S0 + k.mT * delta)


def _product_of(k, q, alpha, S0: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return (alpha S0)^T k and (alpha S0)^T q [M, 1, V].

    It reads whole lines of memory, as sums do not, which take 8 columns at a time with AVX2: steps over 33.5 MB of
    states take 4.3 ms instead of 5.4 on Zen 3 (a copy 2.7), in place 3.7 instead of 5.2.
    """
    return torch.bmm(torch.cat([k * alpha, q * alpha], 1), S0).split(1, 1)


def _sums_of(k, q, alpha, S0: torch.Tensor) -> list[torch.Tensor]:
    """Return what `_product_of` does, for states of other dtypes and strides, and without vectors.

    Sums go over ROWS rows at a time: column by column through all of a state's rows the caches see too many streams,
    2.3 ms for 33.5 MB of states instead of 1.9. The products of alpha and S0 here and where the states are written are
    in two orders, or the compiler would store what they share.
    """
    M, K, V = S0.shape
    P = S0 * alpha.mT
    return [(x.mT * P).view(M, K // ROWS, ROWS, V).sum(2).sum(1, keepdim=True) for x in (k, q)]


@functools.lru_cache(maxsize=256)
def _compiled_steps(
    K: int, V: int, dtype: torch.dtype, threads: int, turned: bool
) -> tuple[tuple[int, Callable], ...]:
    """Return `step_in_two_passes` for each of LANES, compiled for so many threads; turned: for states kept [V, K]."""
    steps, products = [], dtype == torch.float32 and not turned and vectors(ROW_TILES) is not None
    for M in LANES:
        lying = (M, V, K) if turned else (M, K, V)
        states = [torch.zeros(lying, dtype=dtype) for _ in range(2)]
        states = [x.mT for x in states] if turned else states
        shapes = (M, 1, K), (M, 1, K), (M, 1, V), (M, 1, K), (M, 1, 1), (M, 1, V)
        factors = torch.zeros((), dtype=dtype), torch.tensor(False)
        inputs = [*factors, *states, *(torch.zeros(shape, dtype=dtype) for shape in shapes)]
        take = compiled(partial(step_in_two_passes, products), inputs, ROW_TILES if products else None)
        steps.append((M, take.in_threads()))
    return tuple(steps)


def _steps_for(
    K: int, V: int, dtype: torch.dtype, threads: int, turned: bool, scale: float, normed: bool
) -> list[tuple[int, Step]]:
    """Return the compiled steps in the parameters of `step`.

    They look at nothing but elements, so that tensors may have any shapes with the same elements in the same order.
    """
    factors = torch.tensor(scale, dtype=dtype), torch.tensor(normed)
    return [(lanes, partial(take, *factors)) for lanes, take in _compiled_steps(K, V, dtype, threads, turned)]


@functools.lru_cache(maxsize=256)
def _stepper(K: int, V: int, dtype: torch.dtype, threads: int, turned: bool, scale: float, normed: bool) -> Step:
    """Return the compiled steps for any number of states [M, K, V], in the parameters of `step`.

    Those of LANES[0] states may have any shapes, with the same elements in the same order.
    """
    steps = _steps_for(K, V, dtype, threads, turned, scale, normed)

    def step_in_parts(S0, S, *rows) -> None:
        if S0.dtype != S.dtype or S0.stride() != S.stride():
            S0 = S.copy_(S0)
        assert all(x.is_contiguous() and x.dtype is dtype for x in rows), "what is compiled looks at elements alone"
        if S.numel() == LANES[0] * K * V:
            steps[0][1](S0, S, *rows)  # 18 us less than by slices
            return
        whole, first = (S0, S, *rows), 0
        for lanes, take in steps:
            while len(S) - first >= lanes:
                take(*(x[first : first + lanes] for x in whole))
                first += lanes

    return step_in_parts


def step_of(compile: bool, S: torch.Tensor, scale: float, normed: bool) -> Step:
    """Return the compiled steps for states that lie as S [.., K, V] does, or `step`, which neither norms nor scales."""
    if compile and can_compile():
        return _stepper(*S.shape[-2:], S.dtype, torch.get_num_threads(), S.stride(-1) != 1, scale, normed)
    return step


def _stepwise(inputs, normed: bool, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    B, T, _, V = inputs[2].shape
    runs, K = runs_of(B, T, bounds_of(cu_seqlens, T)), inputs[0].shape[3]
    states = States(initial_state, inputs[0], inputs[2], cu_seqlens, runs, state_interval, filled=False)
    S0, S = states.open(runs)
    alone = runs.longest == 1 and runs.adjacent and S.shape[1:] == (K, V) and not state_interval
    config = recurrent_torch_config(tuple(launch), inputs[0], inputs[2], cu_seqlens)
    take = step_of(config.compile and T > 0, S, scale, normed)
    if alone:
        o = _decode(S0, S, inputs, normed, scale, take)
    else:
        o = _walk(inputs, normed, S0, S, states, runs, scale, take)
        states.close(S, runs)
    return o, states.final if output_final_state else S.new_empty(0), states.kept


def _decode(S0: torch.Tensor, S: torch.Tensor, inputs, normed: bool, scale: float, take: Step) -> torch.Tensor:
    """Take states S0 [M, K, V] over the only token of their sequences into S, and return o in the shape of v.

    There is nothing to gather, pad or scatter: 60 us less than `_walk`, of 230 for one sequence of 32 heads.
    """
    v, M, HV = inputs[2], len(S), inputs[2].shape[2]
    inputs = [x if x.shape[2] == HV else x.repeat_interleave(HV // x.shape[2], 2) for x in inputs]
    if take is step:
        qk = torch.stack(inputs[:2]).to(S.dtype)  # a copy, as the library rounds by alignment
        if normed:
            l2norm_(qk)
        inputs[:2] = qk
    rows = [x.to(S.dtype).contiguous().view(M, 1, -1) for x in inputs]
    size, out = _group_size(S, take), torch.empty_like(rows[2])
    whole = (S0, S, *rows, out)
    for group in [whole] if size >= M else zip(*(x.split(size) for x in whole), strict=True):
        take(*group)
    if take is step:
        out.mul_(scale)
    return out.view(v.shape).to(v.dtype)


_decode_in_full = in_full_precision(_decode)


def _group_size(S: torch.Tensor, take: Step) -> int:
    """Return how many states of S [.., K, V] are worked on together; as many as compiled steps take without a slice."""
    return max(1, GROUP_ELEMENTS // (S.shape[1] * S.shape[2])) if take is step else LANES[0]


def _walk(
    inputs, normed: bool, S0: torch.Tensor, S: torch.Tensor, states: States, runs: Runs, scale: float, take: Step
):
    """Take states S0 [N * HV, K', V'] over all tokens into S, and return o. Compiled steps norm and scale."""
    HV, K, dtype, o = inputs[2].shape[2], inputs[0].shape[3], S.dtype, inputs[2].new_empty(inputs[2].shape)
    tokens, heads, block = [flat(x) for x in inputs], slice(0, HV), math.gcd(BLOCK_TOKENS, states.interval)
    for first in range(0, runs.longest, block):
        L, n = min(block, runs.longest - first), runs.running(first)
        states.keep(S, runs, first, heads)
        blocks = [by_token(x, runs, first, L, heads, HV, dtype) for x in tokens]
        if normed and take is step:
            l2norm_(blocks[0][..., :K]), l2norm_(blocks[1][..., :K])
        rows = [x.view(L, n * HV, 1, x.shape[3]) for x in blocks]
        out = torch.empty_like(rows[2])
        _over(S if first else S0, S, [runs.running(first + t) * HV for t in range(L)], rows, out, take)
        out = out.mul_(scale) if take is step else out
        scatter(flat(o), out.view(L, n, HV, -1).transpose(0, 1), runs, first, heads)
    return o


def _over(S0: torch.Tensor, S: torch.Tensor, counts: list[int], rows, out: torch.Tensor, take: Step) -> None:
    """Take states S0 [.., K, V] over a block of tokens into S, group by group, the first counts[t] over token t.

    rows: q, k, v, g, beta [L, counts[0], 1, channels]; out [L, counts[0], 1, V] receives S^T q.
    """
    size = _group_size(S, take)
    parts = zip(S0.split(size), S.split(size), *(x.split(size, 1) for x in (*rows, out)), strict=False)
    for first, (before, after, *group) in zip(range(0, counts[0], size), parts, strict=False):
        _group_over(before, after, [min(size, count - first) for count in counts], group, take)


def _group_over(S0: torch.Tensor, S: torch.Tensor, counts: list[int], rows, take: Step) -> None:
    """Take the states of one group over a block of tokens; rows are q, k, v, g, beta, out, counts[t] may be < 1."""
    for m, *token in zip(counts, *(x.unbind() for x in rows), strict=True):
        if m < 1:
            return
        if m < len(S):
            S0, S = S0[:m], S[:m]
        take(S0, S, *(x[:m] for x in token) if m < len(token[0]) else token)
        S0 = S


def _forward(q, k, v, g, beta, *rest):
    return _stepwise((q, k, v, g, beta), False, *rest)


def _activated(g, beta, A_log, dt_bias, lower_bound, gate: str, sigmoid: str, dtype: torch.dtype):
    if gate != "none":
        g = log_decay(g, A_log, dt_bias, lower_bound, dtype)
    return g, beta if sigmoid == "none" else write_strength(beta, sigmoid == "twice", dtype)


def _forward_raw(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, normed, gate,
    sigmoid, state_v_first, output_final_state, state_interval, launch,
):  # fmt: skip
    g, beta = _activated(g, beta, A_log, dt_bias, lower_bound, gate, sigmoid, compute_dtype(v))
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    packing = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    asked = (scale, output_final_state, state_interval, launch)
    o, S, h = _stepwise((q, k, v, g, beta), normed, initial_state, packing, *asked)
    return (o, transposed(S), transposed(h)) if state_v_first else (o, S, h)


class _OneMore:
    """Take states [N, HV, K, V] over the one token of their sequences, with the bits of `_forward_raw`.

    N > 0, and K and V are multiples of 16. Holds what arguments that were checked say, and none of them.
    """

    def __init__(self, config: RecurrentTorchConfig | None, q, k, v, g, beta, keywords: dict[str, object]):
        settled, S0 = checked(q, k, v, g, beta, chunk_size=1, **keywords), keywords["initial_state"]
        self.config, self.call, self.dtype = config, replace(settled, **dict.fromkeys(again.NAMED)), compute_dtype(v)
        self.shape = (*v.shape[:1], v.shape[2], q.shape[3], v.shape[3])
        self.raw = settled.gate != "none" or settled.sigmoid != "none"
        fits = q.shape[2] == v.shape[2] and not settled.state_v_first and self.shape[0] * self.shape[1] == LANES[0]
        alike = all(x.dtype is self.dtype and x.is_contiguous() for x in (q, k, v, g, beta, S0))
        self.at_once = fits and alike
        before, behind = (*self.shape[2:], self.dtype), (False, settled.scale, settled.l2norm)
        self.step_for = functools.cache(lambda threads: _steps_for(*before, threads, *behind)[0][1])

    def __call__(self, q, k, v, g, beta, initial_state, A_log, dt_bias):
        call = self.call
        if self.raw:
            g, beta = _activated(g, beta, A_log, dt_bias, call.lower_bound, call.gate, call.sigmoid, self.dtype)
        compile = self._compiles(q, v) and can_compile()
        if self.at_once and compile:
            o, S = torch.empty_like(v), like(initial_state)
            self.step_for(torch.get_num_threads())(initial_state, S, q, k, v, g, beta, o)
            return o, S if call.output_final_state else None
        S0, S = initial_state.mT if call.state_v_first else initial_state, room(self.shape, self.dtype, v.device)
        take, decode = step_of(compile, S, call.scale, call.l2norm), _decode if compile else _decode_in_full
        o = decode(S0.flatten(0, 1), S.flatten(0, 1), (q, k, v, g, beta), call.l2norm, call.scale, take)
        if not call.output_final_state:
            return o, None
        return o, transposed(S) if call.state_v_first else S

    def _compiles(self, q, v) -> bool:
        if self.config is not None:
            return self.config.compile
        return recurrent_torch_config(recurrent_torch_launch(None, None, "cpu"), q, v, None).compile


op = register("recurrent_torch", _forward, adjoint)
op_raw = register_raw("recurrent_torch_raw", _forward_raw, kept_dtype=lambda v: v.dtype)
run_raw = in_full_precision(_forward_raw)
"""What op_raw runs, for those whom nobody watches: a step of 32 heads took 330 us instead of 450 on two slow cores."""
