"""Attention over latents: expanded to keys and values per head for prefill, absorbed into the queries for decoding.

A key of head h is [W_k[h] c, s] for the latent c [rank] and the shared part s of a token, a value is W_v[h] c. So
q . key = [W_k[h]^T q_nope, q_shared] . [c, s], and the sum of values is W_v[h] applied to the sum of latents: a step
needs no key of the past, only its latents, which all heads read at once.
"""

import torch
import torch.nn.functional as F

EXPANDED_ELEMENTS = 2**25
"""Elements of keys that are expanded at a time: 128 MiB in float32, at least one head."""
MASK_ELEMENTS = 2**25
"""Pairs of a token and an earlier one that are masked at a time: 128 MiB, at least one token."""


def attend_expanded(
    q: torch.Tensor, latent: torch.Tensor, up: tuple[torch.Tensor, torch.Tensor], rank: int, scale: float
) -> torch.Tensor:
    """Return o [n, H V] of the last n tokens of a sequence, causally, some heads and some tokens at a time.

    q [n, H, nope + shared]; latent [S, rank + shared], the last n rows the tokens' own; up: W_k [H, nope, rank] and
    W_v [H, V, rank].
    """
    _, H, channels = q.shape
    step = max(1, EXPANDED_ELEMENTS // (len(latent) * channels))
    parts = [
        _attend_heads(q[:, h : h + step], latent, *(x[h : h + step] for x in up), rank, scale)
        for h in range(0, H, step)
    ]
    return torch.cat(parts, 1).flatten(1)


def _attend_heads(q: torch.Tensor, latent: torch.Tensor, W_k, W_v, rank: int, scale: float) -> torch.Tensor:
    """Return o [n, heads, V] of some heads; keys and values of one width, or torch would store all scores."""
    n, H, channels = q.shape
    nope, V, S = W_k.shape[1], W_v.shape[1], len(latent)
    k, v = latent.new_zeros(2, H, S, max(channels, V))
    k[..., :nope] = torch.matmul(latent[:, :rank], W_k.mT)
    k[..., nope:channels] = latent[:, rank:]
    v[..., :V] = torch.matmul(latent[:, :rank], W_v.mT)
    q = F.pad(q, (0, k.shape[2] - channels)).transpose(0, 1)
    rows = n if n == S else max(1, MASK_ELEMENTS // S)
    parts = []
    for first in range(0, n, rows):
        own, seen = q[:, first : first + rows], S - n + min(first + rows, n)
        parts.append(_causal(own[None], k[None, :, :seen], v[None, :, :seen], scale)[0, ..., :V])
    return torch.cat(parts, 1).transpose(0, 1)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the attention of the last tokens q [1, H, n, C] of k and v [1, H, S, C], each to all before it."""
    n, S = q.shape[2], k.shape[2]
    mask = None if n == S else torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def attend_absorbed(
    q: torch.Tensor,
    latents: torch.Tensor,
    mask: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor],
    rank: int,
    scale: float,
) -> torch.Tensor:
    """Return o [B, H V] of one token of each sequence over latents [B, S, rank + shared], without expanding them.

    q [B, H, nope + shared]; mask [B, 1, S] is 0 or -inf; up as in `attend_expanded`.
    """
    W_k, W_v = up
    nope = W_k.shape[1]
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), W_k).transpose(0, 1)
    query = torch.cat((absorbed, q[..., nope:]), -1)
    scores = torch.baddbmm(mask, query, latents.mT, alpha=scale)
    seen = torch.bmm(_softmax(scores), latents)[..., :rank]
    return torch.bmm(seen.transpose(0, 1), W_v.mT).transpose(0, 1).flatten(1)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last axis, in float32 at least, in the dtype of the scores."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, -1, dtype=wide).to(scores.dtype)
