"""Properties in time: cutting, chunking, packing, inserting and forgetting tokens."""

from collections.abc import Iterable

import numpy as np

from verify import yardstick
from verify.cases import TOKENWISE, Case
from verify.claims import claim, condition, every, more, plain, takes, tokens, unpacked
from verify.trial import Measure, Trial, same_bits


def _continue(trial: Trial, case: Case, cuts: list[int]) -> dict[str, np.ndarray]:
    """Run the pieces between the cuts one after another, handing the state on."""
    state, outputs = case.S0, []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        result = trial.run(case.tokens(start, stop).but(S0=state)).numbers()
        state = result["S"]
        outputs.append(result["o"])
    return {"o": np.concatenate(outputs, axis=1), "S": state}


@claim("tolerance", every(unpacked, takes("initial_state")))
def split(trial: Trial) -> Iterable[Measure]:
    """Running [0, s) and then [s, T) from the state in between equals one run, for any s, 0 and T included.

    Bitwise where the contract claims it. Would have caught: sglang #31474 (garbage state snapshots), states stored in
    bfloat16.
    """
    case, empty = trial.case, "T = 0" not in trial.target.refused
    low, high = (0, case.T + 1) if empty else (1, case.T)
    if high <= low:
        return
    cut = trial.dice("cut").integer(low, high)
    parts = _continue(trial, case, [0, cut, case.T])
    yield from trial.judge(parts, trial.yard.exact)
    if "split" in trial.contract.bitwise:
        yield Measure("o bitwise", float(np.sum(parts["o"] != trial.forward.numbers()["o"])), 0, parts["o"].size)


@condition("the target takes chunk_size")
def _chunks(trial: Trial) -> bool:
    return bool(trial.target.chunks) and "chunk_size" not in trial.target.refused


@claim("tolerance", every(unpacked, _chunks))
def chunk_invariance(trial: Trial) -> Iterable[Measure]:
    """Every chunk length C gives the recurrence.

    Would have caught: FLA #876 (C = 32 wrong while only 64 was tested), FLA #1105 (tile across a chunk border).
    """
    for C in trial.target.chunks:
        if trial.case.chunk_size != C:
            got = trial.run(trial.case.but(chunk_size=C)).numbers()
            yield from trial.judge(got, trial.yard.exact, label=f"C={C} ")


@condition("at most 17 tokens")
def _short(trial: Trial) -> bool:
    return trial.recipe.T <= 17


@claim("tolerance", every(unpacked, takes("initial_state"), _short))
def prefill_decode(trial: Trial) -> Iterable[Measure]:
    """Decoding token by token with the state handed on equals one prefill.

    Would have caught: FlashKDA's dispatch that ignores allow_neg_eigval in prefill only, transposed states between two
    kernels.
    """
    parts = _continue(trial, trial.case, list(range(trial.case.T + 1)))
    yield from trial.judge(parts, trial.yard.exact)


@condition("packed sequences")
def _packed(trial: Trial) -> bool:
    return bool(trial.recipe.lengths)


@claim("tolerance", _packed)
def varlen_separate(trial: Trial) -> Iterable[Measure]:
    """Sequences packed with cu_seqlens give what separate runs give, empty sequences included; bitwise where claimed.

    Would have caught: FLA #103 (empty sequence), states crossing a border. A bug in both runs is not seen here.
    """
    case, packed = trial.case, trial.forward.numbers()
    alone = [
        trial.run(case.sequence(n)).numbers()
        for n in range(case.N)
        if case.sequence(n).T or "T = 0" not in trial.target.refused
    ]
    if len(alone) < case.N:
        return
    together = {"o": np.concatenate([x["o"] for x in alone], axis=1), "S": np.concatenate([x["S"] for x in alone])}
    yield from trial.pair(packed, together)
    if "sequence_count" in trial.contract.bitwise:
        for name, x in together.items():
            yield Measure(f"{name} bitwise", float(np.sum(packed[name] != x)), 0, x.size)


@claim("tolerance", every(unpacked, more("T")))
def prefix(trial: Trial) -> Iterable[Measure]:
    """The outputs of the first tokens do not depend on how many follow: a shorter run gives the same rows.

    Bitwise where the contract claims it ("length"). Would have caught: anchors that move with the length (FLA #1085), a
    last chunk that is treated otherwise than a full one (FLA #1143, #794).
    """
    case = trial.case
    shorter = case.tokens(0, trial.dice("cut").integer(1, case.T))
    result = trial.run(shorter)
    yield from trial.agree(shorter, result)
    if "length" in trial.contract.bitwise:
        yield same_bits("o", result.o, trial.forward.o[:, : shorter.T])


@claim("tolerance", every(unpacked, more("B")))
def batch_alone(trial: Trial) -> Iterable[Measure]:
    """An entry of a batch computed alone gives what it gave among the others.

    Bitwise where the contract claims it ("sequence_count"). Would have caught: vLLM #45819 (results that differ between
    60 and 62 sequences), tiles chosen by the batch size.
    """
    case, n = trial.case, trial.dice("entry").integer(0, trial.recipe.B)
    result = trial.run(case.sequence(n))
    yield from trial.agree(case.sequence(n), result)
    if "sequence_count" in trial.contract.bitwise:
        yield same_bits("o", result.o, trial.forward.o[n : n + 1])
        yield same_bits("S", result.S, trial.forward.S[n : n + 1])


@condition("no packed sequences, or an empty one among them")
def _empty(trial: Trial) -> bool:
    return 0 in trial.recipe.lengths or not trial.recipe.lengths


@claim("bitwise", every(takes("T = 0"), takes("initial_state"), _empty))
def empty_sequence(trial: Trial) -> Iterable[Measure]:
    """A sequence without tokens passes its state through as a copy, bit for bit; o has no rows.

    Would have caught: FLA fused_recurrent (final state never written when T = 0), vLLM #53731 (corrupted cache),
    flash-attention #1537.
    """
    base = trial.case
    state = trial.dice("S0").normal(base.dS.shape)
    if trial.recipe.lengths:
        lengths = np.diff(base.cu_seqlens)
        result = trial.run(base.but(S0=state))
        chosen = [n for n in range(base.N) if lengths[n] == 0]
    else:
        result = trial.run(base.tokens(0, 0).but(S0=state))
        chosen = list(range(base.N))
    got = result.numbers()["S"][chosen]
    yield Measure("S_T = S_0 bitwise", float(np.sum(~(got == state[chosen]))), 0, got.size)


@claim("tolerance", plain)
def null_token(trial: Trial) -> Iterable[Measure]:
    """A token with beta = 0 and g = 0 changes nothing for the others, whatever finite q, k, v it carries.

    So time shifts and right padding are harmless. Would have caught: padding rows that leak, ATOM #1842, off-by-one
    anchors (FLA #1085).
    """
    case, dice = trial.case, trial.dice("null")
    at = dice.integer(0, case.T + 1)
    garbage = {
        name: case.rounded(64 * dice.normal((case.B, 1, *getattr(case, name).shape[2:])))
        for name in ("q", "k", "v", "do")
    }
    garbage |= {"g": np.zeros_like(case.g[:, :1]), "beta": np.zeros_like(case.beta[:, :1])}
    longer = {
        name: np.concatenate([getattr(case, name)[:, :at], garbage[name], getattr(case, name)[:, at:]], axis=1)
        for name in TOKENWISE
    }
    got = trial.run(case.but(**longer)).numbers()
    yield from trial.judge({"o": np.delete(got["o"], at, axis=1), "S": got["S"]}, trial.yard.exact)


def _reset_at(trial: Trial, value: float) -> Iterable[Measure]:
    base = trial.case
    at = trial.dice("reset").integer(0, base.T)
    g = base.g.copy()
    g[:, at] = value
    case = base.but(
        g=g, S0=trial.dice("S0").normal(base.dS.shape) if "initial_state" not in trial.target.refused else None
    )
    fresh = case.tokens(at, case.T).but(S0=None)
    whole, alone = trial.run(case), trial.run(fresh)
    yield from trial.agree(case, whole, label="whole ")
    got, yard = whole.numbers(), yardstick.measure(fresh, trial.contract, False)
    yield from trial.pair({"o": got["o"][:, at:], "S": got["S"]}, alone.numbers(), yard)


@claim("tolerance", every(plain, takes("g = -inf")))
def reset(trial: Trial) -> Iterable[Measure]:
    """A gate of minus infinity forgets everything: from that token on o equals a fresh start from S = 0, never NaN.

    Would have caught: inf - inf in cumulated gates, every kernel that divides decays.
    """
    yield from _reset_at(trial, -np.inf)


@claim("tolerance", every(plain, takes("g < -5")))
def finite_reset(trial: Trial) -> Iterable[Measure]:
    """A gate of -1000 forgets like minus infinity: exp underflows to 0.

    Would have caught: cumulated gates whose differences lose all bits (error 3.5e-3 at 58 such tokens), FlashKDA #7,
    flashinfer #5032.
    """
    yield from _reset_at(trial, -1000.0)


@claim("bitwise", tokens)
def final_state_flag(trial: Trial) -> Iterable[Measure]:
    """output_final_state=False returns None for the state and the same bits of o.

    Would have caught: a flag that selects another kernel, states written although nobody asked.
    """
    without = trial.run(trial.case, final_state=False)
    yield Measure("final_state is None", float(without.S is not None), 0)
    yield same_bits("o", without.o, trial.forward.o)
