"""A pool lives through anything that an engine does, and every sequence in it stays what the definition says."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import kda_spec
from impls import fused_recurrent_kda
from impls.decode import STEPS, ShortConvolution, decode_kda
from kda_spec import gates
from kda_spec.layers import short_convolution, silu
from kda_spec.types import Inputs

H, HV, K, V, S, W, R = 1, 2, 3, 4, 8, 3, 6
SIZES = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV,)}
BOUND = 1e-6
"""Relative to the norm of what is compared: twice the worst of 1,651 comparisons, 4.9e-7."""
GAP = 5
"""Elements of a page behind the state."""
MOST = 3
"""Tokens of a speculative step."""


class Sequence:
    """What the definition knows of a sequence: its raw tokens, those not yet accepted last, and where it lies."""

    def __init__(self, slot: int, ring: int):
        self.slots, self.ring, self.pending = [slot], ring, 0
        self.tokens = {name: np.zeros((0, *x)) for name, x in SIZES.items()}

    def take(self, tokens: dict[str, np.ndarray]) -> None:
        self.tokens = {name: np.concatenate((x, tokens[name])) for name, x in self.tokens.items()}

    def drop(self, count: int) -> None:
        self.tokens = {name: x[: len(x) - count] for name, x in self.tokens.items()}

    @property
    def length(self) -> int:
        return len(self.tokens["q"])


class Pool(RuleBasedStateMachine):
    """Pages of states and a pool of rings, NaN in what is free and between: whoever reads or writes there is seen."""

    implementation = ""

    @initialize(seed=st.integers(0, 2**20))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.A_log, self.dt_bias = self.random.normal(size=HV), self.random.normal(size=HV * K)
        self.weights = {name: self.random.normal(size=(np.prod(SIZES[name]), W)) for name in "qkv"}
        self.pages = torch.full((S, HV * K * V + GAP), torch.nan)
        self.state = self.pages[:, :-GAP].view(S, HV, K, V)
        widths = [len(x) for x in self.weights.values()]
        rings = torch.full((S, R, sum(widths)), torch.nan).split(widths, 2)
        self.rings = dict(zip(self.weights, rings, strict=True))
        self.free, self.free_rings, self.live = list(range(S)), list(range(S))[::-1], []

    def drawn(self, T: int) -> dict[str, np.ndarray]:
        return {name: np.float32(self.random.normal(size=(T, *x))).astype(float) for name, x in SIZES.items()}

    def activated(self, sequence: Sequence) -> list[np.ndarray]:
        """Return q, k, v, g, beta [1, T, ..] of a sequence from its first token, convolved and activated."""
        x = {name: array[None] for name, array in sequence.tokens.items()}
        for name, weight in self.weights.items():
            flat, tail = x[name].reshape(1, sequence.length, -1), np.zeros((1, W - 1, len(weight)))
            x[name] = silu(short_convolution(flat, weight[:, None], tail)[0]).reshape(x[name].shape)
        g = gates.softplus_gate(x["g"], self.A_log, self.dt_bias.reshape(HV, K))
        return [gates.l2norm(x["q"]), gates.l2norm(x["k"]), x["v"], g, gates.beta_sigmoid(x["beta"])]

    def expected(self, sequence: Sequence) -> kda_spec.types.Outputs:
        return kda_spec.recurrent(Inputs(*self.activated(sequence)))

    @precondition(lambda self: self.free)
    @rule(T=st.integers(1, 4))
    def prefill(self, T):
        """Take a free slot, run a prompt outside of the pool, and put in what it leaves."""
        sequence = Sequence(self.free.pop(0), self.free_rings.pop(0))
        sequence.take(self.drawn(T))
        inputs = [torch.from_numpy(np.float32(x)) for x in self.activated(sequence)]
        _, final = fused_recurrent_kda(*inputs, output_final_state=True)
        slot = sequence.slots[0]
        self.state[slot] = final[0]
        for name, ring in self.rings.items():
            for p in range(max(0, T - W + 1), T):
                ring[sequence.ring, p % R] = torch.from_numpy(np.float32(sequence.tokens[name][p].ravel()))
        self.live.append(sequence)

    def convolution(self, batch: list[Sequence | None], before: list[int]) -> ShortConvolution:
        weights = [torch.from_numpy(np.float32(self.weights[name])) for name in "qkv"]
        named = torch.tensor([x.ring if x else -1 for x in batch])
        return ShortConvolution(*weights, *(self.rings[name] for name in "qkv"), torch.tensor(before), named)

    def stepped(self, batch: list[Sequence | None], T: int, indices: torch.Tensor, accepted=None) -> None:
        """Take T new tokens for every sequence of a batch, None being padding, and compare."""
        before = [x.length if x else 0 for x in batch]
        tokens = [self.drawn(T) for _ in batch]
        inputs = [torch.from_numpy(np.float32(np.stack([x[name] for x in tokens]))) for name in SIZES]
        for sequence, own in zip(batch, tokens, strict=True):
            if sequence:
                sequence.take(own)
        o = decode_kda(
            *inputs, self.state, implementation=self.implementation, ssm_state_indices=indices,
            num_accepted_tokens=accepted, convolution=self.convolution(batch, before),
            A_log=torch.from_numpy(np.float32(self.A_log)), dt_bias=torch.from_numpy(np.float32(self.dt_bias)),
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        for n, sequence in enumerate(batch):
            if sequence is None:
                assert not o[n].any()
            else:
                self.compare(o[n], self.expected(sequence).o[0, -T:])

    def compare(self, x: torch.Tensor, exact: np.ndarray) -> None:
        assert np.linalg.norm(x.double().numpy() - exact) <= BOUND * max(np.linalg.norm(exact), 1.0)

    def settled(self) -> list[Sequence]:
        return [x for x in self.live if not x.pending]

    @precondition(lambda self: self.settled())
    @rule(T=st.integers(1, 3), data=st.data())
    def decode(self, T, data):
        """Step some sequences together, in any order, with padding among them."""
        some = data.draw(st.permutations(self.settled()))[: data.draw(st.integers(1, 4))]
        batch = [*some, *[None] * data.draw(st.integers(0, 2))]
        self.stepped(batch, T, torch.tensor([x.slots[0] if x else -1 for x in batch]))

    @precondition(lambda self: self.settled() and len(self.free) >= MOST - 1)
    @rule(data=st.data())
    def speculate(self, data):
        """Take several tokens with a slot for each; how many are right is not known yet."""
        sequence = data.draw(st.sampled_from(self.settled()))
        sequence.slots += [self.free.pop(0) for _ in range(MOST - 1)]
        self.stepped([None, sequence], MOST, torch.tensor([[-1] * MOST, sequence.slots]))
        sequence.pending = MOST

    @precondition(lambda self: [x for x in self.live if x.pending])
    @rule(accepted=st.integers(1, MOST), data=st.data())
    def accept(self, accepted, data):
        """Go on behind as many tokens as were accepted; the others are forgotten."""
        sequence = data.draw(st.sampled_from([x for x in self.live if x.pending]))
        sequence.drop(sequence.pending - accepted)
        self.stepped(
            [sequence, None], MOST, torch.tensor([sequence.slots, [-1] * MOST]), torch.tensor([accepted, MOST])
        )

    @precondition(lambda self: [x for x in self.live if x.pending])
    @rule(accepted=st.integers(1, MOST), data=st.data())
    def settle(self, accepted, data):
        """Accept tokens, and go on without speculating from the slot of the last one; the ring stays the sequence's."""
        sequence = data.draw(st.sampled_from([x for x in self.live if x.pending]))
        sequence.drop(sequence.pending - accepted)
        kept = sequence.slots.pop(accepted - 1)
        self.state[sequence.slots] = torch.nan
        self.free += sequence.slots
        sequence.slots, sequence.pending = [kept], 0

    @precondition(lambda self: self.settled() and self.free)
    @rule(data=st.data())
    def fork(self, data):
        """Copy a state and a ring: both go their own ways from there."""
        old = data.draw(st.sampled_from(self.settled()))
        new = Sequence(self.free.pop(0), self.free_rings.pop(0))
        new.take(old.tokens)
        self.state[new.slots[0]] = self.state[old.slots[0]]
        for ring in self.rings.values():
            ring[new.ring] = ring[old.ring]
        self.live.append(new)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        """Give the slots and the ring of a sequence back, poisoned."""
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.free += sequence.slots
        self.free_rings.append(sequence.ring)
        self.state[sequence.slots] = torch.nan
        for ring in self.rings.values():
            ring[sequence.ring] = torch.nan

    def teardown(self):
        """Compare the state of every sequence that is left, too, and what lies where nobody is."""
        if hasattr(self, "pages"):
            assert self.pages[:, -GAP:].isnan().all() and self.state[self.free].isnan().all()
        for sequence in getattr(self, "live", []):
            if not sequence.pending:
                self.compare(self.state[sequence.slots[0]], self.expected(sequence).final_state[0])


@pytest.mark.parametrize("name", STEPS)
def test_a_pool_lives_through_anything(name):
    machine = type("Machine", (Pool,), {"implementation": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=30, stateful_step_count=12, deadline=None, derandomize=True)
    )
