"""No tensor inside the implementations is larger than an input, and a block bounds what chunks work on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from impls import adjoint_torch, chunk_torch, recurrent_torch
from impls.tree_torch import within_chunks


class Largest(TorchDispatchMode):
    """Record the largest number of elements, and of bytes, that any operation inside returned."""

    elements = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage().nbytes() // x.itemsize for x in tensors]
        self.elements = max([self.elements, *storages])
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return result


T, HV, K, V = 2048, 4, 64, 64


def forward(function, launch):
    return lambda inputs, S0: function(*inputs, S0, None, 0.3, True, 0, launch)


def backward(inputs, S0):
    return adjoint_torch.adjoint(*inputs, S0, None, 0.3, torch.ones_like(inputs[2]), S0, ())


@pytest.mark.parametrize(
    "run",
    [forward(recurrent_torch._forward, (0,)), forward(chunk_torch._forward, (64, 256, 16, 0)), backward],
    ids=["recurrent_torch", "chunk_torch", "adjoint_torch"],
)
@pytest.mark.parametrize("H", [1, 4])
def test_no_tensor_is_larger_than_an_input(draw, draw_state, run, H):
    inputs, S0 = draw(1, T, H, HV, K, V), draw_state(1, HV, K, V)
    with Largest() as seen:
        run(inputs, S0)
    assert seen.elements == inputs[2].numel()


def test_activating_makes_no_tensor_larger_than_an_input(draw):
    inputs, launch = draw(1, T, HV, HV, K, V, torch.bfloat16), (32, 128, 16, 0)
    modes = (None, None, None, 0.3, None, True, "softplus", "once", False, False, 0)
    with Largest() as seen:
        chunk_torch._forward_raw(*inputs, torch.zeros(HV), torch.zeros(HV * K), *modes, launch)
    assert seen.bytes == inputs[2].nbytes  # the outputs; one tensor in float32 would be twice that


@pytest.mark.parametrize("C", [16, 64])
def test_inside_a_block_of_chunks_no_tensor_is_larger_than_two_inputs_of_the_block(draw, C):
    M, L = 4, 128
    q, k, _, g, beta = (x.transpose(1, 2).flatten(0, 1).view(M, L, -1) for x in draw(1, L, M, M, K, V))
    with Largest() as seen:
        within_chunks(*(x.reshape(M * L // C, C, -1) for x in (q, k, g, beta)))
    assert seen.elements <= 2 * M * L * K
