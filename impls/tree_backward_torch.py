"""Differentiate chunks in the tree form: what a gradient of the chunk form is, found by products and sums only.

With A, L, X and the rows of `impls.tree_torch`, and S the states that enter a chunk, the forward is

    r = v - (k before) S      delta = X diag(beta) r      o = scale ((q before) S + A delta)
    S_next = total S + (k after)^T delta

and with do' = scale do, y = X^T (A^T do' + (k after) dS_next), dr = beta y and the rows W = [do'; -dr] it goes back as

    dv = dr     dbeta = <y, r - L delta>     [dA; dL] = W delta^T (on and below the diagonal)
    d[q before; k before] = W S^T     d(k after) = delta dS_next^T     dS = total dS_next + [q before; k before]^T W

X enters squared into the gradient of the inverse; written as -y delta^T that square is two solved rows, and no stored
X diag(beta) is divided by beta. dg takes what the logarithms of `before`, `after` and `total` receive, a gradient times
the product itself: where a decay is 0 it is 0. A gate gets the sum over those tokens whose product it is a factor of,
level by level: a reverse sum of what `before` and a forward sum of what `after` received, never total minus prefix.
"""

import torch

from impls.tree_torch import GROUP, decays, group_inverse, group_products, halves, merged, with_corner


def recomputed(q, k, g, beta) -> tuple[torch.Tensor, ...]:
    """Return what the backward of chunks needs, for q, k, g [R, C, K] and beta [R, C, 1] of R chunks.

    A, L, X [R, C, C], the rows q before and k before [R, 2C, K], k after [R, C, K] and the decay of the whole chunk
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
    return A, L, X, torch.cat([q * before, k * before], 1), k * after, total


def _operands(q, k, before, after, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a level: the late rows of q and k [pairs, 2s, K] and the early rows of k [pairs, s, K]."""
    late_q, late_k, late_before = (halves(x, s)[1] for x in (q, k, before))
    early_k, early_after = (halves(x, s)[0] for x in (k, after))
    return torch.cat([late_q * late_before, late_k * late_before], 1), early_k * early_after


def within_gradients(q, k, g, d_AL, d_rows, d_k_after, to_total) -> tuple[torch.Tensor, ...]:
    """Return dq, dk, dg [R, C, K] of chunks, given the gradients of what `recomputed` returned.

    d_AL [R, 2C, C]: dA, and below it dL, of which the upper triangles are not read; d_rows [R, 2C, K]; d_k_after
    [R, C, K]; to_total [R, K], of the logarithm of the decay of the whole chunk.
    """
    C, K = q.shape[1:]
    levels = _levels(torch.exp(g), C)
    before, after = (x.view(-1, C, K) for x in levels.pop())
    of_q, of_k = d_rows.split(C, 1)
    dq, of_k, of_early = of_q * before, of_k * before, d_k_after * after
    dk, to_before, to_after = of_k + of_early, dq * q + of_k * k, of_early * k
    diagonal = d_AL[:, :C].diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq, dk, s = dq + diagonal * k, dk + diagonal * q, C // 2
    while s:
        found = (x.view(-1, 2, s, K) for x in (dq, dk, to_before, to_after))
        dq, dk, to_before, to_after, to_total = _with_level(
            q, k, *levels.pop(), _corners(d_AL, s), s, *found, to_total
        )
        s //= 2
    return *(x.view(q.shape) for x in (dq, dk)), (to_before.view(to_total.shape) + to_total).view(q.shape)


def _levels(alpha, C: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return before and after of every level, groups of one token first, the whole chunk last; alpha [R, C, K]."""
    total = alpha.view(-1, alpha.shape[-1])
    before, after, found, s = total.unsqueeze(1), torch.ones_like(total).unsqueeze(1), [], 1
    while s < C:
        found.append((before, after))
        before, after, total = merged(before, after, total, s)
        s *= 2
    return [*found, (before, after)]


def _with_level(q, k, before, after, corners, s: int, dq, dk, to_before, to_after, to_total) -> tuple:
    """Return dq, dk, to_before, to_after [pairs, 2, s, K] and to_total [pairs, K] with what one level gives.

    to_before, to_after and to_total come as what the logarithms of the products of groups of 2s tokens received; they
    leave as what those of groups of s tokens did, to_total as [2 pairs, K]. Nothing is changed in place: so compiled,
    it takes 10 seconds to compile instead of 70.
    """
    late, early = _operands(q, k, before, after, s)
    of_late, of_early = _product(corners, early), _product(corners.mT, late)
    late_before, early_after, received = halves(before, s)[1], halves(after, s)[0], of_late * late
    dq = torch.stack([dq[:, 0], dq[:, 1] + of_late[:, :s] * late_before], 1)
    dk = torch.stack([dk[:, 0] + of_early * early_after, dk[:, 1] + of_late[:, s:] * late_before], 1)
    totals = to_total + to_before[:, 1].sum(1), to_total + to_after[:, 0].sum(1)
    to_before = torch.stack([to_before[:, 0], to_before[:, 1] + received[:, :s] + received[:, s:]], 1)
    to_after = torch.stack([to_after[:, 0] + of_early * early, to_after[:, 1]], 1)
    return dq, dk, to_before, to_after, torch.stack(totals, 1).flatten(0, 1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b for a [pairs, m, n] and b [pairs, n, K], element by element where there are few rows."""
    if min(a.shape[1:]) >= GROUP:
        return torch.bmm(a, b)
    found = a[:, :, :1] * b[:, :1]
    for n in range(1, a.shape[2]):
        found = torch.addcmul(found, a[:, :, n, None], b[:, n, None])
    return found


def _corners(x: torch.Tensor, s: int) -> torch.Tensor:
    """Return the late rows and early columns [pairs, 2s, s] of pairs of groups of s tokens, of both halves of x."""
    R, _, C = x.shape
    pairs = C // (2 * s)
    corners = x.view(R, 2, pairs, 2, s, pairs, 2, s)[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)
    return corners.movedim(-1, 1).reshape(-1, 2 * s, s)  # from [R, 2, s, s, pairs]
