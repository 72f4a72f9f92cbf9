"""The decode step: one pass over the states in groups, into memory that earlier states have left."""

import gc
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from impls import fused_recurrent_kda, kda, pages, recurrent_torch


def decoded(inputs, S0=None, **keywords):
    return kda(*inputs, implementation="recurrent_torch", initial_state=S0, output_final_state=True, **keywords)


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.fixture
def mapped(monkeypatch):
    """Map every memory of at least a page, beginning without a spare."""
    monkeypatch.setattr(pages, "MAPPED_BYTES", mmap.PAGESIZE)
    pages._spare.clear()


def drawn_room(elements: int) -> torch.Tensor:
    return pages.room((elements,), torch.float32, torch.device("cpu")).fill_(1)


@pytest.mark.parametrize("elements", [1, 300, 2**20])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("H, HV, K, V", [(2, 4, 16, 32), (3, 3, 5, 7), (1, 3, 32, 16)])
def test_groups_of_any_size_give_the_same_bits(draw, draw_state, monkeypatch, elements, T, H, HV, K, V):
    inputs, S0 = draw(3, T, H, HV, K, V, resets=True), draw_state(3, HV, K, V)
    bounds = torch.tensor([0, T - T // 2, T, 2 * T, 3 * T])
    packed = [x.flatten(0, 1).unsqueeze(0) for x in inputs], draw_state(4, HV, K, V)
    whole = decoded(inputs, S0), decoded(*packed, cu_seqlens=bounds)
    monkeypatch.setattr(recurrent_torch, "GROUP_ELEMENTS", elements)
    for found, expected in zip((decoded(inputs, S0), decoded(*packed, cu_seqlens=bounds)), whole, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("H, HV", [(4, 4), (2, 4)])
def test_the_decode_step_has_the_bits_of_the_first_token_of_many(draw, draw_state, dtype, H, HV):
    inputs, S0 = draw(2, 5, H, HV, 32, 16, dtype, resets=True), draw_state(2, HV, 32, 16)
    together, _ = decoded(inputs, S0)
    for t in range(5):
        o, S0 = decoded([x[:, t : t + 1] for x in inputs], S0)
        assert torch.equal(o, together[:, t : t + 1])


def test_states_that_live_share_no_memory_and_survive_later_steps(draw, draw_state, mapped):
    inputs, states = draw(2, 1, 2, 2, 32, 32), [draw_state(2, 2, 32, 32)]
    copies = []
    for _ in range(4):
        states.append(decoded(inputs, states[-1])[1])
        copies.append(states[-1].clone())
    assert len({address(S) for S in states}) == len(states)
    assert all(torch.equal(S, copy) for S, copy in zip(states[1:], copies, strict=True))


def test_memory_of_a_state_that_was_dropped_is_used_again(draw, mapped):
    inputs = draw(2, 1, 2, 2, 32, 32)
    _, S = fused_recurrent_kda(*inputs, output_final_state=True)
    first, expected = address(S), S.clone()
    del S
    _, S = fused_recurrent_kda(*inputs, output_final_state=True)
    assert address(S) == first and torch.equal(S, expected)


@pytest.mark.parametrize("derive", [lambda x: x[7:], lambda x: x.numpy()], ids=["view", "numpy"])
def test_what_is_derived_from_a_state_keeps_its_memory(mapped, derive):
    x = drawn_room(4096)
    derived, first = derive(x), address(x)
    del x
    gc.collect()
    other = drawn_room(4096).fill_(2)
    assert address(other) != first and (derived == 1).all()


def sizes_of_spares() -> list[int]:
    return [size // 4 for size in pages._spare]


def test_a_spare_of_each_size_is_kept_and_used_for_its_own_size_only(mapped):
    rooms = [drawn_room(elements) for elements in (4096, 8192, 8192)]
    rooms.clear()
    assert sorted(sizes_of_spares()) == [4096, 8192]
    other, same = drawn_room(2048), drawn_room(8192)
    assert sizes_of_spares() == [4096] and len(other) + len(same) == 10240


def test_the_latest_spares_are_kept_up_to_the_limit(mapped, monkeypatch):
    monkeypatch.setattr(pages, "SPARE_BYTES", 4 * 10000)
    for elements in (2048, 4096, 8192):
        drawn_room(elements)
    assert sizes_of_spares() == [8192]
    drawn_room(16384)
    assert sizes_of_spares() == [8192]
    drawn_room(2048), drawn_room(4096), drawn_room(2048)
    assert sizes_of_spares() == [4096, 2048]


@pytest.mark.parametrize("name", ["chunk_torch", "recurrent_torch"])
@pytest.mark.parametrize("index", [0, 1], ids=["outputs", "state"])
def test_what_comes_back_may_be_modified_in_place(draw, draw_state, mapped, name, index):
    weight = torch.tensor(2.0, requires_grad=True)

    def run(S0, asks: bool):
        with torch.set_grad_enabled(asks):
            inputs = draw(2, 20, 2, 2, 32, 32)
            return kda(*inputs, implementation=name, initial_state=S0, output_final_state=True)[index]

    plain, S0 = run(draw_state(2, 2, 32, 32), False), draw_state(2, 2, 32, 32).requires_grad_()
    expected = 2 * plain
    found = run(S0, True).mul_(2.0)
    found.sum().backward()
    assert torch.equal(found, expected) and S0.grad.abs().sum() > 0
    plain.mul_(weight).sum().backward()
    assert torch.equal(plain, expected) and weight.grad is not None and plain.detach_() is plain


@pytest.mark.parametrize("name", ["chunk_torch", "recurrent_torch"])
def test_states_with_values_first_come_back_in_memory_that_is_kept(draw, draw_state, mapped, name):
    inputs, S0 = draw(1, 2, 1, 4, 32, 48), draw_state(1, 4, 32, 48)
    asked = {"implementation": name, "output_final_state": True}
    _, S = kda(*inputs, initial_state=S0, **asked)
    _, first = kda(*inputs, initial_state=S0.mT, state_v_first=True, **asked)
    assert first.is_contiguous() and torch.equal(first, S.mT)
    there = address(first)
    del first
    assert address(drawn_room(S0.numel())) == there


def test_memory_that_the_system_does_not_have_is_refused_in_the_words_of_torch():
    with pytest.raises(RuntimeError, match="allocate memory"):
        pages.room((2**50,), torch.float32, torch.device("cpu"))


def test_threads_never_share_the_memory_of_tensors_that_live(mapped):
    def work(number):
        for turn in range(2000):
            live = [drawn_room(1024 * (1 + (turn + i) % 3)).fill_(number + 10 * i) for i in range(3)]
            if any((x != number + 10 * i).any() for i, x in enumerate(live)):
                return False
        return True

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(1, 5)))
    finally:
        sys.setswitchinterval(switch)


def test_small_states_are_left_to_malloc(monkeypatch):
    monkeypatch.setattr(pages, "_mapped", None)
    assert pages.room((3, 2), torch.float64, torch.device("cpu")).shape == (3, 2)


class _Seen(TorchDispatchMode):
    """Note the ops of this project that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kda_forge":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_op_that_is_passed_by_where_nobody_looks(draw, draw_state, monkeypatch):
    inputs, S0 = draw(2, 1, 2, 2, 16, 16), draw_state(2, 2, 16, 16)
    asked = {"implementation": "recurrent_torch", "initial_state": S0, "output_final_state": True}
    with _Seen() as seen:
        watched = kda(*inputs, **asked)
    assert seen.names == ["recurrent_torch_raw"]
    with torch.profiler.profile() as profile:
        kda(*inputs, **asked)
    assert "kda_forge::recurrent_torch_raw" in {event.key for event in profile.key_averages()}
    monkeypatch.setattr(recurrent_torch, "op_raw", None)
    assert all(torch.equal(x, y) for x, y in zip(kda(*inputs, **asked), watched, strict=True))
