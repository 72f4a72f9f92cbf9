"""What a compiled block brings in is what is copied piece by piece: the same bits, whatever lies where in memory."""

import pytest
import torch

from impls import ChunkTorchConfig, chunk_torch, fetch_torch
from impls.fetch_torch import Fetch
from impls.schedule import blocks, gather
from impls.sequences import flat, runs_of

SLOTS, LANES, C = 2, 4, 16
H, HV, K, V = 2, 6, 20, 5
B, T = 3, 37
PACKING = [0, 1, 1, 40, 72, 111]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k of one projection, v with tokens and heads turned, g that all tokens share, and beta."""
    draw = torch.Generator().manual_seed(3)
    qk = torch.randn(B, T, 2, H, K, generator=draw).to(dtype)
    v = torch.randn(B, HV, T, V, generator=draw).to(dtype).transpose(1, 2)
    g = torch.randn(B, 1, HV, K, generator=draw).expand(B, T, HV, K)
    return [qk[:, :, 0], qk[:, :, 1], v, g, torch.rand(B, T, HV, generator=draw).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_fetched_is_what_is_gathered(dtype, monkeypatch):
    monkeypatch.setattr(fetch_torch, "LOOKED_UP", 4)  # fewer than there are blocks
    shape = SLOTS, LANES, C
    rows = [flat(x) for x in tensors(dtype)]
    fetch = Fetch(rows, HV, shape, torch.float32)
    for runs in (runs_of(B, T, None), runs_of(1, B * T, PACKING)):
        listed = list(blocks(runs, HV, LANES, C, SLOTS))
        placed = list(fetch.places(listed))
        assert [block for block, _ in placed] == listed and len(listed) > 4
        for block, place in placed:
            for x, found in zip(rows, fetch(place), strict=True):
                assert torch.equal(found, gather(x, block, shape, HV, torch.float32, None).flatten(0, 1))


def test_channels_that_lie_apart_are_gathered(draw):
    inputs = draw(1, 40, 2, 2, 16, 16)
    apart = [x.movedim(-1, 0).contiguous().movedim(0, -1) if x.ndim == 4 else x for x in inputs]
    config = ChunkTorchConfig(block_tokens=32, heads=4, compile=True)
    plain, turned = (chunk_torch.chunk_torch(*x, config=config)[0] for x in (inputs, apart))
    assert torch.equal(plain, turned)


@pytest.mark.parametrize("compile", [False, True])
def test_no_initial_state_is_an_initial_state_of_zeros(draw, compile):
    inputs, packing = draw(1, 70, 2, 2, 16, 32, resets=True), torch.tensor([0, 3, 3, 40, 70])
    config = ChunkTorchConfig(block_tokens=32, heads=4, compile=compile)
    found = [
        chunk_torch.chunk_torch(*inputs, config=config, cu_seqlens=packing, initial_state=S0, output_final_state=True)
        for S0 in (None, torch.zeros(4, 2, 16, 32))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
