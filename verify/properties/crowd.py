"""Properties of launches of many programs: a race, a miscompile or a grid's border that a handful does not show."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from impls.plan import Launch
from verify import yardstick
from verify.cases import TOKENWISE, Case
from verify.claims import claim, condition, every, tokens
from verify.families import materialise
from verify.poison import poisoned_memory
from verify.properties.isolation import repeated
from verify.targets import Result
from verify.trial import Measure, Trial

DRAWN = 16
"""Sequences that are drawn. A crowd's are mixtures of them: 1,024 states of 128 x 128 would take 8 s to draw."""
SAMPLED = 4
"""Sequences that are compared with the definition: the first, the last, and some in between."""
TOGETHER = (("q", "k", "beta"), ("v",), ("g",), ("do",))
"""What is mixed as one: beta is bounded by its own key."""
ROWS = ("o", "dq", "dk", "dv", "dg", "dbeta")
"""Tensors with a row for every token; gradients of A_log and dt_bias are sums over all sequences."""
ATTEMPTS = 4
"""How often a crowd may be doubled until each launch has the programs that are asked for."""


@claim("tolerance", tokens, most=1)
def crowd(trial: Trial) -> Iterable[Measure]:
    """Many short sequences at once give what each gives alone: 1,024 programs in every launch, from poisoned memory.

    Packed where the case is, of every length then. The first, the last and two others are compared with the
    definition, with their gradients; no element of any is NaN; on a device repeated calls give equal bits (10 in the
    profiles tune and deep). Programs are counted as our kernels are launched; where none is seen, a sequence and a
    head count as one.

    Would have caught: FLA #913 (NaN from 1,024 blocks on), triton #9871 and #10590 (races that need a full device).
    """
    case, result = _crowded(trial)
    if trial.recipe.dtype != "float16":  # whose sums of spikes may overflow, and cancel
        for name, x in result.tensors().items():
            yield Measure(f"{name} without NaN", float(x.isnan().sum()), 0, x.numel())
    both = trial.run(case, backward=True) if trial.differentiable else result
    yield from _sampled(trial, case, both)
    if trial.target.place != "cpu":  # a worker has one thread there: nothing races that `determinism` would not see
        yield from repeated(trial, case, both, backward=trial.differentiable)


@condition("the profile asks for 65,537 sequences (deep), K V <= 64, HV = 1")
def _asks_for_many(trial: Trial) -> bool:
    return trial.demands.sequences > 0 and trial.recipe.K * trial.recipe.V <= 64 and trial.recipe.HV == 1


@claim("tolerance", every(tokens, _asks_for_many), most=1)
def many_sequences(trial: Trial) -> Iterable[Measure]:
    """A call of 65,537 short sequences gives what each gives alone: the first, the last, and others in between.

    With their gradients. Would have caught: grids that end at 65,535, indices of sequences in 16 bits.
    """
    case = _mixed(trial, trial.demands.sequences, tokens=2)
    yield from _sampled(trial, case, trial.run(case, backward=trial.differentiable))


def _sampled(trial: Trial, case: Case, result: Result) -> Iterable[Measure]:
    """Measure the first, the last and some other sequences of a crowd."""
    chosen = {0, case.N - 1, *trial.dice("crowd").integers(0, case.N, (SAMPLED - 2,)).tolist()}
    for n in sorted(chosen):
        yield from _one(trial, case, result, n)


def _crowded(trial: Trial) -> tuple[Case, Result]:
    """Call the target on as many sequences as make enough programs, out of memory of NaN."""
    asked = trial.demands.programs
    count = -(-asked // trial.recipe.HV)
    for _ in range(ATTEMPTS):
        case = _mixed(trial, count)
        with launches() as seen, poisoned_memory(trial.target.place):
            result = trial.run(case)
        programs = min((x.programs for x in seen), default=asked)
        if programs >= asked:
            break
        count *= 2
    trial.met["pairs"] = case.N * case.HV
    if seen:
        trial.met["programs"] = programs
    return case, result


def _mixed(trial: Trial, count: int, tokens: int | None = None) -> Case:
    """Make a case of so many sequences, each a mixture of the drawn ones, packed ones of every length."""
    r, dice = trial.recipe, trial.dice("mixture")
    T = min(max(r.lengths, default=r.T), tokens or trial.demands.tokens)
    drawn = materialise(replace(r, B=min(count, DRAWN), T=T, lengths=()))
    places = {name: dice.integers(0, drawn.B, (count,)) for name in (*("".join(x) for x in TOGETHER), "S0", "dS")}
    rows = {name: getattr(drawn, name)[places["".join(part)]] for part in TOGETHER for name in part}
    states = {"S0": None if drawn.S0 is None else drawn.S0[places["S0"]], "dS": drawn.dS[places["dS"]]}
    if not r.lengths:
        return drawn.but(**rows, **states)
    least = 1 if "T = 0" in trial.target.refused else 0
    lengths = dice.integers(least, T + 1, (count,))
    lengths[-1] = T
    kept = np.arange(T) < lengths[:, None]
    packed = {name: rows[name][kept][None] for name in TOKENWISE}
    return drawn.but(**packed, **states, cu_seqlens=tuple(itertools.accumulate(lengths.tolist(), initial=0)))


def _one(trial: Trial, case: Case, result: Result, n: int) -> Iterable[Measure]:
    """Measure one sequence of a crowd against the definition of that sequence alone."""
    alone, (batch, span) = case.sequence(n), case.sequences()[n]
    yard = yardstick.measure(alone, trial.contract, trial.differentiable)
    rows = {name: x[batch : batch + 1, span] for name, x in result.tensors().items() if name in ROWS}
    states = {name: x[n : n + 1] for name, x in result.tensors().items() if name in ("S", "dS0")}
    got = {name: x.cpu().double().numpy() for name, x in (rows | states).items()}
    yield from trial.judge(got, yard.exact, yard, label=f"sequence {n} of {case.N}: ")


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collect what our kernels launch while this is active."""
    seen, run = [], Launch.run

    def watched(launch: Launch, *arguments) -> None:
        seen.append(launch)
        run(launch, *arguments)

    Launch.run = watched
    try:
        yield seen
    finally:
        Launch.run = run
