"""Short causal convolutions, one per channel, followed by SiLU: y_t = silu(sum_j w_j x_{t - W + 1 + j})."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def convolve(x: torch.Tensor, w: torch.Tensor, before: torch.Tensor, bounds: Sequence[int]):
    """Return y [n, C] and the last W - 1 inputs of each sequence [N, W - 1, C].

    x [n, C] holds N sequences from bounds[i] to bounds[i + 1], before [N, W - 1, C] the inputs before each, w [C, W].
    """
    y, after = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(before)
    past = before.shape[1]
    for i, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        n = last - first
        padded = torch.cat((before[i], x[first:last]))
        own = torch.mul(padded[past : past + n], w[:, past], out=y[first:last])
        for j in range(past):
            own.addcmul_(padded[j : j + n], w[:, j])
        after[i] = padded[n:]
    return F.silu(y, inplace=True), after


def convolve_step(x: torch.Tensor, w: torch.Tensor, before: torch.Tensor):
    """Do the same for one token of each sequence: x [N, C]."""
    window = torch.cat((before, x[:, None]), 1)
    return F.silu((window * w.T).sum(1)), window[:, 1:]
