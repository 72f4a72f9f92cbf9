"""Properties of who may influence whom: the past only, oneself only, values and not their place in memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from verify import yardstick
from verify.cases import Case
from verify.claims import claim, condition, every, gradients, more, takes, tokens, unpacked
from verify.families import materialise
from verify.poison import guarded_allocations, poisoned_memory, trespassed
from verify.targets import Result, arguments, call_tensors
from verify.trial import Measure, Trial, blame, same_bits

STREAMS = ("q", "k", "v", "g", "beta")


def _stranger(trial: Trial) -> Case:
    """Make a case of the same sizes with other content, and strong gates where this one's are weak."""
    recipe, strong = trial.recipe, "bounded" if "g < -5" in trial.target.refused else "strong"
    gates = "zero" if recipe.gates in ("strong", "bounded", "log_uniform") else strong
    return materialise(replace(recipe, seed=recipe.seed + 65537, gates=gates))


@condition("a sequence of more than one token")
def _long(trial: Trial) -> bool:
    return max(trial.recipe.lengths or (trial.recipe.T,), default=0) > 1


@condition("several sequences or heads")
def _several(trial: Trial) -> bool:
    return trial.case.N * trial.case.H > 1


@claim("bitwise", _long)
def causality(trial: Trial) -> Iterable[Measure]:
    """Changing q, k, v, g, beta after token i leaves every bit of o up to i, at fixed T.

    Would have caught: FLA #1240 (gates anchored at a future row: prefix outputs changed in 24 to 30 of 68 runs, all
    within tolerance).
    """
    case, other = trial.case, _stranger(trial)
    last = [tokens for _, tokens in case.sequences() if tokens.stop > tokens.start + 1][-1]
    cut = trial.dice("cut").integer(last.start, last.stop - 1)
    later = (np.arange(case.T) > cut) & (np.arange(case.T) < last.stop)
    changed = {
        name: np.where(
            later.reshape(1, -1, *[1] * (getattr(case, name).ndim - 2)), getattr(other, name), getattr(case, name)
        )
        for name in STREAMS
    }
    result = trial.run(case.but(**changed))
    yield same_bits(f"o up to {cut}", result.o[:, : cut + 1], trial.forward.o[:, : cut + 1])


def _with_neighbours(trial: Trial, fill: str) -> tuple[Case, int, int, int]:
    """Keep one sequence and one group of heads; replace everything else by other content or by NaN."""
    case, other, dice = trial.case, _stranger(trial), trial.dice("neighbours")
    n, h, group = dice.integer(0, case.N), dice.integer(0, case.H), case.HV // case.H
    batch, span = case.sequences()[n]
    keep = np.zeros((case.B, case.T, case.H), bool)
    keep[batch, span, h] = True
    changed = {}
    for name in STREAMS:
        x = getattr(case, name)
        mine = keep if name in ("q", "k") else np.repeat(keep, group, axis=2)
        mine = mine.reshape(*mine.shape, *[1] * (x.ndim - 3))
        changed[name] = np.where(mine, x, np.nan if fill == "nan" else getattr(other, name))
    if case.S0 is not None:
        S0 = np.full_like(case.S0, np.nan) if fill == "nan" else dice.normal(case.S0.shape)
        S0[n, h * group : (h + 1) * group] = case.S0[n, h * group : (h + 1) * group]
        changed["S0"] = S0
    return case.but(**changed), n, h, group


def _mine_unchanged(trial: Trial, fill: str) -> Iterable[Measure]:
    case, n, h, group = _with_neighbours(trial, fill)
    result, (batch, span), heads = trial.run(case), case.sequences()[n], slice(h * group, (h + 1) * group)
    yield same_bits("o of one sequence and head", result.o[batch, span, heads], trial.forward.o[batch, span, heads])
    yield same_bits("S of one sequence and head", result.S[n, heads], trial.forward.S[n, heads])


@claim("bitwise", every(tokens, _several))
def neighbours(trial: Trial) -> Iterable[Measure]:
    """What other sequences and heads contain does not reach a single bit of this one's results.

    Would have caught: FLA #781 (another head's gates), states crossing sequences, vLLM #45819 (batch dependence by
    content).
    """
    yield from _mine_unchanged(trial, "other")


@claim("bitwise", every(tokens, _several))
def nan_stays(trial: Trial) -> Iterable[Measure]:
    """NaN in other sequences and heads stays there.

    Would have caught: 0 * NaN under a multiplied mask, tail loads of a tile that reach into the next sequence (FLA
    #792).
    """
    yield from _mine_unchanged(trial, "nan")


def _with_a_nan(trial: Trial) -> tuple[Case, str]:
    """Put one NaN into an input, every second time at a sequence's first token; return what it is in words, too."""
    case, dice = trial.case, trial.dice("nan")
    names = STREAMS if case.S0 is None else (*STREAMS, "S0")
    name = names[dice.integer(0, len(names))]
    x = getattr(case, name).copy()
    at = [dice.integer(0, size) for size in x.shape]
    if name != "S0" and dice.integer(0, 2):
        runs = [(batch, tokens.start) for batch, tokens in case.sequences() if tokens.stop > tokens.start]
        at[:2] = runs[dice.integer(0, len(runs))]
    x[tuple(at)] = np.nan
    return case.but(**{name: x}), f"{name}{at}"


@claim("bound", tokens)
def nan_shows(trial: Trial) -> Iterable[Measure]:
    """One NaN in q, k, v, g, beta or S0 is NaN in o and S_T wherever the definition makes it so: no number hides it.

    Would have caught: a gate of NaN that is clamped into a number, as compiled tl.minimum and tl.maximum do (triton
    #10333), and chunk_torch's first chunk from zeros, which read no decay that meets them.
    """
    case, where = _with_a_nan(trial)
    with np.errstate(invalid="ignore"):
        exact = yardstick.outputs(case)
    for name, got in trial.run(case).numbers().items():
        numbers = np.isnan(exact[name]) & ~np.isnan(got)
        first = f"element {tuple(int(i) for i in np.argwhere(numbers)[0])}" if numbers.any() else ""
        count = int(np.isnan(exact[name]).sum())
        yield Measure(f"numbers in {name} for a NaN in {where}", float(numbers.sum()), 0, count, first)


@claim("bitwise", every(unpacked, more("B")))
def batch_permutation(trial: Trial) -> Iterable[Measure]:
    """Permuting the batch permutes o and S_T, bit for bit.

    Would have caught: programs that mistake their batch index, cached descriptors (FlashQLA #23).
    """
    order = trial.dice("order").shuffle(trial.recipe.B)
    moved = trial.run(trial.case.batch(order))
    for name, x in moved.tensors().items():
        yield same_bits(name, x, trial.forward.tensors()[name][order])


@claim("bitwise", every(tokens, more("H")))
def head_permutation(trial: Trial) -> Iterable[Measure]:
    """Permuting heads (each with its group of value heads) permutes o and S_T, bit for bit.

    Would have caught: FLA #781 (head 0's gates for all), grouped heads read with h // H for h // (HV / H).
    """
    case, order = trial.case, trial.dice("order").shuffle(trial.recipe.H)
    values = (order[:, None] * trial.recipe.G + np.arange(trial.recipe.G)).reshape(-1)
    moved = trial.run(case.heads(order))
    yield same_bits("o", moved.o, trial.forward.o[:, :, values])
    yield same_bits("S", moved.S, trial.forward.S[:, values])


@claim("tolerance", every(tokens, more("G"), takes("HV > H")))
def repeated_heads(trial: Trial) -> Iterable[Measure]:
    """HV > H is q and k repeated for every value head; gradients of q and k are the sums over the group.

    Would have caught: dq, dk summed over the wrong heads, groups read in the wrong order.
    """
    case = trial.case
    result = trial.run(
        case.but(q=case.per_value_head(case.q), k=case.per_value_head(case.k)), backward=trial.differentiable
    )
    got, grouped = result.numbers(), (trial.both if trial.differentiable else trial.forward).numbers()
    for name in ("dq", "dk"):
        if name in got:
            got[name] = got[name].reshape(*case.q.shape[:3], -1, case.K).sum(axis=3)
    if trial.recipe.dtype not in ("float32", "float64"):
        # sums of gradients that were each rounded to a narrow dtype: another rounding for every member of the group
        got = {name: x for name, x in got.items() if name not in ("dq", "dk")}
    yield from trial.pair(got, {name: grouped[name] for name in got})


def strided(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    moved = x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x
    return strided(x) if moved.is_contiguous() else moved


def _offset(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


@claim("tolerance", every(tokens, takes("strided inputs")))
def layouts(trial: Trial) -> Iterable[Measure]:
    """Strided, transposed and offset views, of do and dS_T too, give what contiguous tensors give.

    Bitwise where the contract claims it.

    Would have caught: FLA #871, #1139, #627 (gates assumed contiguous), ATOM #1842 (stride-blind underneath).
    """
    rearrange = (strided, _transposed, _offset)[trial.dice("layout").integer(0, 3)]
    backward = trial.differentiable
    result = trial.run(trial.case, rearrange=rearrange, backward=backward)
    yield from trial.judge(result.numbers(), trial.yard.exact)
    if "layout" in trial.contract.bitwise:
        base = (trial.both if backward else trial.forward).tensors()
        for name, x in result.tensors().items():
            yield same_bits(name, x, base[name])


@claim("tolerance", every(unpacked, more("B"), takes("strided inputs")))
def expanded(trial: Trial) -> Iterable[Measure]:
    """A batch made by expand (stride 0) gives what its copies give.

    Would have caught: kernels that take strides for granted, or write to an input.
    """
    same = trial.case.batch(np.zeros(trial.recipe.B, int))
    result = trial.run(same, rearrange=lambda x: x if x.ndim == 1 else x[:1].expand_as(x))
    yield from trial.agree(same, result)


@claim("tolerance", every(takes("state_v_first"), tokens))
def state_v_first(trial: Trial) -> Iterable[Measure]:
    """States stored [V, K] are the transposes of states stored [K, V], in and out, and in the gradients.

    Would have caught: vLLM #41292 (read as [K, V] while stored [V, K]: long-context retrieval broke, decode did not).
    """
    result = trial.run(trial.case, state_v_first=True, backward=trial.differentiable)
    yield from trial.judge(result.numbers(), trial.yard.exact)


@claim("bitwise")
def purity(trial: Trial) -> Iterable[Measure]:
    """Inputs, and the memory around every buffer, are untouched by forward and backward; no result shares an input's.

    Bands of 64 elements lie before and behind every input, and every buffer that the call allocates from Python.

    Would have caught: onnxruntime #32166 (aliased continuation state), an op that destroys v, triton #6547 (updates
    applied twice).
    """
    for backward in (False, True)[: 1 + gradients(trial)]:
        tensors, keywords = arguments(trial.case, trial.target)
        watched = tensors | {name: x for name, x in keywords.items() if isinstance(x, torch.Tensor)}
        before = {name: _storage(x).clone() for name, x in watched.items()}
        leaves = {name: x.requires_grad_(backward) for name, x in tensors.items()}
        with blame():
            allocations, blocks = _kept(guarded_allocations)
            result = call_tensors(
                trial.target, trial.case, leaves, keywords, backward=backward, allocations=allocations
            )
        for name, x in watched.items():
            yield Measure(f"{name} untouched", float((before[name] != _storage(x)).sum()), 0, x.numel())
        inputs = {x.untyped_storage().data_ptr() for x in tensors.values()}
        for name, x in result.tensors().items():
            shared = x.numel() > 0 and x.untyped_storage().data_ptr() in inputs
            yield Measure(f"{name} shares no memory with an input", float(shared), 0)
        yield Measure("memory around what the call allocated untouched", float(trespassed(blocks)), 0, len(blocks))


def _kept(
    allocations: Callable[[], AbstractContextManager[list[torch.Tensor]]],
) -> tuple[Callable[[], AbstractContextManager], list[torch.Tensor]]:
    """Return a context of guarded allocations, and the list that will hold its blocks when it has ended."""
    kept: list[torch.Tensor] = []

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        with allocations() as blocks:
            yield
        kept.extend(blocks)

    return active, kept


def _storage(x: torch.Tensor) -> torch.Tensor:
    """View the whole memory block under a tensor, guard bands included, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


@claim("bitwise", tokens)
def determinism(trial: Trial) -> Iterable[Measure]:
    """Equal inputs give equal bits, forward and backward, in repeated calls: 3, in the profiles tune and deep 10.

    Would have caught: FLA #945 and triton #9871 (races: 30 hashes in 30 runs), atomics in reductions, uninitialised
    memory.
    """
    backward = trial.differentiable
    yield from repeated(trial, trial.case, trial.both if backward else trial.forward, backward=backward)


def repeated(trial: Trial, case: Case, first: Result, **how) -> Iterable[Measure]:
    """Repeat a call as often as the trial demands, the first one counted, and compare every bit with the first."""
    calls, expected = 1, first.tensors()
    while calls < trial.demands.repeats:
        again = trial.run(case, **how)
        calls += 1
        for name, x in again.tensors().items():
            yield same_bits(f"{name} in call {calls}", x, expected[name])
    trial.met["repeats"] = min(calls, trial.met.get("repeats", calls))


@claim("bitwise", tokens, most=8)
def same_addresses(trial: Trial) -> Iterable[Measure]:
    """A second call on the same tensors, filled with other numbers, gives what fresh tensors of those numbers give.

    Would have caught: FlashQLA #23, FLA #770 (results and descriptors kept by the identity or the address of a tensor),
    KernelBench's answers that are remembered, a graph that is replayed with the first call's inputs.
    """
    case, other = trial.case, _stranger(trial)
    expected = trial.run(other)
    made = [arguments(x, trial.target) for x in (case, other)]
    (first, keywords), (second, _) = made
    with blame():
        trial.count(case)
        call_tensors(trial.target, case, first, keywords)
        trial.count(other)
        for name, x in first.items():
            x.copy_(second[name])
        again = call_tensors(trial.target, other, first, keywords)
    for name, x in again.tensors().items():
        yield same_bits(f"{name} of the second call", x, expected.tensors()[name])


@claim("bitwise")
def unwritten(trial: Trial) -> Iterable[Measure]:
    """What memory held before a call does not reach a bit of its results: bytes of 0xFF, NaN in every format, do not.

    Every call's torch.empty holds NaN already. Here malloc hands out such bytes too, our own pages do, and the free
    blocks of a CUDA device hold them: what compiled code, C++ and launchers allocate is meant. Elsewhere than with
    glibc, malloc is left out.

    Would have caught: FLA #862 (dk never written), cudnn-frontend #1013 (a tail of one token never written), FLA #1135,
    workspace rows behind a tail that are multiplied by 0, which NaN survives.
    """
    backward = trial.differentiable
    base = trial.both if backward else trial.forward
    with poisoned_memory(trial.target.place):
        again = trial.run(trial.case, backward=backward)
    for name, x in again.tensors().items():
        yield same_bits(name, x, base.tensors()[name])
