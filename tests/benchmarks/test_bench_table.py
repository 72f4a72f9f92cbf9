"""Time every implementation of the table on the CPU; `make bench` measures, `make test` runs each case once."""

import pytest
import torch

from impls.table import IMPLEMENTATIONS

SHAPES = {  # B, T, H, K, V
    "decode": (8, 1, 4, 128, 128),
    "short": (1, 64, 4, 64, 64),
    "prefill": (1, 256, 4, 128, 128),
}
ON_CPU = [row for row in IMPLEMENTATIONS if row.supports(dtype="float32") is None]


def draw(B: int, T: int, H: int, K: int, V: int) -> dict[str, torch.Tensor]:
    """Draw q, k [B, T, H, K] of unit length, v [B, T, H, V], g [B, T, H, K] around -0.8, beta [B, T, H]; float32."""
    generator = torch.Generator().manual_seed(0)
    q, k, g = (torch.randn(B, T, H, K, generator=generator) for _ in range(3))
    v, beta = torch.randn(B, T, H, V, generator=generator), torch.rand(B, T, H, generator=generator)
    unit = torch.nn.functional.normalize
    return {"q": unit(q, dim=-1), "k": unit(k, dim=-1), "v": v, "g": torch.nn.functional.logsigmoid(g), "beta": beta}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("implementation", ON_CPU, ids=lambda row: row.name)
def test_forward(benchmark, implementation, shape):
    inputs = draw(*shape)
    o, state = benchmark(implementation.call, **inputs, output_final_state=True)
    B, _, H, K, V = shape
    assert o.shape == inputs["v"].shape and o.isfinite().all()
    assert state.shape == (B, H, K, V) and state.isfinite().all()


@pytest.mark.parametrize("implementation", [row for row in ON_CPU if row.backward], ids=lambda row: row.name)
def test_forward_and_backward(benchmark, implementation):
    inputs = {name: x.requires_grad_() for name, x in draw(*SHAPES["short"]).items()}

    def step() -> tuple[torch.Tensor, ...]:
        o, _ = implementation.call(**inputs)
        return torch.autograd.grad(o.sum(), tuple(inputs.values()))

    gradients = benchmark(step)
    assert all(gradient.isfinite().all() for gradient in gradients)
