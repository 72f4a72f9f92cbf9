"""Run general DPLR chunk by chunk in torch, in the tree form, forward and backward: what KDA is measured against.

    S_t = (Diag(exp g_t) - a_t b_t^T) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t         (section 6.2 of the report)

With x_t = S_{t-1}^T b_t and D_ij the product of the decays behind token j up to token i, D'_ij that without token i's

    A_qk = q_i . (D_ij k_j), A_qa = q_i . (D_ij a_j), j <= i   A_bk = b_i . (D'_ij k_j), A_ba = b_i . (D'_ij a_j), j < i

    x = X (b' S + A_bk v), X = (I + A_ba)^-1      o = q' S + A_qk v - A_qa x      S <- total S + k'^T v - a'^T x

q', b' are rows decayed from the chunk's start, k', a' to its end. Groups of s tokens are merged two by two as in
`impls.tree_torch`: a level is one product of the late rows of q and b with the early rows of k and a, twice what KDA's
is. Decays are multiplied, never divided. The backward takes blocks in reverse, each computed again and differentiated.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from impls.activations import compute_dtype
from impls.checks import bounds_of
from impls.configs import DplrTorchConfig
from impls.dplr_checks import Dplr
from impls.sequences import padded


def within_chunks(q, k, a, b, alpha) -> tuple[torch.Tensor, ...]:
    """Return all of chunks that needs no state, for q, k, a, b, alpha [R, C, K] of R chunks.

    A_qk, A_qa, A_bk, X [R, C, C]; q', b', k', a' [R, C, K]; the decay of the whole chunk [R, K].
    """
    (R, C, K), s = q.shape, 1
    qk, qa = (torch.diag_embed((q * x).sum(-1)) for x in (k, a))
    bk, X = torch.zeros_like(qk), torch.eye(C, dtype=q.dtype, device=q.device).expand(R, C, C)
    of_q, of_b, of_k, of_a, total = q * alpha, b, k, a, alpha
    while s < C:
        q_late, b_late = (_halves(x, s)[1] for x in (of_q, of_b))
        k_early, a_early = (_halves(x, s)[0] for x in (of_k, of_a))
        corner = torch.cat([q_late, b_late], 1) @ torch.cat([k_early, a_early], 1).mT
        corners = corner.view(R, -1, 2, s, 2, s)
        qk, qa, bk = (_placed(x, corners[:, :, i, :, j], s) for x, i, j in ((qk, 0, 0), (qa, 0, 1), (bk, 1, 0)))
        X = _placed(X, -(_diagonal(X, s, 1) @ corners[:, :, 1, :, 1] @ _diagonal(X, s, 0)), s)
        early, late = total.view(-1, 2, 1, K).unbind(1)
        of_q, of_b = (_with_halves(x, s, None, early) for x in (of_q, of_b))
        of_k, of_a = (_with_halves(x, s, late, None) for x in (of_k, of_a))
        total, s = (early * late).view(-1, K), 2 * s
    return qk, qa, bk, X, *(x.view(R, C, K) for x in (of_q, of_b, of_k, of_a)), total.view(R, K)


def _halves(x: torch.Tensor, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the early and the late halves [pairs, s, K] of groups of 2s rows."""
    return x.reshape(-1, 2, s, x.shape[-1]).unbind(1)


def _with_halves(x: torch.Tensor, s: int, early: torch.Tensor | None, late: torch.Tensor | None) -> torch.Tensor:
    """Return rows whose early or late halves were multiplied."""
    first, second = _halves(x, s)
    return torch.stack([first if early is None else first * early, second if late is None else second * late], 1)


def _diagonal(x: torch.Tensor, s: int, half: int) -> torch.Tensor:
    """Return the early or late diagonal blocks [R, pairs, s, s] of x [R, C, C]."""
    R, C, _ = x.shape
    blocks = x.reshape(R, C // s, s, C // s, s).diagonal(dim1=1, dim2=3)  # [R, s, s, C / s]
    return blocks.movedim(-1, 1)[:, half::2]


def _placed(x: torch.Tensor, corners: torch.Tensor, s: int) -> torch.Tensor:
    """Return x [R, C, C] plus, in each pair of blocks of s, the corner [R, pairs, s, s] of late rows, early columns."""
    R, C, _ = x.shape
    pairs = C // (2 * s)
    blocks = torch.diag_embed(corners.movedim(1, -1), dim1=1, dim2=3)  # [R, pairs, s, pairs, s]
    return x + F.pad(blocks.view(R, pairs, 1, s, pairs, 1, s), (0, 0, 0, 1, 0, 0, 0, 0, 1, 0)).view(R, C, C)


def over_chunk(parts: Sequence[torch.Tensor], v: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S^T q of a chunk, [M, C, V], and the states behind it, for v [M, C, V] and states S [M, K, V]."""
    qk, qa, bk, X, of_q, of_b, of_k, of_a, total = parts
    x = X @ (of_b @ S + bk @ v)
    o = of_q @ S + qk @ v - qa @ x
    return o, total.unsqueeze(-1) * S + of_k.mT @ v - of_a.mT @ x


def _block(S, q, k, v, a, b, g, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o [M, L, V] and the states behind a block of L tokens, a multiple of C, of M sequences and heads."""
    M, L = q.shape[:2]
    chunks = [x.reshape(-1, C, x.shape[-1]).contiguous() for x in (q, k, a, b, torch.exp(g))]
    parts = [x.view(M, L // C, *x.shape[1:]).unbind(1) for x in within_chunks(*chunks)]
    o = []
    for *own, values in zip(*parts, v.split(C, 1), strict=True):
        found, S = over_chunk(own, values, S)
        o.append(found)
    return torch.cat(o, 1), S


def _rows(x: torch.Tensor, first: int, size: int, C: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens [M, L, channels] of x [N, T, H, channels] from `first` on, null tokens up to a multiple of C."""
    rows = x[:, first : first + size].transpose(1, 2).flatten(0, 1).to(dtype)
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % C))


class _Sequence(torch.autograd.Function):
    """The tokens [N, T, H, ..] of equally long sequences, from states [N, H, K, V], in blocks."""

    @staticmethod
    def forward(ctx, S, C, size, *tokens):
        dtype, v = S.dtype, tokens[2]
        (N, T, H, V), kept, o, here = v.shape, [], [], S.flatten(0, 1)
        for first in range(0, T, size):
            kept.append(here)
            found, here = _block(here, *(_rows(x, first, size, C, dtype) for x in tokens), C)
            o.append(found[:, : min(size, T - first)])
        ctx.save_for_backward(*tokens, *kept)
        ctx.C, ctx.size, ctx.shape = C, size, S.shape
        o = torch.cat(o, 1).view(N, H, T, V).transpose(1, 2) if o else v.new_zeros(v.shape, dtype=dtype)
        return o, here.view(S.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS):
        tokens, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        dtype, T, gradients = do.dtype, do.shape[1], [torch.zeros_like(x) for x in tokens]
        dS = dS.flatten(0, 1)
        for i in reversed(range(len(kept))):
            first, here = i * ctx.size, [kept[i]]
            here += [_rows(x, first, ctx.size, ctx.C, dtype) for x in tokens]
            here = [x.detach().requires_grad_() for x in here]
            with torch.enable_grad():
                made = _block(*here, ctx.C)
            found = torch.autograd.grad(made, here, (_rows(do, first, ctx.size, ctx.C, dtype), dS))
            dS, stop = found[0], min(first + ctx.size, T)
            for whole, x in zip(gradients, found[1:], strict=True):
                N, _, H, _ = whole.shape
                whole[:, first:stop] = x[:, : stop - first].view(N, H, stop - first, -1).transpose(1, 2).to(whole.dtype)
        return dS.view(ctx.shape), None, None, *gradients


def dplr_torch(
    call: Dplr, chunk_size: int | None = None, config: DplrTorchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o [B, T, H, V] in v's dtype and the states [N, H, K, V] behind all tokens: see `impls.dplr`.

    Waits for the device where it is to say where packed sequences lie.
    """
    config = config or DplrTorchConfig(chunk_size or DplrTorchConfig.chunk_size)
    v, dtype = call.tokens[2], compute_dtype(call.tokens[2])
    (B, T, H, V), K = v.shape, call.tokens[0].shape[3]
    packed = call.cu_seqlens is not None
    bounds = call.bounds or bounds_of(call.cu_seqlens, T) or [0, T]
    N = len(bounds) - 1 if packed else B
    S = v.new_zeros((N, H, K, V), dtype=dtype) if call.initial_state is None else call.initial_state.to(dtype)
    # null channels up to a multiple of 16: products of other sizes have other bits in other batches (impls.sequences)
    S = F.pad(S, (0, padded(V) - V, 0, padded(K) - K))
    tokens, o, states = [F.pad(x, (0, padded(x.shape[3]) - x.shape[3])) for x in call.tokens], [], []
    for i, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = S[i : i + 1] if packed else S
        found, left = _Sequence.apply(own, config.chunk_size, config.block_tokens, *(x[:, first:last] for x in tokens))
        o.append(found)
        states.append(left)
    o = torch.cat(o, 1)[..., :V] if o else v.new_zeros(v.shape, dtype=dtype)
    S = torch.cat(states) if states else S
    return (o * call.scale).to(v.dtype), S[..., :K, :V].contiguous()
