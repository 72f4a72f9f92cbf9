"""The property of a life among others: what an engine does to the states of many sequences, against the definition."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from verify.cases import TOKENWISE, Case
from verify.claims import claim, every, takes, tokens
from verify.families import materialise
from verify.trial import Measure, TargetRaised, Trial

SLOTS = 4
"""Sequences that live at once."""
SOURCE = 24
"""Tokens of every row that sequences are made of."""
MOST_STEPS = 10


def joined(cases: list[Case], axis: int) -> Case:
    """Put pieces one after the other (axis 1), or sequences into one batch (axis 0); the states are the caller's."""
    rows = {name: np.concatenate([getattr(x, name) for x in cases], axis=axis) for name in TOKENWISE}
    dS = cases[0].dS if axis else np.concatenate([x.dS for x in cases])
    return cases[0].but(**rows, dS=dS)


@dataclass
class Sequence:
    """A sequence of an engine: the tokens that it has taken, what came out for them, and its state [1, HV, K, V]."""

    state: np.ndarray
    taken: list[Case] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)

    def take(self, piece: Case, o: np.ndarray, state: np.ndarray) -> None:
        """Go on by the tokens of a piece."""
        self.taken.append(piece)
        self.outputs.append(o)
        self.state = state


class Engine(RuleBasedStateMachine):
    """Slots with sequences in them, and what an engine does: every call goes to the target, states go by hand."""

    trial: Trial
    found: list[Measure]

    @initialize()
    def begin(self):
        recipe = replace(self.trial.recipe, B=SLOTS, T=SOURCE, lengths=(), state=False)
        self.source = materialise(recipe).but(activation=self.trial.case.activation)
        self.live: list[Sequence] = []
        self.drawn, self.dead, self.story = 0, False, []
        for n in (3, 1):
            self.prefilled(n)

    def fresh(self, n: int) -> Case:
        """Return n tokens that no sequence has met, until all rows are used up."""
        row, start = divmod(self.drawn, SOURCE)
        start = min(start, SOURCE - n)
        self.drawn = (row * SOURCE + start + n) % (SLOTS * SOURCE)
        return self.source.sequence(row).tokens(start, start + n)

    def run(self, case: Case, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            got = self.trial.run(case.but(S0=state)).numbers()
        except TargetRaised as error:
            self.dead = True
            self.found.append(Measure(f"{self.told()}raised {error}", np.inf, 0))
            return np.full(case.v.shape, np.nan), np.full(state.shape, np.nan)
        return got["o"], got["S"]

    def told(self) -> str:
        return ", ".join(self.story) + ": "

    @precondition(lambda self: not self.dead and len(self.live) < SLOTS)
    @rule(n=st.integers(1, 6))
    def prefill(self, n):
        """Read a prompt into a free slot."""
        self.prefilled(n)

    def prefilled(self, n: int) -> None:
        self.story.append(f"prefill {n}")
        sequence, piece = Sequence(np.zeros_like(self.source.dS[:1])), self.fresh(n)
        sequence.take(piece, *self.run(piece, sequence.state))
        self.live.append(sequence)

    @precondition(lambda self: not self.dead)
    @rule(data=st.data())
    def decode(self, data):
        """Take one token of some sequences together, in any order."""
        order = data.draw(st.permutations(range(len(self.live))))[data.draw(st.integers(0, len(self.live) - 1)) :]
        self.story.append(f"decode {' '.join(map(str, order))}")
        batch, pieces = [self.live[n] for n in order], [self.fresh(1) for _ in order]
        o, S = self.run(joined(pieces, 0), np.concatenate([x.state for x in batch]))
        for n, (sequence, piece) in enumerate(zip(batch, pieces, strict=True)):
            sequence.take(piece, o[n : n + 1], S[n : n + 1])

    @precondition(lambda self: not self.dead)
    @rule(drafted=st.integers(2, 3), accepted=st.integers(0, 3), data=st.data())
    def speculate(self, drafted, accepted, data):
        """Take drafted tokens at once, keep what comes out for those that are accepted, and go on behind them."""
        at, accepted = data.draw(st.integers(0, len(self.live) - 1)), min(accepted, drafted)
        self.story.append(f"draft {drafted} accept {accepted} of {at}")
        sequence, piece = self.live[at], self.fresh(drafted)
        o, S = self.run(piece, sequence.state)
        if accepted:
            kept = piece.tokens(0, accepted)
            S = S if accepted == drafted else self.run(kept, sequence.state)[1]
            sequence.take(kept, o[:, :accepted], S)

    @precondition(lambda self: not self.dead and len(self.live) < SLOTS)
    @rule(data=st.data())
    def fork(self, data):
        """Copy a slot: both go their own ways from there."""
        at = data.draw(st.integers(0, len(self.live) - 1))
        self.story.append(f"fork {at}")
        old = self.live[at]
        self.live.append(Sequence(old.state.copy(), list(old.taken), list(old.outputs)))

    @precondition(lambda self: not self.dead and len(self.live) == SLOTS)
    @rule(data=st.data())
    def free(self, data):
        """End a sequence; the others move up."""
        at = data.draw(st.integers(0, len(self.live) - 1))
        self.story.append(f"free {at}")
        self.judge(self.live.pop(at))

    @precondition(lambda self: self.dead)
    @rule()
    def rest(self):
        """Do nothing: the target has raised."""

    def judge(self, sequence: Sequence) -> None:
        """Compare all that came out for a sequence, and its state, with the definition of its whole history."""
        if sequence.taken and not self.dead:
            case = joined(sequence.taken, 1).but(S0=None)
            got = {"o": np.concatenate(sequence.outputs, axis=1), "S": sequence.state}
            self.found.extend(self.trial.agree_numbers(case, got, label=self.told()))

    def teardown(self):
        for sequence in getattr(self, "live", ()):
            self.judge(sequence)


@claim("tolerance", every(tokens, takes("initial_state")), most=2)
def serving(trial: Trial) -> Iterable[Measure]:
    """An engine's life: prefill, decode in batches of any order, fork, free, and drafts of which n are accepted.

    What came out for all tokens that a sequence has taken, and its state, equal the definition of its whole history,
    whatever happened in between (a Hypothesis state machine; more steps where the recipe has more tokens).

    Would have caught: sglang #31474 (snapshots of states that are garbage), vLLM #50021, #52792 (states of tokens that
    were not accepted), prefill and decode that disagree, results kept from an earlier call.
    """
    machine = type("Life", (Engine,), {"trial": trial, "found": []})
    hypothesis.seed(trial.recipe.seed)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=trial.demands.lives,
            stateful_step_count=min(2 + trial.recipe.T, MOST_STEPS),
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            print_blob=False,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        ),
    )
    yield from machine.found
