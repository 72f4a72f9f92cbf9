"""The inverses that our chunk forms make on their way, for the property that bounds their norm."""

from functools import partial

import torch
from torch.nn.functional import pad

from verify.mutant_chunk import Chunkwise

CHUNK = 32
"""Tokens of a chunk here; the bound holds for any."""


def chunked(x: torch.Tensor) -> torch.Tensor:
    """Cut [B, T, HV, n] into chunks [B, HV, chunks, C, n]; rows of zeros behind the end are tokens without effect."""
    x = pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % CHUNK))
    return x.reshape(*x.shape[:2], -1, CHUNK, x.shape[-1]).contiguous()


def tree_inverse(k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Return X diag(beta) [B, HV, chunks, C, C] as chunk_torch makes it; k, g [B, T, HV, K], beta [B, T, HV]."""
    from impls.tree_torch import within_chunks

    wide = torch.promote_types(k.dtype, torch.float32)
    k, g, beta = (chunked(x.to(wide)) for x in (k, g, beta[..., None]))
    flat = [x.flatten(0, 2) for x in (k, k, g, beta)]
    return within_chunks(*flat)[1].view(*k.shape[:4], CHUNK)


def mutant_inverse(mutant: Chunkwise, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Do the same for a form that solves: its solution for the columns of diag(beta)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    k, g, beta = (chunked(x.to(wide)) for x in (k, g, beta[..., None]))
    shape = k.shape[:4]
    k, g, beta = (x.flatten(1, 2) for x in (k, g, beta))
    L = mutant.erased(k, beta, mutant.between(g))
    return mutant.solve(L, torch.diag_embed(beta[..., 0])).view(*shape, CHUNK)


def of_mutant(mutant: object):
    """Return the function of a mutant; None for what is no chunkwise form."""
    return partial(mutant_inverse, mutant) if isinstance(mutant, Chunkwise) else None


INVERSES = {"chunk_torch": tree_inverse}
"""By the names of the table."""
