"""Differentiate chunks in the tree form: what a gradient of the chunk form is, found by products and sums only.

With A, L, X and the rows of `impls.tree_torch`, and S the states that enter a chunk, the forward is

    r = v - (k before) S      delta = X diag(beta) r      o = scale ((q before) S + A delta)
    S_next = total S + (k after)^T delta

and with do' = scale do, y = X^T (A^T do' + (k after) dS_next), dr = beta y and the rows W = [-dr; do'] it goes back as

    dv = dr     dbeta = <y, r - L delta>     [dL; dA] = W delta^T (on and below the diagonal)
    d[k before; q before] = W S^T     d(k after) = delta dS_next^T     dS = total dS_next + [k before; q before]^T W

X enters squared into the gradient of the inverse; written as -y delta^T that square is two solved rows, and no stored
X diag(beta) is divided by beta. dg takes what the logarithms of `before`, `after` and `total` receive, a gradient times
the product itself: where a decay is 0 it is 0. A gate gets the sum over those tokens whose product it is a factor of,
level by level: a reverse sum of what `before` and a forward sum of what `after` received, never total minus prefix.
"""

import torch
import torch.nn.functional as F

from impls.tree_torch import GROUP, decays, group_inverse, group_products, halves, merged, with_corner


def recomputed(q, k, g, beta) -> tuple[torch.Tensor, ...]:
    """Return what the backward of chunks needs, for q, k, g [R, C, K] and beta [R, C, 1] of R chunks.

    A, L, X [R, C, C], the rows k before and q before [R, 2C, K], k after [R, C, K] and the decay of the whole chunk
    [R, K].
    """
    C, K = q.shape[1:]
    alpha = torch.exp(g.reshape(-1, GROUP, K))
    A, L = group_products(q.reshape(-1, GROUP, K), k.reshape(-1, GROUP, K), alpha)
    X = group_inverse(L * beta.reshape(-1, GROUP, 1))
    before, after = decays(alpha)
    total, s = before[:, -1], GROUP
    while s < C:
        late, early = _operands(q, k, before, after, s)
        corner_A, corner_L = torch.bmm(late, early.mT).chunk(2, 1)
        X0, X1 = X.view(-1, 2, s, s).unbind(1)
        corner_X = -torch.bmm(torch.bmm(X1, corner_L * halves(beta, s)[1]), X0)
        A, L, X = with_corner(A, corner_A), with_corner(L, corner_L), with_corner(X, corner_X)
        before, after, total = merged(before, after, total, s)
        s *= 2
    return A, L, X, torch.cat([k * before, q * before], 1), k * after, total


def _operands(q, k, before, after, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a level: the late rows of q and k [pairs, 2s, K] and the early rows of k [pairs, s, K]."""
    late_q, late_k, late_before = (halves(x, s)[1] for x in (q, k, before))
    early_k, early_after = (halves(x, s)[0] for x in (k, after))
    return torch.cat([late_q * late_before, late_k * late_before], 1), early_k * early_after


def within_gradients(q, k, g, dA, dL, d_rows, d_k_after, to_total) -> tuple[torch.Tensor, ...]:
    """Return dq, dk, dg [R, C, K] of chunks, given the gradients of what `recomputed` returned.

    dA, dL [R, C, C], of which the upper triangles are not read; d_rows [R, 2C, K]; d_k_after [R, C, K]; to_total
    [R, K], of the logarithm of the decay of the whole chunk.
    """
    C, K = q.shape[1:]
    levels = _levels(torch.exp(g.reshape(-1, GROUP, K)), C)
    before, after = (x.view(-1, C, K) for x in levels.pop())
    of_k, of_q = d_rows.split(C, 1)
    dq, of_k, of_early = of_q * before, of_k * before, d_k_after * after
    dk, to_before, to_after = of_k + of_early, dq * q + of_k * k, of_early * k
    to_before[:, -1] += to_total
    s = C // 2
    while s >= GROUP:
        parts = (x.view(-1, 2, s, K) for x in (dq, dk, to_before, to_after))
        _level_gradients(q, k, *levels.pop(), dA, dL, s, *parts)
        s //= 2
    shape = (-1, GROUP, K)
    own = _group_gradients(q.view(shape), k.view(shape), g.view(shape), _diagonal(dA), _diagonal(dL))
    dg = own[2] + _sums(to_before.view(shape), to_after.view(shape))
    return dq + own[0].view(dq.shape), dk + own[1].view(dk.shape), dg.view(dq.shape)


def _levels(alpha, C: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return before and after of every level, groups of GROUP tokens first, whole chunks last."""
    before, after = decays(alpha)
    found, total, s = [(before, after)], before[:, -1], GROUP
    while s < C:
        before, after, total = merged(before, after, total, s)
        found.append((before, after))
        s *= 2
    return found


def _level_gradients(q, k, before, after, dA, dL, s: int, dq, dk, to_before, to_after) -> None:
    """Add what one level gives, in place, to dq, dk, to_before, to_after [pairs, 2, s, K].

    to_before and to_after come as what the logarithms of the products of groups of 2s tokens received, and leave as
    what those of groups of s tokens did.
    """
    to_before[:, 0, -1] += to_before[:, 1].sum(1)
    to_before[:, 1, -1] += to_after[:, 0].sum(1)
    late, early = _operands(q, k, before, after, s)
    corners = torch.cat([_corner(dA, s), _corner(dL, s)], 1)
    of_late, of_early = torch.bmm(corners, early), torch.bmm(corners.mT, late)
    late_before, early_after = halves(before, s)[1], halves(after, s)[0]
    dq[:, 1] += of_late[:, :s] * late_before
    dk[:, 1] += of_late[:, s:] * late_before
    dk[:, 0] += of_early * early_after
    both = of_late * late
    to_before[:, 1] += both[:, :s] + both[:, s:]
    to_after[:, 0] += of_early * early


def _corner(x: torch.Tensor, s: int) -> torch.Tensor:
    """Return the late rows and early columns [pairs, s, s] of the groups of 2s tokens of x [R, C, C]."""
    R, C, _ = x.shape
    blocks = x.view(R, C // (2 * s), 2, s, C // (2 * s), 2, s)[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, s, s)


def _diagonal(x: torch.Tensor) -> torch.Tensor:
    """Return the diagonal blocks of x [R, C, C] by (row, row - column), [R * C / GROUP, GROUP, GROUP]."""
    R, C, _ = x.shape
    blocks = x.view(R, C // GROUP, GROUP, C // GROUP, GROUP).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    i = torch.arange(GROUP, device=x.device)
    column = (i[:, None] - i[None, :]).clamp(min=0)
    blocks = blocks.reshape(-1, GROUP, GROUP)
    return torch.gather(blocks, 2, column.expand_as(blocks))


def _group_gradients(q, k, g, dA, dL) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dg [M, G, K] of what groups of G tokens add to A and L; dA, dL by (row, row - column).

    By distance, as in `tree_torch.group_products`; the far pairs first, so that the sum over them is what the gates
    between the nearer ones receive.
    """
    G, alpha = q.shape[1], torch.exp(g)
    dq, dk = dA[:, :, :1] * k, dA[:, :, :1] * q
    dg, received = torch.zeros_like(q), torch.zeros_like(q)
    for distance, decay in reversed(list(enumerate(_between(alpha), 1))):
        early, of_A, of_L = k[:, : G - distance], *(x[:, distance:, distance, None] for x in (dA, dL))
        of_early = (of_A * q[:, distance:] + of_L * k[:, distance:]) * decay
        decayed = early * decay
        dq[:, distance:] += of_A * decayed
        dk[:, distance:] += of_L * decayed
        dk[:, : G - distance] += of_early
        received[:, distance:] += of_early * early
        dg[:, 1 : G - distance + 1] += received[:, distance:]
    return dq, dk, dg


def _between(alpha: torch.Tensor) -> list[torch.Tensor]:
    """Return for every distance d = 1 .. G - 1 the products [M, G - d, K] of the d decays up to tokens d .. G - 1."""
    found = [alpha[:, 1:]]
    for distance in range(2, alpha.shape[1]):
        found.append(found[-1][:, 1:] * alpha[:, 1 : 1 - distance])
    return found


def _sums(to_before, to_after) -> torch.Tensor:
    """Return what each gate of groups [M, G, K] receives: sums over its own and later rows, and over earlier ones."""
    before, after, s = to_before, F.pad(to_after[:, :-1], (0, 0, 1, 0)), 1
    while s < to_before.shape[1]:
        before = before + F.pad(before[:, s:], (0, 0, 0, s))
        after = after + F.pad(after[:, :-s], (0, 0, s, 0))
        s *= 2
    return before + after
