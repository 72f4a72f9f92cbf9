"""A toy of two KDA layers learns on a CPU, and its loss falls the same way whichever implementation trains it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from impls import kda

D, H, K, T, WORDS = 16, 2, 8, 20, 6
FLAGS = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)


class Layer(nn.Module):
    """Mix tokens x [B, T, D] by KDA, between projections, with a residual."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.parts, self.out = name, nn.Linear(D, 4 * H * K + H), nn.Linear(H * K, D)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H * K))

    def forward(self, x):
        *wide, beta = self.parts(x).split([H * K] * 4 + [H], -1)
        q, k, v, g = (y.unflatten(-1, (H, K)) for y in wide)
        o, _ = kda(q, k, v, g, beta, implementation=self.name, A_log=self.A_log, dt_bias=self.dt_bias, **FLAGS)
        return x + self.out(o.flatten(2))


def losses(name: str, steps: int) -> list[float]:
    """Train to repeat the word of three tokens ago; return the loss of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, D), Layer(name), Layer(name), nn.Linear(D, WORDS))
    words, optimizer, found = torch.randint(WORDS, (1, T)), torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = F.cross_entropy(model(words)[0, 3:], words[0, :-3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name, steps", [("chunk_torch", 40), ("chunk_triton", 6)])
def test_the_loss_of_two_layers_falls_as_it_does_token_by_token(name, steps):
    expected, found = losses("recurrent_torch", steps), losses(name, steps)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[-1] < (0.01 if steps == 40 else 0.7) * found[0]
