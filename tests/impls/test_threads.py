"""What is configured about threads and the tree's smallest level changes how a call runs, and nothing behind it."""

import pytest
import torch

from impls import ChunkTorchConfig, chunk_backward_torch, chunk_torch, kda
from impls.configs import GROUPS
from impls.threads import at_most


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(inputs, **fields):
    config = ChunkTorchConfig(block_tokens=32, heads=4, **fields)
    return kda(*inputs, implementation="chunk_torch", config=config, output_final_state=True)


def test_threads_are_bounded_and_given_back_even_after_an_error(two_threads):
    for asked, given in ((0, 2), (1, 1), (2, 2), (8, 2)):
        with pytest.raises(KeyError), at_most(asked):
            assert torch.get_num_threads() == given
            raise KeyError
        assert torch.get_num_threads() == 2


def test_a_configured_number_of_threads_gives_the_bits_of_that_many(draw, two_threads):
    inputs = draw(1, 70, 2, 2, 16, 32, resets=True)
    asked = run(inputs, threads=1)
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(asked, run(inputs), strict=True))


@pytest.mark.parametrize("threads", [0, 1])
def test_a_call_runs_forward_and_back_with_the_threads_configured(draw, two_threads, monkeypatch, threads):
    seen, inputs = set(), [x.requires_grad_() for x in draw(1, 40, 2, 2, 16, 32)]
    for module, name in ((chunk_torch, "gather"), (chunk_backward_torch, "gather")):
        wrapped = getattr(module, name)
        counting = lambda *args, wrapped=wrapped, module=module: (  # noqa: E731
            seen.add((module.__name__, torch.get_num_threads())) or wrapped(*args)
        )
        monkeypatch.setattr(module, name, counting)
    run(inputs, threads=threads)[0].sum().backward()
    assert seen == {(f"impls.{name}", threads or 2) for name in ("chunk_torch", "chunk_backward_torch")}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("C", "compile"), [(16, True), (32, False)])
def test_every_smallest_level_gives_the_same_within_rounding(draw, group, C, compile):
    inputs = draw(2, 70, 2, 2, 16, 32, torch.float64, resets=True)
    found = run(inputs, chunk_size=C, group=group, compile=compile)
    usual = run(inputs, chunk_size=C, compile=compile)
    for x, y in zip(found, usual, strict=True):
        assert (x - y).abs().max() <= 1e-14 * y.abs().max()
    assert torch.equal(found[0], usual[0]) == (group == ChunkTorchConfig.group)
