"""Parameters that a checkpoint fills, and the arithmetic width of norms, gates and routers."""

import torch
import torch.nn.functional as F
from torch import nn


def weight(*shape: int) -> nn.Parameter:
    """Return a parameter of this shape to be filled by the checkpoint."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Projection(nn.Linear):
    """A matrix without bias to be filled by the checkpoint, as a module: what ranks share is told by module."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw nothing: it would be overwritten."""


class Embedding(nn.Embedding):
    """The same for the vectors of words."""

    def __init__(self, words: int, size: int):
        super().__init__(words, size)
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw nothing: on the meta device that alone loads 892 modules of torch, 146 MiB."""


def allocated(model: nn.Module, dtypes: dict[str, torch.dtype], device) -> dict[str, torch.Tensor]:
    """Give every parameter of a model without memory its own, undefined, of the dtype named; return them by name."""
    for name, dtype in dtypes.items():
        *path, leaf = name.split(".")
        owner = model.get_submodule(".".join(path))
        empty = torch.empty(getattr(owner, leaf).shape, dtype=dtype, device=device)
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False))
    return {name: x.detach() for name, x in model.named_parameters()}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight * x / sqrt(mean x^2 + eps) over the last channels, normed in float32, rounded before the weight."""
    return weight * F.rms_norm(at_least_float32(x), weight.shape, None, eps).to(x.dtype)


def gated_norm(o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return rms_norm(o) * sigmoid(gate) over the last channels, in float32 until the end, in o's dtype."""
    normed = F.rms_norm(at_least_float32(o), weight.shape, at_least_float32(weight), eps)
    return (normed * torch.sigmoid(at_least_float32(gate))).to(o.dtype)
