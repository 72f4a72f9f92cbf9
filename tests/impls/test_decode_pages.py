"""Pools lie as an engine keeps them: states and rings in the pages of one buffer, and a ring for a sequence by name."""

import random
from dataclasses import replace

import pytest
import torch
from steps_drawn import FLOAT32, NAMES, array, assert_close, drawn

from impls import RecurrentTorchConfig, decode_torch, overlap

RINGS = ("q_ring", "k_ring", "v_ring")
SEVERAL = torch.tensor([[5, 2], [4, 0], [6, 3]])


def paged(made, room=3):
    """Return the step with pages of NaN that hold a state, a gap, the rings as columns, and a gap; and the buffer."""
    rings = [getattr(made.convolution, name) for name in RINGS] if made.convolution else []
    R, line = (rings[0].shape[1], sum(x.shape[2] for x in rings)) if rings else (0, 0)
    held = made.state[0].numel()
    size = held + room + R * line + room
    buffer = torch.full((len(made.state), size), torch.nan)
    state = buffer[:, :held].view(made.state.shape)
    state.copy_(made.state)
    if not rings:
        return replace(made, state=state), buffer
    columns = buffer[:, held + room : size - room].view(len(buffer), R, line).split([x.shape[2] for x in rings], 2)
    for new, old in zip(columns, rings, strict=True):
        new.copy_(old)
    convolution = replace(made.convolution, **dict(zip(RINGS, columns, strict=True)))
    return replace(made, state=state, convolution=convolution), buffer


CASES = {
    "states": {},
    "value first, tiles": {"v_first": True, "K": 17, "V": 40},
    "rings": {"W": 4, "T": 3},
    "all": {"W": 3, "norm": "silu", "H": 2, "HV": 4},
    "slots for each token": {"T": 2, "W": 4, "S": 8},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pages_have_the_bits_of_dense_pools_and_keep_what_else_they_hold(name, case):
    dense = drawn(**case)
    dense.indices = SEVERAL if case.get("S") else dense.indices
    made, buffer = paged(dense)
    o = made.step(name)
    assert torch.equal(o, dense.step(name))
    _, expected = paged(dense)
    assert torch.equal(buffer.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_pages_of_another_pool_take_the_states(name):
    dense, there = drawn(T=2), torch.zeros(drawn().state.shape)
    made, _ = paged(dense)
    other, buffer = paged(replace(dense, state=there), room=5)
    o = made.step(name, final_state=other.state)
    assert torch.equal(made.state, dense.state) and bool(buffer[:, -10:].isnan().all())
    assert torch.equal(dense.step(name, final_state=there), o) and torch.equal(other.state, there)


WORKED = {
    "in place": {},
    "rings, norm": {"W": 4, "norm": "silu", "H": 2, "HV": 4},
    "slots for each token": {"T": 3, "S": 9},
}


@pytest.mark.parametrize("case", WORKED.values(), ids=WORKED)
@pytest.mark.parametrize("v_first", [False, True], ids=["key first", "value first"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "into another pool"])
def test_torch_works_on_states_where_they_lie_as_on_copies(case, elsewhere, v_first, monkeypatch):
    """One sequence starts behind its second token, and leaves no state behind its last. Key first bits are equal."""
    found = []
    for least in (1, 2**30):
        monkeypatch.setattr(decode_torch, "ALONE_ELEMENTS", least)
        made = drawn(K=16, V=32, v_first=v_first, **case)
        others = {"final_state": torch.full_like(made.state, torch.nan)} if elsewhere else {}
        if case.get("S"):
            made.indices = torch.tensor([[5, 2, 8], [4, 7, -1], [6, 3, 1]])
            others["num_accepted_tokens"] = torch.tensor([2, 1, 3])
        o = made.step("decode_torch", **others)
        found.append([o, made.state, *others.values()])
    for x, y in zip(*([x.nan_to_num(7) for x in one] for one in found), strict=True):
        assert_close(x, array(y), FLOAT32 if v_first else 0)


@pytest.mark.slow
@pytest.mark.parametrize("v_first", [False, True], ids=["key first", "value first"])
def test_compiled_steps_agree_with_the_others_where_states_lie_and_in_copies(v_first, monkeypatch):
    case = {"K": 16, "V": 32, "T": 2, "v_first": v_first}
    usual = drawn(**case)
    exact = usual.step("decode_torch", config=RecurrentTorchConfig())
    for least in (1, 2**30):
        monkeypatch.setattr(decode_torch, "ALONE_ELEMENTS", least)
        made = drawn(**case)
        assert_close(made.step("decode_torch", config=RecurrentTorchConfig(compile=True)), array(exact), FLOAT32)
        assert_close(made.state, array(usual.state), FLOAT32)


def test_rings_without_positions_hold_the_last_inputs_in_their_first_rows():
    for name in NAMES:
        with_positions, without = (drawn(W=3, T=2) for _ in range(2))
        for made, position in ((with_positions, torch.tensor([2, 2, 2])), (without, None)):
            made.convolution = replace(made.convolution, position=position)
        assert torch.equal(without.step(name), with_positions.step(name))
        assert all(torch.equal(getattr(without.convolution, x), getattr(with_positions.convolution, x)) for x in RINGS)


@pytest.mark.parametrize("name", NAMES)
def test_slots_more_than_two_to_the_31_elements_apart_are_addressed(name, tmp_path):
    """A file with holes: 8.6 GB of addresses, of which two slots are ever touched."""
    made, apart = drawn(N=1, S=2), 2**31 + 4
    made.indices = torch.tensor([1])
    room = torch.from_file(str(tmp_path / "pages"), shared=True, size=apart + made.state[1].numel())
    far = room.as_strided(made.state.shape, (apart, *made.state.stride()[1:]))
    far.copy_(made.state)
    o = replace(made, state=far).step(name)
    assert torch.equal(o, made.step(name)) and torch.equal(far, made.state)


@pytest.mark.parametrize("name", NAMES)
def test_a_ring_that_is_named_serves_a_sequence_wherever_its_states_are(name):
    """As with the first slot of each, though that moves, out of a pool of rings of its own, here in another order."""
    by_slot, by_name = (drawn(T=2, W=4, S=8) for _ in range(2))
    by_slot.indices = SEVERAL
    moved, order = torch.tensor([[1, 2], [7, 0], [0, 3]]), torch.tensor([2, 9, 4])
    moved[2, 0] = 6
    by_name.indices = moved
    by_name.state[moved[:, 0]] = by_slot.state[SEVERAL[:, 0]]
    rings = {x: torch.full((10, *getattr(by_slot.convolution, x).shape[1:]), torch.nan) for x in RINGS}
    for x, ring in rings.items():
        ring[order] = getattr(by_slot.convolution, x)[SEVERAL[:, 0]]
    by_name.convolution = replace(by_name.convolution, conv_state_indices=order, **rings)
    assert torch.equal(by_name.step(name), by_slot.step(name))
    assert torch.equal(by_name.state[moved], by_slot.state[SEVERAL])
    for x, ring in rings.items():
        assert torch.equal(ring[order], getattr(by_slot.convolution, x)[SEVERAL[:, 0]])
        assert bool(ring[[0, 1, 3, 5, 6, 7, 8]].isnan().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots", [None, torch.tensor([0, 1, 2])], ids=["no slots", "slots"])
def test_a_sequence_without_a_ring_is_padding(name, slots):
    made = drawn(W=2)
    made.indices = slots
    made.convolution = replace(made.convolution, conv_state_indices=torch.tensor([3, -1, 0]))
    before, rings = made.state.clone(), made.convolution.v_ring.clone()
    o = made.step(name)
    assert not o[1].any() and bool(o[[0, 2]].any(dim=(1, 2, 3)).all())
    assert torch.equal(made.state[1], before[1]) and not torch.equal(made.state[2], before[2])
    assert torch.equal(made.convolution.v_ring[[1, 2, 4]], rings[[1, 2, 4]])


def changed(**fields):
    return lambda made: {"convolution": replace(made.convolution, **fields)}


REFUSED = {
    "a slot turned": (lambda made: {"state": made.state.mT.contiguous().mT}, "state must be dense in its last 3"),
    "one slot for all": (lambda made: {"state": made.state[:1].expand(7, 2, 6, 5)}, "apart in others, got strides"),
    "slots in one another": (
        lambda made: {"state": made.state.flatten().as_strided((7, 2, 6, 5), (59, 30, 5, 1))},
        "apart in others, got strides [[]59, 30, 5, 1]",
    ),
    "channels apart": (
        lambda made: {"convolution": replace(made.convolution, q_ring=torch.zeros(7, 9, 12)[..., ::2])},
        "q_ring must be dense in its last dimension",
    ),
    "a ring in a slot": (
        lambda made: {"convolution": replace(made.convolution, q_ring=made.state.view(7, 10, 6)[:, :4])},
        "state must share no memory with q_ring",
    ),
    "a ring that is not there": (changed(conv_state_indices=torch.tensor([0, 7, 1])), "from -1 to 6, got 0 to 7"),
    "a ring twice": (changed(conv_state_indices=torch.tensor([1, 1, 2])), "conv_state_indices must name no slot twice"),
    "rings of another number": (
        changed(conv_state_indices=torch.tensor([1, 2])),
        r"conv_state_indices must have shape",
    ),
    "a ring by a float": (changed(conv_state_indices=torch.ones(3)), "conv_state_indices must be one of int32, int64"),
    "another position": (
        changed(conv_state_indices=torch.tensor([0, 1, 2]), position=torch.tensor([0, -1, 3])),
        "from 0 on, got -1",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_lie_apart_is_named_and_nothing_changes(case):
    change, message = case
    made = drawn(W=2)
    asked = change(made)
    made.state = asked.pop("state", made.state)
    before = made.state.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        made.step("decode_torch", **asked)
    assert torch.equal(made.state, before)


def test_a_position_is_asked_of_the_slot_that_a_step_goes_on_from():
    """A sequence is padding by its start, not by the slots of its other tokens."""
    padding, going = (drawn(T=2, N=1, W=2) for _ in range(2))
    padding.convolution = replace(padding.convolution, position=torch.tensor([-1]))
    padding.indices, before = torch.tensor([[0, -1]]), padding.state.clone()
    padding.step("decode_torch", num_accepted_tokens=torch.tensor([2]))
    assert torch.equal(padding.state, before)
    own = {"conv_state_indices": torch.tensor([0]), "position": torch.tensor([-5])}
    going.indices, going.convolution = torch.tensor([[-1, 1]]), replace(going.convolution, **own)
    with pytest.raises(ValueError, match="from 0 on, got -5"):
        going.step("decode_torch", num_accepted_tokens=torch.tensor([2]))


def bytes_of(x: torch.Tensor) -> set[int]:
    """Return the offsets of all bytes of x in its storage."""
    at = [x.storage_offset() * x.element_size()]
    for size, stride in zip(x.shape, x.stride(), strict=True):
        at = [first + i * stride * x.element_size() for first in at for i in range(size)]
    return {first + i for first in at for i in range(x.element_size())}


def test_whether_memory_is_shared_is_never_overlooked():
    """By counting bytes, on two thousand pairs of views of one buffer; half of those apart are known to be so."""
    draw, buffer, apart, known = random.Random(0), torch.zeros(4000, dtype=torch.int16), 0, 0
    for _ in range(2000):
        outer, lines = draw.choice([40, 60]), [draw.choice([5, 6, 20]) for _ in range(2)]
        x, y = (
            buffer.as_strided(
                (draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 6)), (outer, line, 1), draw.randint(0, 90)
            )
            for line in lines
        )
        shared = bool(bytes_of(x) & bytes_of(y))
        try:
            overlap.check_memory({"x": x, "y": y}, ("x",))
            found = False
        except ValueError:
            found = True
        assert found or not shared, (x.shape, x.stride(), y.shape, y.stride())
        apart, known = apart + (not shared), known + (not found)
    assert 2 * known > apart > 200
