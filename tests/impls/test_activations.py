"""Rows of norm 1 are differentiated in one pass, by a formula of our own: it is the gradient of what is computed."""

import torch

from impls.activations import L2Norm, l2norm


def drawn(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """Return rows of which one is zero, and one so short that the epsilon decides."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    x[0], x[1] = 0.0, x[1] * 1e-4
    return x


def test_rows_have_the_bits_of_l2norm_and_the_gradient_of_torch():
    x, dy = (drawn(7, 3, 5).requires_grad_() for _ in range(2))
    y, lengths = L2Norm.apply(x)
    expected = l2norm(x, torch.float64)
    assert y.equal(expected) and not lengths.requires_grad
    found, known = (torch.autograd.grad(z, x, dy)[0] for z in (y, expected))
    torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_one_row_does_not_hang_on_the_others():
    x = drawn(7, 5, dtype=torch.float32).requires_grad_()
    whole = torch.autograd.grad(L2Norm.apply(x)[0][2:].sum(), x)[0]
    alone = [torch.autograd.grad(L2Norm.apply(row[None])[0].sum(), row)[0] for row in x]
    assert torch.stack(alone[2:]).equal(whole[2:]) and not whole[:2].any()
