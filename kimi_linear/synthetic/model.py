"""The toy that is trained: embedding, blocks of a mixer and an MLP, norm, logits, as the paper's with 2 layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kimi_linear.moe import mlp
from kimi_linear.parameters import rms_norm
from kimi_linear.synthetic.mixers import EPS, Mixer, MixerConfig, drawn


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a toy; the mixer of all its layers."""

    mixer: MixerConfig
    vocabulary: int
    layers: int = 2
    mlp: int = 2
    """Channels of the MLP for each channel of the hidden size; 0 for none."""


class Block(nn.Module):
    """x += mixer(norm x); x += mlp(norm x)."""

    def __init__(self, config: ToyConfig, generator: torch.Generator):
        super().__init__()
        D = config.mixer.hidden
        self.mixer_norm, self.mixer = nn.Parameter(torch.ones(D)), Mixer(config.mixer, generator)
        self.mlp_norm = nn.Parameter(torch.ones(D)) if config.mlp else None
        self.gate_up = drawn(generator, 2 * config.mlp * D, D) if config.mlp else None
        self.down = drawn(generator, D, config.mlp * D) if config.mlp else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [B, T, D] of x [B, T, D]."""
        x = x + self.mixer(rms_norm(x, self.mixer_norm, EPS))
        return x if self.down is None else x + mlp(rms_norm(x, self.mlp_norm, EPS), self.gate_up, self.down)


class Toy(nn.Module):
    """A language model of a task's ids; equal seeds give equal parameters."""

    def __init__(self, config: ToyConfig, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        D = config.mixer.hidden
        self.config = config
        self.embed = drawn(generator, config.vocabulary, D)
        self.blocks = nn.ModuleList(Block(config, generator) for _ in range(config.layers))
        self.norm, self.head = nn.Parameter(torch.ones(D)), drawn(generator, config.vocabulary, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what stands before the logits [B, T, D], normed: only answers need logits (`logits`)."""
        x = F.embedding(ids, self.embed)  # the backward of embed[ids] adds in any order where there are two threads
        for block in self.blocks:
            x = block(x)
        return rms_norm(x, self.norm, EPS)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocabulary] of some tokens [n, D]."""
        return F.linear(x, self.head)
