"""The decode step on a pool of states agrees with the definition, and touches nothing but its own slots."""

from dataclasses import replace

import pytest
import torch
from steps_drawn import FLOAT32, NAMES, Pool, assert_close, drawn, expected

from impls import decode_triton
from impls.configs import RecurrentTritonConfig
from verify.__main__ import main
from verify.session import PASS

CASES = {
    "one token": {},
    "eight tokens": {"T": 8},
    "value first": {"v_first": True, "K": 17, "V": 20},
    "grouped heads": {"H": 2, "HV": 4, "T": 2},
    "several value tiles": {"K": 16, "V": 40},
    "convolution of 2": {"W": 2, "T": 3},
    "convolution of 4": {"W": 4, "H": 1, "HV": 2},
    "convolution of 4, eight tokens": {"W": 4, "T": 8, "V": 40},
    "norm": {"norm": "sigmoid", "V": 40},
    "all": {"W": 4, "norm": "silu", "T": 2, "H": 2, "HV": 4, "K": 17, "V": 20, "v_first": True},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_agrees_with_the_definition_and_leaves_other_slots_alone(name, case):
    made = drawn(**case)
    before, used = made.state.clone(), made.indices.tolist()
    wanted = [expected(made, n, before[slot]) for n, slot in enumerate(used)]
    o = made.step(name)
    for n, (slot, (exact, states)) in enumerate(zip(used, wanted, strict=True)):
        assert_close(o[n], exact, FLOAT32)
        S = made.state[slot].mT if made.keywords["state_v_first"] else made.state[slot]
        assert_close(S, states[-1], FLOAT32)
    others = [slot for slot in range(len(before)) if slot not in used]
    assert torch.equal(made.state[others], before[others])


@pytest.mark.parametrize("name", NAMES)
def test_rings_hold_the_raw_inputs_by_position_and_nothing_else_changes(name):
    made = drawn(W=3, T=2)
    rings = {part: getattr(made.convolution, f"{part}_ring") for part in "qkv"}
    before = {part: ring.clone() for part, ring in rings.items()}
    made.step(name)
    for part, x in zip("qkv", made.inputs, strict=False):
        for n, slot in enumerate(made.indices.tolist()):
            for t in range(2):
                row = (int(made.convolution.position[n]) + t) % rings[part].shape[1]
                assert torch.equal(rings[part][slot, row], x[n, t].flatten())
                before[part][slot, row] = rings[part][slot, row]
        assert torch.equal(rings[part], before[part])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [{}, {"W": 4, "norm": "silu"}, {"T": 3}], ids=str)
def test_padding_writes_nothing_but_zeros_into_its_own_output(name, case):
    made = drawn(**case)
    made.indices[1] = -1
    made.inputs[2][1] = torch.nan
    if made.convolution:
        made.convolution.position[1] = -1
    pools = [made.state, *(getattr(made.convolution, f"{x}_ring") for x in "qkv" if made.convolution)]
    before = [x.clone() for x in pools]
    o = made.step(name)
    assert torch.equal(o[1], torch.zeros_like(o[1])) and o.isfinite().all()
    for x, old in zip(pools, before, strict=True):
        assert torch.equal(x[[0, 1, 2, 3, 6]], old[[0, 1, 2, 3, 6]]) and not torch.equal(x[5], old[5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("v_first", [False, True])
def test_a_slot_for_each_token_and_a_start_behind_those_that_were_accepted(name, v_first):
    made = drawn(T=3, N=2, S=9, v_first=v_first, W=4)
    made.indices = torch.tensor([[5, 2, 8], [4, 7, -1]])
    before, accepted = made.state.clone(), torch.tensor([2, 1])
    wanted = [expected(made, 0, before[2]), expected(made, 1, before[4])]
    o = made.step(name, num_accepted_tokens=accepted)
    for n, (exact, states) in enumerate(wanted):
        assert_close(o[n], exact, FLOAT32)
        for slot, S in zip(made.indices[n].tolist(), states, strict=True):
            if slot >= 0:
                assert_close(made.state[slot].mT if v_first else made.state[slot], S, FLOAT32)
    assert torch.equal(made.state[[0, 1, 3, 6]], before[[0, 1, 3, 6]])


@pytest.mark.parametrize("name", NAMES)
def test_rejected_tokens_are_forgotten(name):
    """Three tokens of which one is accepted, then two others: as if the two rejected ones had never been."""
    long, short = drawn(T=3, N=1, W=4, S=9), drawn(T=3, N=1, W=4, S=9)
    slots = torch.tensor([[5, 2, 8]])
    long.indices = short.indices = slots
    long.step(name)
    ours = [x[:, 1:] * 2 for x in long.inputs]
    moved = replace(long.convolution, position=long.convolution.position + 1)
    again = Pool(ours, long.state, torch.tensor([[5, 2]]), long.keywords, moved)
    # the ring is that of the sequence's first slot, and the step starts where the first token left
    o = again.step(name, num_accepted_tokens=torch.tensor([1]))
    short.inputs = [torch.cat((x[:, :1], y), 1) for x, y in zip(short.inputs, ours, strict=True)]
    assert torch.equal(o, short.step(name)[:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_out_of_place_leaves_the_pool_alone(name):
    made, there = drawn(T=2), torch.full_like(drawn().state, 7.0)
    before = made.state.clone()
    o = made.step(name, final_state=there)
    assert torch.equal(made.state, before) and bool((there[[0, 1, 3, 6]] == 7).all())
    assert torch.equal(made.step(name), o) and torch.equal(made.state[made.indices], there[made.indices])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_pool_in_bfloat16_is_rounded_once_a_step(name, dtype):
    made = drawn(dtype=dtype, pool=torch.bfloat16)
    before = made.state.clone()
    o = made.step(name)
    for n, slot in enumerate(made.indices.tolist()):
        exact, states = expected(made, n, before[slot])
        assert_close(o[n], exact, torch.finfo(dtype).eps / 2)
        assert_close(made.state[slot], states[-1], 2.0**-9)


@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_change_no_bits(tile):
    config = RecurrentTritonConfig(value_tile=tile)
    first, second = drawn(K=16, V=40, W=2), drawn(K=16, V=40, W=2)
    assert torch.equal(first.step("decode_triton", config=config), second.step("decode_triton"))
    assert torch.equal(first.state, second.state)


def test_a_configuration_reaches_the_compiler(monkeypatch):
    seen, config = [], RecurrentTritonConfig(value_tile=16, warps=2, stages=3, registers=128)
    monkeypatch.setattr(decode_triton.Launch, "run", lambda self, *others: seen.append(self.options))
    drawn().step("decode_triton", config=config)
    assert (seen[0]["num_warps"], seen[0]["num_stages"], seen[0]["maxnreg"]) == (2, 3, 128)


def test_more_programs_than_a_grid_holds_are_launched_in_parts(monkeypatch):
    whole, parts = drawn(T=2, W=2), drawn(T=2, W=2)
    o = whole.step("decode_triton")
    launches, real = [], decode_triton.Launch.run

    def counted(self, buffers, scalars, programs):
        launches.append(programs)
        real(self, buffers, scalars, programs)

    monkeypatch.setattr(decode_triton.Launch, "run", counted)
    monkeypatch.setattr(decode_triton, "GRID", 4)
    assert torch.equal(parts.step("decode_triton"), o) and torch.equal(parts.state, whole.state)
    assert launches == [4, 2]


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed(tmp_path):
    """A file with holes: 8.6 GB of addresses, of which two slots are ever touched."""
    made, slots = drawn(N=1, K=128, V=128, HV=1), 2**31 // 128**2 + 3
    pool = torch.from_file(str(tmp_path / "pool"), shared=True, size=slots * 128**2).view(slots, 1, 128, 128)
    last = slots - 1
    pool[last] = made.state[5]
    small = made.step("decode_triton")
    made.indices = torch.tensor([last])
    beyond = replace(made, state=pool).step("decode_triton")
    assert torch.equal(beyond, small) and torch.equal(pool[last], made.state[5])
    assert not pool[last - 2**31 // 128**2].any(), "what a 32-bit offset would have hit"


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr("impls.decode_checks._readable", lambda q: False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slot", [7, -5, 2**40])
def test_wrong_slots_on_a_device_are_padding(unread, name, slot):
    made, others = drawn(W=3), [0, 1, 2, 3, 6]
    made.indices[1], before, ring = slot, made.state.clone(), made.convolution.q_ring.clone()
    o = made.step(name)
    assert not o[1].any() and torch.equal(made.state[others], before[others])
    assert torch.equal(made.convolution.q_ring[others], ring[others])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_numbers_on_a_device_are_clamped(unread, name):
    """Positions before the first token would write into another ring, accepted tokens beyond the last read nowhere."""
    wrong, right = (drawn(T=2, N=2, W=3) for _ in range(2))
    wrong.indices = right.indices = torch.tensor([[5, 2], [4, 3]])
    for made, positions in ((wrong, [-1, 4]), (right, [0, 4])):
        made.convolution = replace(made.convolution, position=torch.tensor(positions))
    o = wrong.step(name, num_accepted_tokens=torch.tensor([0, 9]))
    assert torch.equal(o, right.step(name, num_accepted_tokens=torch.tensor([1, 2])))
    assert torch.equal(wrong.state, right.state) and torch.equal(wrong.convolution.v_ring, right.convolution.v_ring)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_is_padding_where_its_start_is_or_its_ring(name):
    """Not where a later token has no slot: that one is computed, and leaves no state."""
    made = drawn(T=2, S=9, W=2)
    made.indices = torch.tensor([[-1, 2], [4, -1], [0, 6]])
    before, ring = made.state.clone(), made.convolution.v_ring.clone()
    o = made.step(name, num_accepted_tokens=torch.tensor([2, 2, 1]))
    assert not o[:2].any() and bool(o[2].any(dim=(1, 2)).all())
    assert torch.equal(made.state[[2, 4]], before[[2, 4]]) and torch.equal(made.convolution.v_ring[4], ring[4])


REFUSED = {
    "T = 9": ({"T": 9}, {}, "from 1 to 8 tokens"),
    "a slot that is not there": ({}, {"ssm_state_indices": torch.tensor([0, 7, 1])}, "from -1 to 6, got 0 to 7"),
    "a slot twice": ({}, {"ssm_state_indices": torch.tensor([1, 1, 2])}, "no slot twice"),
    "slots of another number": ({}, {"ssm_state_indices": torch.tensor([1, 2])}, r"shape \[3\] or \[3, 1\]"),
    "accepted without slots": ({"T": 2}, {"num_accepted_tokens": torch.ones(3).int()}, "a slot for each token"),
    "no token": ({}, {"ssm_state_indices": drawn().indices[:, None], "num_accepted_tokens": torch.arange(3)}, "1 to 1"),
    "too small a pool": ({"S": 2}, {"ssm_state_indices": None}, "a slot for each of N = 3"),
    "another pool": ({}, {"final_state": torch.zeros(7, 2, 6, 5).bfloat16()}, "final_state must be like state"),
    "another layout": ({}, {"state_v_first": True}, r"S, HV, V, K\] = \[7, 2, 5, 6\]"),
    "another out": ({}, {"out": torch.zeros(3, 1, 2, 6)}, "out must have shape"),
    "weights in int32": ({"W": 2}, {"convolution.k_weight": torch.ones(6, 2).int()}, "k_weight must be one of"),
    "no weights": ({"W": 2}, {"convolution.q_weight": None}, "q_weight must be a torch.Tensor"),
    "a ring's rows": ({"W": 2}, {"convolution.q_ring": torch.zeros(7, 1, 6)}, "at least W - 1 [+] T = 2 rows"),
    "a position": ({"W": 2}, {"convolution.position": torch.tensor([0, -1, 3])}, "from 0 on, got -1"),
    "norm's weight": ({"norm": "silu"}, {"norm.weight": [1.0] * 5}, "norm.weight must be a torch.Tensor"),
    "norm's gate in int32": ({"norm": "silu"}, {"norm.gate": torch.ones(3, 1, 2, 5).int()}, "gate must be one of"),
    "epsilon": ({"norm": "silu"}, {"norm.epsilon": -1.0}, "norm.epsilon must be a number from 0 on"),
    "activation": ({"norm": "silu"}, {"norm.activation": "relu"}, "norm.activation must be one of"),
    "a gradient": ({"norm": "silu"}, {"norm.weight": torch.ones(5).requires_grad_()}, "not differentiable"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named_and_nothing_changes(case):
    shape, changed, message = case
    made, others = drawn(**shape), {}
    for name, x in changed.items():
        part, _, field = name.partition(".")
        others[part] = replace(getattr(made, part), **{field: x}) if field else x
    before = made.state.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        made.step("decode_torch", **others)
    assert torch.equal(made.state, before)


SHARED = {
    "out must share no memory with v": lambda made, room: {"out": made.inputs[2]},
    "final_state must share no memory with state": lambda made, room: {"final_state": room[1:]},
    "q_ring must share no memory with k_ring": lambda made, _: {
        "convolution": replace(made.convolution, k_ring=made.convolution.q_ring)
    },
}


@pytest.mark.parametrize("message", SHARED)
def test_what_is_written_shares_no_memory(message):
    made, room = drawn(W=2), torch.ones(8, 2, 6, 5)
    made.state = room[:7]
    written = (room, made.inputs[2], made.convolution.q_ring)
    before = [x.clone() for x in written]
    with pytest.raises(ValueError, match=message):
        made.step("decode_torch", **SHARED[message](made, room))
    assert all(map(torch.equal, written, before))


def test_a_pool_may_be_named_as_its_own_other_one():
    first, second = drawn(), drawn()
    assert torch.equal(first.step("decode_torch", final_state=first.state), second.step("decode_torch"))
    assert torch.equal(first.state, second.state)


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="cu_seqlens"):
        drawn().step("decode_torch", cu_seqlens=None)
    with pytest.raises(KeyError, match="known: decode_triton, decode_torch"):
        drawn().step("decode_cuda")


@pytest.mark.parametrize("arguments", [["by_torch"], ["by_triton", "--device", "interpret"]], ids=lambda x: x[0])
def test_the_judge_of_recurrences_finds_nothing_in_steps(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    name, *device = arguments
    assert main([f"impls.decode_steps:{name}", "--profile", "smoke", *device]) == PASS
    assert "no counterexample" in capfd.readouterr().out
