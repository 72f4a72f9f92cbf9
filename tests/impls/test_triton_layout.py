"""Spans of packed sequences never share a slot, and no packing, however wrong, takes a kernel out of its buffers."""

import random

import pytest
import torch
import triton
import triton.language as tl

from impls import chunk_triton, kda, recurrent_triton
from impls.configs import ChunkTritonConfig, RecurrentTritonConfig
from impls.layout_triton import bounds, first_slot, owner, spans_before
from impls.plan import Problem
from impls.targets import named

SPANS = (1, 3, 16, 48)


@triton.jit
def of_slots(cu_seqlens, owners, T, N, span):
    """Store to whom each slot belongs."""
    slot = tl.program_id(0).to(tl.int64)
    tl.store(owners + slot, owner(cu_seqlens, slot, T, N, span))


@triton.jit
def of_sequences(cu_seqlens, found, T, span):
    """Store first row, length, first slot and the spans before of each sequence: [N, 4]."""
    i_n = tl.program_id(0).to(tl.int64)
    first, length = bounds(cu_seqlens, i_n, T)
    tl.store(found + 4 * i_n, first)
    tl.store(found + 4 * i_n + 1, length)
    tl.store(found + 4 * i_n + 2, first_slot(cu_seqlens, i_n, T, span))
    tl.store(found + 4 * i_n + 3, spans_before(cu_seqlens, i_n, T, span))


def packings(count: int, legal: bool):
    """Yield (T, cu_seqlens): random ones, many with empty sequences; wrong ones if not legal."""
    rng = random.Random(11)
    for _ in range(count):
        T, N = rng.randint(0, 100), rng.randint(1, 6)
        if legal:
            yield T, [0, *sorted(rng.choice([0, T, rng.randint(0, T)]) for _ in range(N - 1)), T]
        else:
            yield T, [rng.choice([rng.randint(-(10**12), 10**12), rng.randint(-T, 2 * T)]) for _ in range(N + 1)]


def slots(T, cu_seqlens, span):
    """Run the jitted arithmetic: the owner of every slot, and [first row, length, first slot, spans before]."""
    N = len(cu_seqlens) - 1
    owners, found = torch.full((T // span + N,), -1), torch.full((N, 4), -1)
    packed = torch.tensor(cu_seqlens)
    of_slots[(len(owners),)](packed, owners, T, N, span)
    of_sequences[(N,)](packed, found, T, span)
    return owners.tolist(), found.tolist()


@pytest.mark.parametrize("span", SPANS)
def test_slots_of_spans_never_collide_and_fit_into_what_is_allocated(span):
    for T, cu_seqlens in packings(8, legal=True):
        owners, found = slots(T, cu_seqlens, span)
        taken, before = {}, 0
        for n, (first, length, first_slot_of_n, spans) in enumerate(found):
            assert (first, length, spans) == (cu_seqlens[n], cu_seqlens[n + 1] - cu_seqlens[n], before)
            for i in range(-(-length // span)):
                slot = first_slot_of_n + i
                assert slot not in taken and 0 <= slot < T // span + len(found)
                assert owners[slot] == n
                taken[slot] = n
            before += -(-length // span)


def test_no_packing_of_up_to_12_tokens_makes_slots_collide():
    """Every packing of 4 sequences, by the arithmetic that the test above finds the kernels to do."""
    for T in range(13):
        for a in range(T + 1):
            for b in range(a, T + 1):
                for c in range(b, T + 1):
                    cu_seqlens = (0, a, b, c, T)
                    for span in (1, 2, 3, 5, 16):
                        ends = [
                            (x // span + n, x // span + n - (-(y - x) // span))
                            for n, (x, y) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))
                        ]
                        assert all(end <= first for (_, end), (first, _) in zip(ends, ends[1:], strict=False))
                        assert ends[-1][1] <= T // span + 4


@pytest.mark.parametrize("span", SPANS)
def test_wrong_packings_are_clamped_into_the_tokens_that_there_are(span):
    for T, cu_seqlens in packings(8, legal=False):
        owners, found = slots(T, cu_seqlens, span)
        assert all(0 <= n < len(found) for n in owners)
        for first, length, first_slot_of_n, _ in found:
            assert 0 <= first <= first + length <= T
            assert first_slot_of_n >= 0 and first_slot_of_n + -(-length // span) <= T // span + len(found)


GUARD = 4096
"""Elements on either side of a buffer, NaN: one that is read spoils a result, one that is written shows."""


class Guarded:
    """Allocate buffers between bands of NaN."""

    def __init__(self):
        self.bands = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        around = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
        self.bands += [around[:GUARD], around[GUARD + x.numel() :]]
        inside = around[GUARD : GUARD + x.numel()].view(x.shape)
        return inside.copy_(x)

    def untouched(self) -> bool:
        return all(band.isnan().all() for band in self.bands)


def run_unchecked(plan_of, config, inputs, S0, cu_seqlens, rows):
    """Launch a plan with a packing that nobody looked at, all buffers guarded: o, final state, kept states, the guard.

    There is room for `rows` kept states, as many as another copy of the packing may have counted.
    """
    (_, T, H, K), (HV, V), N = inputs[0].shape, inputs[2].shape[2:], len(cu_seqlens) - 1
    asked = Problem(1, T, N, H, HV, K, V, "float32", packed=True, initial=True, final=True, keeps=True)
    planned, guarded = plan_of(asked, config, named("interpret")), Guarded()
    buffers = dict(zip(["q", "k", "v", "g", "beta"], map(guarded, inputs), strict=True))
    buffers |= {"initial": guarded(S0), "cu_seqlens": torch.tensor(cu_seqlens)}
    buffers |= {"o": guarded(torch.zeros_like(inputs[2])), "final": guarded(torch.zeros_like(S0))}
    buffers["kept"] = guarded(torch.zeros(1, rows, HV, K, V))
    for name, (dtype, shape) in planned.workspace.items():
        buffers[name] = guarded(torch.zeros(shape, dtype=getattr(torch, dtype)))
    scalars = {"T": T, "N": N, "interval": 16, "kept_rows": rows, "scale": 1.0, "lower_bound": 0.0}
    for launch in planned.launches:
        launch.run(buffers, scalars | planned.scalars)
    return buffers["o"], buffers["final"], buffers["kept"], guarded


PLANS = [
    (chunk_triton.plan, ChunkTritonConfig(segments=1)),
    (chunk_triton.plan, ChunkTritonConfig(segments=2)),
    (chunk_triton.plan, ChunkTritonConfig(recompute=True, segments=3)),
    (recurrent_triton.plan, RecurrentTritonConfig()),
]
WRONG = [
    [0, 40, 5, 35],
    [-7, 10, 20, 35],
    [0, 10**12, 20, 35],
    [0, 10, 20, 300],
    [35, 20, 10, 0],
    [-(10**15), -5, -1, -1],
    [0, 12, 30, 31],
    [3, 12, 30, 35],
]


@pytest.mark.parametrize("plan_of, config", PLANS, ids=["chunk", "segments", "recompute", "recurrent"])
@pytest.mark.parametrize("cu_seqlens", WRONG, ids=str)
def test_wrong_packings_read_and_write_nothing_out_of_bounds(draw, draw_state, plan_of, config, cu_seqlens):
    inputs, S0 = draw(1, 35, 1, 1, 5, 3), draw_state(len(cu_seqlens) - 1, 1, 5, 3)
    *found, guarded = run_unchecked(plan_of, config, inputs, S0, cu_seqlens, rows=3)
    assert guarded.untouched() and all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("plan_of, config", PLANS, ids=["chunk", "segments", "recompute", "recurrent"])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_right_packings_between_guards_keep_as_many_states_as_there_is_room_for(
    draw, draw_state, plan_of, config, rows
):
    inputs, S0, bounds = draw(1, 35, 1, 1, 5, 3), draw_state(4, 1, 5, 3), torch.tensor([0, 0, 19, 20, 35])
    *found, kept, guarded = run_unchecked(plan_of, config, inputs, S0, bounds.tolist(), rows)
    name = "recurrent_triton" if isinstance(config, RecurrentTritonConfig) else "chunk_triton"
    asked = {"config": config, "cu_seqlens": bounds, "initial_state": S0, "scale": 1.0, "output_final_state": True}
    *expected, h = kda(*inputs, implementation=name, return_intermediate_states=True, state_interval=16, **asked)
    assert h.shape[1] == 4 and guarded.untouched()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(kept[:, :4], h[:, :rows]) and not kept[:, 4:].any()


@pytest.mark.parametrize("name", ["chunk_triton", "recurrent_triton"])
@pytest.mark.parametrize("K, V", [(1, 1), (5, 17), (16, 3)])
@pytest.mark.parametrize("T", [1, 16, 17])
def test_inputs_that_end_where_their_memory_ends_are_read_no_further(draw, name, K, V, T):
    inputs, guarded = draw(1, T, 1, 2, K, V), Guarded()
    o, S = kda(*map(guarded, inputs), implementation=name, output_final_state=True)
    expected = kda(*inputs, implementation=name, output_final_state=True)
    assert torch.equal(o, expected[0]) and torch.equal(S, expected[1]) and guarded.untouched()
