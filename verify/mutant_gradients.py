"""Wrong gradients under right outputs: the bugs of backward passes, each planted in one part of the chunkwise form."""

from functools import partial

import torch

from verify.mutant_chunk import Mutant, clean, instead_of, planted, regraded


@instead_of("write")
def key_gradient_of_write_missing(self, k, delta):
    """FLA #875, #984: dk lacks the term of the write into the state."""
    return clean.write(k.detach(), delta)


@instead_of("erased")
def beta_gradient_of_solve_missing(self, k, beta, between):
    """FLA #863: dbeta lacks the term of the triangular matrix."""
    return clean.erased(k, beta.detach(), between)


@instead_of("write")
def gradient_by_flags_of_another(self, k, delta):
    """The values' gradient is left out where the keys, not the values, require none."""
    return clean.write(k, delta if k.requires_grad else delta.detach())


class _TotalMinusPrefix(torch.autograd.Function):
    """A sum along tokens whose backward takes the reverse sum as total minus prefix."""

    @staticmethod
    def forward(ctx, x):
        return torch.cumsum(x, dim=2)

    @staticmethod
    def backward(ctx, d):
        return torch.sum(d, dim=2, keepdim=True) - torch.cumsum(d, dim=2) + d


@instead_of("sums")
def gate_gradient_by_difference(self, x):
    """FLA #1095, #1150: dg as total minus prefix; small gradients cancel, and those that must be zero are not."""
    return _TotalMinusPrefix.apply(x)


@instead_of("final")
def final_state_gradient_dropped(self, S, initial_state):
    """FLA #1141, #1146: the gradient that arrives at the final state is not used."""
    return regraded(S, torch.zeros_like)


@instead_of("group")
def group_gradient_overwritten(self, x, HV):
    """Gradients of grouped heads stored by every value head to one address, not summed: the last one wins."""
    G = HV // x.shape[1]
    last = torch.arange(HV, device=x.device)[:, None, None] % G == G - 1
    return regraded(clean.group(x, HV), partial(torch.where, last, other=torch.zeros((), dtype=x.dtype)))


@instead_of("read")
def query_gradient_of_first_tile(self, q, S, A, delta):
    """FLA #941: with values split over two tiles dq keeps the first one's part; only small GPUs took the path."""
    half = (S.shape[-1] + 1) // 2
    first, second = (..., slice(half)), (..., slice(half, None))
    o = clean.read(q, S[first], A, delta[first]), clean.read(q.detach(), S[second], A.detach(), delta[second])
    return torch.cat(o, dim=-1)


@instead_of("load")
def gradient_uninitialised(self, name, x):
    """FLA #862: the buffer of dk is never written when there are no gates or nothing arrives."""
    loaded = clean.load(name, x)
    return regraded(loaded, lambda d: d if d.any() else torch.empty_like(d)) if name == "k" else loaded


GRADIENTS: tuple[Mutant, ...] = tuple(planted)
