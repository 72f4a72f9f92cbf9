"""A CUDA graph can hold a decode step: it waits for nothing, allocates nothing, and is one launch on one axis."""

from dataclasses import is_dataclass, replace

import pytest
import torch
from steps_drawn import drawn
from torch.utils._python_dispatch import TorchDispatchMode

from impls import decode_triton
from impls.table import interpreting

OTHER_SLOTS = torch.tensor([[5, 2, 8], [4, 7, -1], [6, 0, 3]])
CASES = {
    "plain": {},
    "convolution and norm": {"W": 4, "norm": "silu"},
    "eight tokens, value first": {"T": 8, "v_first": True},
    "16 bits": {"dtype": torch.float16, "pool": torch.bfloat16, "norm": "sigmoid"},
    "speculative": {"T": 3, "S": 9, "W": 3},
    "into another pool": {"W": 2},
}


def asked(case: str, made) -> dict[str, torch.Tensor]:
    """Return what a step of this case is asked for beside what was drawn, and where its output goes."""
    others = {"out": torch.empty_like(made.inputs[2])}
    if case == "speculative":
        made.indices = OTHER_SLOTS
        rings = torch.tensor([2, 0, 5])
        made.convolution = replace(made.convolution, conv_state_indices=rings)
        others["num_accepted_tokens"] = torch.tensor([2, 1, 3])
    return others | ({"final_state": torch.zeros_like(made.state)} if case == "into another pool" else {})


def tensors(x) -> list[torch.Tensor]:
    """Return all tensors of what holds them."""
    if isinstance(x, torch.Tensor):
        return [x]
    inner = vars(x) if is_dataclass(x) else x
    inner = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return [y for part in inner for y in tensors(part)]


def on_device(x):
    """Return the same on a CUDA device."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if is_dataclass(x):
        return replace(x, **on_device(vars(x)))
    if isinstance(x, dict):
        return {name: on_device(y) for name, y in x.items()}
    return [on_device(y) for y in x] if isinstance(x, list) else x


class Spy(TorchDispatchMode):
    """Keep the names of all torch operations: those that allocate, those that wait, and all others."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Kernel:
    """Stand in for the compiled kernel: keep the grids and the arguments of its launches."""

    arg_names = decode_triton.decode.arg_names

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    """Put a stand-in for the kernel, and read no values, as on a device; whoever waits for a device is caught."""
    kernel, plan = Kernel(), decode_triton.plan
    monkeypatch.setattr(decode_triton, "plan", lambda *of: replace(plan(*of), kernel=kernel))
    monkeypatch.setattr("impls.decode_checks._readable", lambda q: False)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", lambda *of: pytest.fail("a step waits for the device"))
    return kernel


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing_and_allocates_nothing(case, kernel):
    """All of it but the kernel, which gets the caller's own memory and not a copy."""
    made = drawn(**CASES[case])
    others = asked(case, made)
    with Spy() as spy:
        o = made.step("decode_triton", **others)
    assert o is others["out"] and not spy.seen
    [(grid, arguments)] = kernel.launches
    assert {x.data_ptr() for x in tensors(arguments)} == {x.data_ptr() for x in tensors([made, others])}
    assert len(grid) == 1


def test_the_spy_sees_what_a_graph_cannot_hold(kernel):
    """An output that nobody gave, a copy of tokens that lie channel by channel, and the torch step's look at slots."""
    made = drawn()
    with Spy() as spy:
        made.step("decode_triton")
    assert [x for x in spy.seen if "empty" in x]
    made.inputs[3] = made.inputs[3].mT.contiguous().mT
    with Spy() as spy:
        made.step("decode_triton", out=torch.empty_like(made.inputs[2]))
    assert [x for x in spy.seen if "clone" in x]
    with Spy() as spy:
        drawn().step("decode_torch", out=torch.empty_like(made.inputs[2]))
    assert [x for x in spy.seen if "nonzero" in x]


@pytest.mark.parametrize("N", [65_535, 65_536, 70_001])
def test_more_sequences_than_other_axes_of_a_grid_hold_are_one_launch(N, kernel):
    """Only x may exceed 65,535; every sequence has a program, found by its number alone."""
    x, beta = torch.zeros(1).expand(N, 1, 2, 1), torch.zeros(1).expand(N, 1, 2)
    state, out = torch.zeros(1, 2, 1, 1), torch.empty(N, 1, 2, 1)
    made = replace(drawn(N=1, K=1, V=1, H=2), inputs=[x, x, x, x, beta], state=state)
    made.indices, made.keywords = torch.zeros(N, dtype=torch.int32), {}
    made.step("decode_triton", out=out)
    assert [grid for grid, _ in kernel.launches] == [(2 * N,)]


@pytest.mark.skipif(
    not torch.cuda.is_available() or interpreting(),
    reason="a graph is captured on a CUDA device, with TRITON_INTERPRET=0, as compiled kernels are what it holds",
)
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_replays_with_the_bits_of_a_launched_one(case):
    made = drawn(**CASES[case])
    others = on_device(asked(case, made))
    made = on_device(made)
    written = [made.state, *others.values(), *tensors(made.convolution)]
    before = [x.clone() for x in written]
    made.step("decode_triton", **others)
    expected = [x.clone() for x in written]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.step("decode_triton", **others)
    for x, old in zip(written, before, strict=True):
        x.copy_(old)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, written, expected))
