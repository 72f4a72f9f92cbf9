"""Draw inputs of KDA for the tests of the implementations, and mend the interpreter that runs the Triton rows."""

import pytest
import torch
import torch.nn.functional as F

from impls.plan import Launch
from verify import interpreter

if interpreter.installed():
    interpreter.repair()


def draw_inputs(B, T, H, HV, K, V, dtype=torch.float32, seed=0, resets=False):
    """Return q, k [B, T, H, K], v, g, beta: unit keys, gates that differ per head and channel, some of them -inf."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k = (F.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    g = -torch.exp(2 * normal(B, T, HV, K) - 2)
    if resets:
        g[:, 5::17] = -torch.inf
        g[:, 3::7, :, : K // 2] = -torch.inf
    beta = torch.rand(B, T, HV, generator=draw, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (q, k, normal(B, T, HV, V), g, beta))


@pytest.fixture
def launched(monkeypatch):
    """Return the names of the kernels that are launched, in order."""
    names, run = [], Launch.run

    def noted(self, buffers, scalars):
        names.append(self.name)
        run(self, buffers, scalars)

    monkeypatch.setattr(Launch, "run", noted)
    return names


@pytest.fixture
def draw():
    return draw_inputs


@pytest.fixture
def draw_state():
    """Return a function that draws an initial state [N, HV, K, V]."""

    def state(N, HV, K, V, dtype=torch.float32, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(N, HV, K, V, generator=generator, dtype=torch.float64).to(dtype)

    return state
