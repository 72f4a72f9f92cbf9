"""Fill a cache without reading a text: what a long context costs, where reading it would take days.

Latents and states are drawn: how long attention takes does not depend on what it attends to.
"""

import torch

from kimi_linear.cache import Cache, Live
from kimi_linear.model import KimiLinear

ROWS = 4096
"""Latents that are drawn; they are repeated over the context."""
SIZE = 0.1
"""Standard deviation of what is drawn of states."""


def filled(model: KimiLinear, tokens: int, room: int = 0, batch: int = 1) -> Cache:
    """Return a cache of `batch` sequences as after so many tokens each, with room for more.

    Its numbers are the same at every call, and no text's. CacheError for sizes that hold nothing.
    """
    cache = model.cache(batch=batch, capacity=tokens + room)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like)

    for latents in cache.latents:
        rows = drawn(min(ROWS, tokens), latents.shape[-1], like=latents)
        for first in range(0, tokens, len(rows)):
            part = latents[:, first : min(first + len(rows), tokens)]
            part.copy_(rows[: part.shape[1]].expand_as(part))
    live = cache.live.mapped(lambda x: SIZE * drawn(*x.shape, like=x))
    cache.advance(Live(live.states, live.inputs, (tokens,) * batch))
    return cache
