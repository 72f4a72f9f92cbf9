"""Mixture of experts: a router with sigmoid scores, experts that work on their own tokens, shared experts on all."""

import torch
import torch.nn.functional as F
from torch import nn

from kimi_linear.config import KimiConfig
from kimi_linear.parameters import at_least_float32, weight
from kimi_linear.share import WHOLE, Share


def mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return down (silu(gate x) * up x): x [n, D], gate_up [2 I, D], down [D, I]."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def route(scores: torch.Tensor, bias: torch.Tensor, config: KimiConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen experts [n, k] and their weights [n, k] for scores [n, E], the sigmoid of the logits.

    Experts are chosen by score plus bias, of equals the one with the lower index, where there are groups from the best
    of them by the sum of their two best;
    the weights are the scores (with the bias where config.biased_router_weights), normed to sum 1 where
    config.renormalize, times config.routed_scaling_factor.
    """
    choice = scores + bias
    if config.expert_groups > 1:
        choice = _within_best_groups(choice, config.expert_groups, config.top_groups)
    chosen = choice.sort(stable=True, dim=-1, descending=True).indices[:, : config.experts_per_token]
    weights = (scores + bias if config.biased_router_weights else scores).gather(-1, chosen)
    if config.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * config.routed_scaling_factor


def _within_best_groups(choice: torch.Tensor, groups: int, top: int) -> torch.Tensor:
    """Return choice [n, E] with -inf outside of each token's `top` best groups, of equals those with lower indices."""
    grouped = choice.unflatten(-1, (groups, -1))
    score = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    best = score.sort(stable=True, dim=-1, descending=True).indices[..., :top]
    kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter_(-1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, D: int, I: int):
        super().__init__()
        self.gate_up, self.down = weight(2 * I, D), weight(D, I)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [n, D] of x [n, D]."""
        return mlp(x, self.gate_up, self.down)


class Experts(nn.Module):
    """Route each token to its experts; add the shared experts, which see all tokens.

    A share of them routes as all do, and leaves the tokens of experts that it does not hold at zero.
    """

    def __init__(self, config: KimiConfig, share: Share = WHOLE):
        super().__init__()
        D, I, E = config.hidden_size, config.moe_intermediate_size, config.experts
        self.config, self.held = config, share.experts(config)
        self.router, self.router_bias = weight(E, D), weight(E)
        self.gate_up, self.down = weight(len(self.held), 2 * I, D), weight(len(self.held), D, I)
        self.shared = MLP(D, share.shared(config)) if config.shared_experts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [n, D] of x [n, D]."""
        scores = torch.sigmoid(F.linear(at_least_float32(x), at_least_float32(self.router)))
        chosen, weights = route(scores, self.router_bias.to(scores.dtype), self.config)
        if len(self.held) < self.config.experts:
            chosen = self._here(chosen)
        static = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        run = self._gathered if static else self._alone if len(x) == 1 else self._grouped
        y = (weights.to(x.dtype)[:, None] @ run(x, chosen))[:, 0]
        return y if self.shared is None else y + self.shared(x)

    def _here(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return experts counted from the first one held, the number of those held for experts elsewhere."""
        elsewhere = (chosen < self.held.start) | (chosen >= self.held.stop)
        return (chosen - self.held.start).masked_fill(elsewhere, len(self.held))

    def _gathered(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return what each token's experts make of it [n, k, D]: static shapes, no look at values, weights copied."""
        n, k = chosen.shape
        of = chosen.flatten().clamp(max=len(self.held) - 1)
        rows = x[:, None].expand(n, k, -1).reshape(n * k, -1, 1)
        gate, up = torch.bmm(self.gate_up.index_select(0, of), rows).chunk(2, 1)
        made = torch.bmm(self.down.index_select(0, of), F.silu(gate) * up).view(n, k, -1)
        if len(self.held) == self.config.experts:
            return made
        return made.masked_fill((chosen == len(self.held))[..., None], 0)

    def _alone(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the same for one token: nothing to sort, 24 us instead of 34 for two small experts."""
        here = (e if e < len(self.held) else None for e in chosen[0].tolist())
        made = [torch.zeros_like(x) if e is None else mlp(x, self.gate_up[e], self.down[e]) for e in here]
        return torch.stack(made, 1)

    def _grouped(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the same: tokens in the order of their experts, each expert once over all of its own."""
        n, k = chosen.shape
        of = chosen.flatten()
        order = of.argsort(stable=True)
        rows, made, first = x[order // k], x.new_empty(n * k, x.shape[1]), 0
        for e, count in enumerate(torch.bincount(of, minlength=len(self.down)).tolist()[: len(self.down)]):
            if count:
                part = slice(first, first + count)
                made[part] = mlp(rows[part], self.gate_up[e], self.down[e])
                first += count
        made[first:] = 0
        return torch.empty_like(made).index_copy_(0, order, made).view(n, k, -1)
