"""Wrong implementations of KDA, each with exactly one bug that real kernels had: the judge must kill all of them.

A mutant is `Chunkwise` with one of its parts replaced. The docstring of the replacement says what it imitates: an
issue, a pull request, or a bug that usual tolerances let pass (0.005 of a whole tensor's norm, absolute 0.01 or 0.3).
"""

import itertools
import math
from functools import partial

import torch
from torch.nn.functional import pad

from impls.contracts import at_least_float32
from verify.inverses import of_mutant
from verify.mutant_chunk import Chunkwise, Mutant, clean, instead_of, planted, product, softplus, triangle
from verify.mutant_gradients import GRADIENTS
from verify.mutant_memory import MEMORY
from verify.targets import Target

CLEAN = Mutant("clean", "nothing: the chunkwise form without a bug, which must pass everything", clean)

# gates


@instead_of("between")
def anchor_in_the_future(self, g):
    """FLA #1240: decays split at the middle row, so gates of later tokens move the last bits of earlier outputs."""
    G, middle = torch.cumsum(g, dim=2), min(8, g.shape[2] - 1)
    mild = G[:, :, -1:] > -8
    at = torch.where(mild, G, 0.0)
    anchored = (
        torch.exp(at - at[:, :, middle, None])[..., :, None, :] * torch.exp(at[:, :, middle, None] - at)[:, :, None]
    )
    return torch.where(triangle(g, 0)[..., None], torch.where(mild[..., None, :], anchored, clean.between(g)), 0.0)


@instead_of("between")
def exponential_before_mask(self, g):
    """transformers #48455: exp of sums > 0 above the diagonal, masked in the forward: inf * 0 in the backward."""
    below = self.segments(g).to(g.dtype)
    return torch.where(triangle(g, 0)[..., None], torch.exp(below - below.transpose(2, 3)), 0.0)


@instead_of("scores")
def one_sided_rescaling(self, x, k, between):
    """FlashKDA #7, cudnn-frontend #1017: keys divided by the chunk's decay so far overflow at strong gates."""
    since = between[..., 0, :]
    return torch.tril(product(x * since, (k / since).mT))


@instead_of("gate")
def clamped_softplus(self, g, A_log, dt_bias, lower_bound):
    """tokenspeed #847: the lower bound taken as a clamp of the softplus gate, not as the factor of a sigmoid."""
    x = g if dt_bias is None else g + dt_bias.view(g.shape[1], 1, g.shape[3])
    rate = 1.0 if A_log is None else torch.exp(A_log).view(-1, 1, 1)
    return -rate * softplus(x) if lower_bound is None else torch.clamp(-rate * softplus(x), min=lower_bound)


@instead_of("load")
def gates_of_head_zero(self, name, x):
    """FLA #781: the gates of head 0 read for every head."""
    x = clean.load(name, x)
    return x[:, :1].expand_as(x) if name == "g" else x


@instead_of("load")
def gates_assumed_contiguous(self, name, x):
    """FLA #871, #1139, #627: strides of the gates ignored."""
    span = x.storage_offset() + x.numel()
    if name == "g" and span * x.element_size() <= x.untyped_storage().nbytes():
        x = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return clean.load(name, x)


@instead_of("load")
def gates_past_the_row(self, name, x):
    """FLA #1135: rows of gates read to the next power of two; 0 * NaN where the memory behind them holds NaN."""
    K = x.shape[-1]
    wide, size = 1 << (K - 1).bit_length(), x.untyped_storage().nbytes() // x.element_size()
    last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    if name == "g" and x.numel() and last + wide - K < size:
        beyond = x.detach().as_strided((*x.shape[:-1], wide), x.stride())[..., K:]
        x = x + 0.0 * torch.sum(torch.exp(beyond), dim=-1, keepdim=True)
    return clean.load(name, x)


@instead_of("run")
def nan_clamped_away(self, tokens, S, C):
    """triton #1566: tl.minimum(g, 0) is 0 where g is NaN, so that a broken projection goes unnoticed."""
    q, k, v, g, beta = tokens
    return Chunkwise.run(self, (q, k, v, torch.where(torch.isnan(g), 0.0, g), beta), S, C)


@instead_of("run")
def gates_one_token_late(self, tokens, S, C):
    """The planted bug of an off-by-one: token t decays with the gates of token t - 1."""
    q, k, v, g, beta = tokens
    return Chunkwise.run(self, (q, k, v, pad(g, (0, 0, 1, 0))[:, :, : g.shape[2]], beta), S, C)


@instead_of("run")
def decay_after_write(self, tokens, S, C):
    """DPLR conventions mixed up: the state decays after the write and the read, not before the erase."""
    q, k, v, g, beta = tokens
    o, S = Chunkwise.run(self, (q, k, v, pad(g, (0, 0, 1, 0))[:, :, : g.shape[2]], beta), S, C)
    return o, S * torch.exp(torch.sum(g[:, :, -1:], dim=2))[..., None]


# the chunk


@instead_of("attention")
def strict_causal_mask(self, q, k, between):
    """The planted bug of a mask j < i where it must be j <= i: a token does not read its own write."""
    return torch.tril(self.scores(q, k, between), -1)


@instead_of("solve")
def first_order_inverse(self, L, right):
    """The planted bug (I + L)^-1 = I - L."""
    return right - product(L, right)


@instead_of("solve")
def float16_neumann_inverse(self, L, right):
    """FlashKDA #10, vLLM #54859: the inverse as a Neumann product in float16, unstable for near-collinear keys."""
    power, eye = (-L).half(), torch.eye(L.shape[-1], dtype=torch.float16, device=L.device)
    inverse = eye + power
    for _ in range(1, max(L.shape[-1] - 1, 1).bit_length()):
        power = product(power, power)
        inverse = product(inverse, eye + power)
    return product(inverse.to(L.dtype), right)


@instead_of("solve")
def tf32_inverse(self, L, right):
    """FLA #1205: the triangular inverse loses 13 bits to TF32 operands although float32 was promised."""
    return clean.solve(_tf32(L), right)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to 11 bits by adding and taking away a multiple (Veltkamp's splitting)."""
    big = x * (2.0 ** (13 if x.dtype == torch.float32 else 42) + 1)
    return big - (big - x)


@instead_of("erased")
def chunk_of_32_broken(self, k, beta, between):
    """FLA #876: with 32 rows the block between the two halves is missing; only the other chunk size was tested."""
    L = clean.erased(k, beta, between).clone()
    L[..., 16:, :16] = 0.0
    return L


@instead_of("residual")
def state_ignored_in_residual(self, beta, v, k, S):
    """GPU MODE #127: what the state already holds is not taken off the values; every loose tolerance passes it."""
    return beta * v


@instead_of("residual")
def residual_in_bfloat16(self, beta, v, k, S):
    """attention-gym #465: v - S^T k packed in bfloat16, so that small updates silently do not happen."""
    held = product(k, S)
    return beta * (v.bfloat16() - held.bfloat16()).to(v.dtype)


@instead_of("write")
def update_applied_twice(self, k, delta):
    """triton #6547: an update applied twice by an autotuner that restores nothing."""
    return 2 * clean.write(k, delta)


@instead_of("read")
def output_one_percent_off(self, q, S, A, delta):
    """The planted bug o * 1.01, which absolute tolerances of 0.01 pass."""
    return 1.01 * clean.read(q, S, A, delta)


@instead_of("read")
def value_columns_swapped(self, q, S, A, delta):
    """The planted bug of two value columns exchanged by a wrong tile offset (FLA #941, #1018)."""
    o = clean.read(q, S, A, delta)
    return torch.cat([o[..., :-2], o[..., -2:].flip(-1)], dim=-1)


@instead_of("read")
def small_outputs_flushed(self, q, S, A, delta):
    """KernelBench #165: outputs below an absolute epsilon are zeros, and pass as zeros."""
    o = clean.read(q, S, A, delta)
    return torch.where(torch.abs(o) < 1e-6, 0.0, o)


# the state


@instead_of("carry")
def state_not_decayed(self, decay, S):
    """The planted bug of a state that passes a chunk without its decay."""
    return S


@instead_of("carry")
def state_in_bfloat16(self, decay, S):
    """FlashKDA: the state rounded to bfloat16 between chunks though float32 was promised; S_T shows it."""
    return (decay * S).bfloat16().to(S.dtype)


@instead_of("read")
def state_read_transposed(self, q, S, A, delta):
    """vLLM #41292: the output kernel reads a state stored [K, V] as [V, K]: decoding is right, long contexts not."""
    K, V = S.shape[-2:]
    return clean.read(q, S.reshape(*S.shape[:-2], V, K).mT, A, delta)


@instead_of("run")
def state_of_partial_chunk_lost(self, tokens, S, C):
    """FLA #1143, sglang #31474: the state after a ragged last chunk is the one before it."""
    whole = tokens[0].shape[2] // C * C
    _, before = Chunkwise.run(self, [x[:, :, :whole] for x in tokens], S, C)
    return Chunkwise.run(self, tokens, S, C)[0], before


@instead_of("run")
def empty_sequence_uninitialised(self, tokens, S, C):
    """FLA fused_recurrent, vLLM #53731: the kernel returns before it stores the final state when there is no token."""
    o, S = Chunkwise.run(self, tokens, S, C)
    return o, S if tokens[0].shape[2] else S + torch.empty_like(S)


@instead_of("sequences")
def state_crosses_sequences(self, tokens, S, bounds, C):
    """FLA #103: the second packed sequence goes on from the state of the first."""
    if bounds is None or len(bounds) < 3:
        return Chunkwise.sequences(self, tokens, S, bounds, C)
    _, first = self.run([x[:, :, bounds[0] : bounds[1]] for x in tokens], S[:1], C)
    return Chunkwise.sequences(self, tokens, torch.cat([S[:1], first, S[2:]]), bounds, C)


@instead_of("sequences")
def tail_without_mask(self, tokens, S, bounds, C):
    """FLA #794, #792: the last tile of a packed sequence is written whole, with rows of the next sequence."""
    o, S_T = Chunkwise.sequences(self, tokens, S, bounds, C)
    if bounds is None:
        return o, S_T
    runs = zip(bounds, bounds[1:], strict=False)
    whole = [(start, start + -(-(stop - start) // C) * C) for start, stop in runs]
    states = [self.run([x[:, :, a:b] for x in tokens], S[n : n + 1], C)[1] for n, (a, b) in enumerate(whole)]
    return o, torch.cat(states)


@instead_of("run")
def last_row_zero(self, tokens, S, C):
    """cudnn-frontend #1013: a tail of one token is never written; one row in 65,536 vanishes in a norm of the whole."""
    o, S = Chunkwise.run(self, tokens, S, C)
    return torch.cat([o[:, :, :-1], 0.0 * o[:, :, -1:]], dim=2) if tokens[0].shape[2] % C == 1 else o, S


@instead_of("run")
def tail_row_copied(self, tokens, S, C):
    """The planted bug of a clamped row index: in a ragged chunk the last row repeats the one before."""
    o, S = Chunkwise.run(self, tokens, S, C)
    return torch.cat([o[:, :, :-1], o[:, :, -2:-1]], dim=2) if tokens[0].shape[2] % C > 1 else o, S


@instead_of("run")
def state_forgotten_at_64(self, tokens, S, C):
    """A state that does not pass the border of a chunk of 64 tokens: shorter tests never cross one."""
    parts = [[x[:, :, i : i + 64] for x in tokens] for i in range(0, max(tokens[0].shape[2], 1), 64)]
    runs = [clean.run(part, S if i == 0 else torch.zeros_like(S), C) for i, part in enumerate(parts)]
    return torch.cat([o for o, _ in runs], dim=2), runs[-1][1]


# arguments


@instead_of("load")
def gates_of_batch_zero(self, name, x):
    """FlashQLA #23: a descriptor of another batch entry: the gates of entry 0 read for every entry."""
    x = clean.load(name, x)
    return x[:1].expand_as(x) if name == "g" else x


@instead_of("load")
def keys_normalised_unasked(self, name, x):
    """A norm taken although use_qk_l2norm_in_kernel is False; unit keys do not show it."""
    x = clean.load(name, x)
    return self.normalise(x) if name == "k" else x


@instead_of("chunk")
def query_enters_the_state(self, q, k, v, g, beta, S):
    """The planted bug of rows mixed up at a chunk's end: a trace of the last query and output is written as a pair."""
    o, S = clean.chunk(q, k, v, g, beta, S)
    return o, S + 1e-3 * q[..., -1, :, None] * o[..., -1, None, :]


@instead_of("group")
def groups_by_modulo(self, x, HV):
    """Grouped heads read as h % H where they are h // (HV / H)."""
    return x.repeat(1, HV // x.shape[1], 1, 1)


@instead_of("strength")
def negative_eigenvalues_ignored(self, beta, allow_neg_eigval):
    """FLA's FlashKDA dispatch: allow_neg_eigval falls into **kwargs: sigmoid where 2 * sigmoid was asked."""
    return clean.strength(beta, False)


@instead_of("scale")
def scale_ignored(self, scale, K):
    """A keyword swallowed by **kwargs: the scale is always K^-1/2."""
    return K**-0.5


# order and number of calls and programs


@instead_of("sequences")
def last_of_a_thousand_programs(self, tokens, S, bounds, C):
    """FLA #913: NaN, but only in launches of 1,024 programs and more: tests of small shapes pass."""
    o, S = Chunkwise.sequences(self, tokens, S, bounds, C)
    return (o, S) if S.shape[0] * S.shape[1] < 1024 else (torch.cat([o[:, :-1], o[:, -1:] * math.nan], dim=1), S)


_calls = itertools.count()


@instead_of("scale")
def one_call_in_ten(self, scale, K, calls=itertools.count()):  # noqa: B008 - counts over all calls
    """triton #9871: a race that is lost rarely: one call in ten differs, in a last bit."""
    return clean.scale(scale, K) * (1 + 2.0**-22 * (next(calls) % 10 == 9))


@instead_of("scores")
def order_differs_by_call(self, x, k, between, flip=lambda: next(_calls) % 3 == 2):
    """FLA #945, triton #9871: a race; equal calls add in another order and differ in the last bits."""
    if flip():
        return clean.scores(x.flip(-1), k.flip(-1), between.flip(-1))
    return clean.scores(x, k, between)


@instead_of("load")
def one_scale_for_the_batch(self, name, x):
    """vLLM #45819: values pass through a common scale, so last bits of one sequence depend on the others."""
    x = clean.load(name, x)
    most = x.detach().abs().amax() if name == "v" and x.numel() else x.new_zeros(())
    return x / most * most if most != 0 else x


MUTANTS: tuple[Mutant, ...] = (*(x for x in planted if x not in (*MEMORY, *GRADIENTS)), *MEMORY, *GRADIENTS)


def find(name: str) -> Mutant:
    """Return a mutant, or the clean control, by name. Raises KeyError with the known names."""
    known = {mutant.name: mutant for mutant in (CLEAN, *MUTANTS)}
    if name not in known:
        raise KeyError(f"unknown mutant {name!r}; known: {', '.join(known)}")
    return known[name]


def target_of(mutant: Mutant) -> Target:
    """Wrap a mutant for judgement: float32 throughout (float64 for float64 inputs), without further bitwise claims."""
    return Target(
        mutant.name,
        mutant.function,
        partial(at_least_float32, bitwise=frozenset()),
        ("float32", "bfloat16", "float16", "float64"),
        chunks=(16, 32),
        inverse=of_mutant(mutant.function),
    )
