"""Decode with transformers' MLA of kimi_linear over the latents in its cache, without expanding those of the past.

Its layer keeps one latent c [rank] and one shared key s per token, and at every step makes keys [W_k[h] c, s] and
values W_v[h] c of all of them: rank * (nope + V) products for each head and token of the past. As in
`kimi_linear.attention.attend_absorbed` the two matrices move to the other side: W_k[h]^T goes into the query, W_v[h]
onto the sum. The cache holds latents and shared keys in two tensors, and they are read where they lie.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn


def absorbing(forward: Callable) -> Callable:
    """Return a forward of KimiLinearAttention that absorbs where it can, and elsewhere is the one given."""

    @functools.wraps(forward)
    def absorbed_forward(self, hidden_states, attention_mask, past_key_values=None, **kwargs):
        step = past_key_values is not None and hidden_states.shape[1] == 1
        if not step or expanded_because(self) or not (attention_mask is None or attention_mask.ndim == 4):
            return forward(self, hidden_states, attention_mask, past_key_values, **kwargs)
        return _step(self, hidden_states, attention_mask, past_key_values)

    absorbed_forward.absorbs = True
    return absorbed_forward


def absorbed_forward_of(layer: type[nn.Module]) -> bool:
    """Tell whether the forward of a class of layers is one of `absorbing`."""
    return getattr(layer.forward, "absorbs", False)


def expanded_because(layer: nn.Module) -> str | None:
    """Return None where the layer's steps can be absorbed, otherwise the reason why it goes on as it was."""
    kind = type(layer.kv_b_proj)
    if kind is not nn.Linear:
        return f"kv_b_proj is a {kind.__name__}: its weights cannot be moved to the other side"
    if layer.config._attn_implementation not in ("eager", "sdpa"):
        return f"attn_implementation is {layer.config._attn_implementation}: its masks are not read here"
    if layer.training and layer.attention_dropout:
        return "the layer is training with dropout"
    return None


def _step(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, cache):
    """Return y [B, 1, D] and, as the eager attention does, the weights [B, H, 1, S], for x [B, 1, D]."""
    B, H, nope, V = len(x), layer.num_heads, layer.qk_nope_head_dim, layer.v_head_dim
    rank, shared = layer.kv_lora_rank, layer.qk_rope_head_dim
    q = _queries(layer, x).view(B, H, nope + shared)
    latent, key = layer.kv_a_proj_with_mqa(x).split([rank, shared], -1)
    latents, keys = cache.update(layer.kv_a_layernorm(latent)[:, None], key[:, None], layer.layer_idx)
    W_k, W_v = layer.kv_b_proj.weight.view(H, nope + V, rank).split([nope, V], 1)
    weights = attention_weights(q, latents[:, 0], keys[:, 0], mask, W_k, layer.scaling)
    seen = torch.bmm(weights, latents[:, 0])
    o = torch.bmm(seen.transpose(0, 1), W_v.mT).transpose(0, 1).reshape(B, 1, H * V)
    eager = layer.config._attn_implementation == "eager"
    return layer.o_proj(o), weights[:, :, None] if eager else None


def _queries(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if layer.q_lora_rank is None:
        return layer.q_proj(x)
    return layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))


def attention_weights(
    q: torch.Tensor,
    latents: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    W_k: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the softmax [B, H, S] of one token's queries q [B, H, nope + shared] over all tokens of the cache.

    latents [B, S, rank], keys [B, S, shared], W_k [H, nope, rank]; mask [B, 1 or H, 1, S], added where it is a number
    and True where a token is seen. Sums in float32 at least.
    """
    nope = W_k.shape[1]
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), W_k).transpose(0, 1)
    scores = torch.baddbmm(torch.bmm(q[..., nope:], keys.mT), absorbed, latents.mT) * scale
    if mask is not None:
        mask = mask[:, :, 0, : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, -1, dtype=wide).to(scores.dtype)
