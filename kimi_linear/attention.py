"""Attention over latents: expanded to keys and values per head for prefill, absorbed into the queries for decoding.

A key of head h is [W_k[h] c, s] for the latent c [rank] and the shared part s of a token, a value is W_v[h] c. So
q . key = [W_k[h]^T q_nope, q_shared] . [c, s], and the sum of values is W_v[h] applied to the sum of latents: a step
needs no key of the past, only its latents, which all heads read at once.
"""

import torch
import torch.nn.functional as F

EXPANDED_ELEMENTS = 2**25
"""Elements of keys that are expanded at a time: 128 MiB in float32, at least one head."""


def attend_expanded(
    q: torch.Tensor, latent: torch.Tensor, up: tuple[torch.Tensor, torch.Tensor], rank: int, scale: float
) -> torch.Tensor:
    """Return o [n, H V] of the last n tokens of a sequence, causally, some heads at a time.

    q [n, H, nope + shared]; latent [S, rank + shared], the last n rows the tokens' own; up: W_k [H, nope, rank] and
    W_v [H, V, rank].
    """
    n, H, channels = q.shape
    S, step = len(latent), max(1, EXPANDED_ELEMENTS // (len(latent) * channels))
    mask = None if n == S else _causal(n, S, q.device)
    o = [
        _attend_heads(q[:, h : h + step], latent, *(x[h : h + step] for x in up), rank, scale, mask)
        for h in range(0, H, step)
    ]
    return torch.cat(o, 1).flatten(1)


def _attend_heads(q, latent, W_k, W_v, rank: int, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Return o [n, heads, V] of some heads; keys and values of one width, or torch would store all scores."""
    H, V, S = len(W_k), W_v.shape[1], len(latent)
    wide = max(q.shape[2], V)
    c, shared = latent[:, :rank], latent[:, rank:]
    k, v = latent.new_zeros(H, S, wide), latent.new_zeros(H, S, wide)
    nope = W_k.shape[1]
    k[..., :nope] = torch.matmul(c, W_k.mT)
    k[..., nope : q.shape[2]] = shared
    v[..., :V] = torch.matmul(c, W_v.mT)
    q = F.pad(q, (0, wide - q.shape[2])).transpose(0, 1)
    o = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale)
    return o[0, ..., :V].transpose(0, 1)


def _causal(n: int, S: int, device: torch.device) -> torch.Tensor:
    """Return which of S tokens each of the last n sees [n, S]."""
    return torch.ones(n, S, dtype=torch.bool, device=device).tril(S - n)


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
