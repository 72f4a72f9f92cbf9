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
    alpha = torch.exp(g.reshape(-1, GROUP, K))
    levels = _levels(alpha, C)
    before, after = (x.view(-1, C, K) for x in levels.pop())
    of_q, of_k = d_rows.split(C, 1)
    dq, of_k, of_early = of_q * before, of_k * before, d_k_after * after
    dk, to_before, to_after = of_k + of_early, dq * q + of_k * k, of_early * k
    s = C // 2
    while s >= GROUP:
        found = (x.view(-1, 2, s, K) for x in (dq, dk, to_before, to_after))
        dq, dk, to_before, to_after, to_total = _with_level(
            q, k, *levels.pop(), _corners(d_AL, s), s, *found, to_total
        )
        s //= 2
    per_token = (x.reshape(-1, GROUP, K) for x in (q, k, alpha, dq, dk, to_before, to_after))
    return tuple(x.view(q.shape) for x in group_gradients(*per_token, to_total, *_diagonal(d_AL)))


def _levels(alpha, C: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return before and after of every level, groups of GROUP tokens first, the whole chunk last; alpha [M, GROUP, K].
    """
    before, after = decays(alpha)
    total, found, s = before[:, -1], [], GROUP
    while s < C:
        found.append((before, after))
        before, after, total = merged(before, after, total, s)
        s *= 2
    return [*found, (before, after)]


def group_gradients(q, k, alpha, dq, dk, to_before, to_after, to_total, dA, dL) -> tuple[torch.Tensor, ...]:
    """Return dq, dk, dg [M, G, K] with what the products within groups of G tokens give, pair by pair.

    q to to_after [M, G, K], to_total [M, K]; dA, dL [M, G, G]. dq, dk, to_before, to_after and to_total come as what
    all larger groups gave. Compiled, all pairs are one pass over memory: level by level it were twenty.
    """
    q, k, alpha, dq, dk, to_before, to_after = (list(x.unbind(1)) for x in (q, k, alpha, dq, dk, to_before, to_after))
    G, late = len(q), torch.zeros_like(to_total)
    dg, early = [to_total] * G, late
    for t in range(G):
        late = late + to_before[G - 1 - t]
        dg[G - 1 - t] = dg[G - 1 - t] + late
        if t:
            early = early + to_after[t - 1]
            dg[t] = dg[t] + early
        diagonal = dA[:, t, t, None]
        dq[t], dk[t] = dq[t] + diagonal * k[t], dk[t] + diagonal * q[t]
    for j in range(G):
        decay, received = None, []
        for i in range(j + 1, G):
            decay = alpha[i] if decay is None else decay * alpha[i]
            decayed, of_q, of_k = k[j] * decay, dA[:, i, j, None], dL[:, i, j, None]
            dq[i], dk[i] = dq[i] + of_q * decayed, dk[i] + of_k * decayed
            of_decayed = of_q * q[i] + of_k * k[i]
            dk[j] = dk[j] + of_decayed * decay
            received.append(of_decayed * decayed)  # by the logarithms of all gates behind j up to i
        for i in reversed(range(j + 1, G)):
            late = received[i - j - 1] if i == G - 1 else late + received[i - j - 1]
            dg[i] = dg[i] + late
    return tuple(torch.stack(x, 1) for x in (dq, dk, dg))


def _diagonal(d_AL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks [M, GROUP, GROUP] on the diagonals of dA and dL."""
    R, _, C = d_AL.shape
    blocks = d_AL.view(R, 2, C // GROUP, GROUP, C // GROUP, GROUP).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    return tuple(x.reshape(-1, GROUP, GROUP) for x in blocks.unbind(1))


def _with_level(q, k, before, after, corners, s: int, dq, dk, to_before, to_after, to_total) -> tuple:
    """Return dq, dk, to_before, to_after [pairs, 2, s, K] and to_total [pairs, K] with what one level gives.

    to_before, to_after and to_total come as what the logarithms of the products of groups of 2s tokens received; they
    leave as what those of groups of s tokens did, to_total as [2 pairs, K]. Nothing is changed in place: so compiled,
    it takes 10 seconds to compile instead of 70.
    """
    late, early = _operands(q, k, before, after, s)
    of_late, of_early = torch.bmm(corners, early), torch.bmm(corners.mT, late)
    late_before, early_after, received = halves(before, s)[1], halves(after, s)[0], of_late * late
    dq = torch.stack([dq[:, 0], dq[:, 1] + of_late[:, :s] * late_before], 1)
    dk = torch.stack([dk[:, 0] + of_early * early_after, dk[:, 1] + of_late[:, s:] * late_before], 1)
    totals = to_total + to_before[:, 1].sum(1), to_total + to_after[:, 0].sum(1)
    to_before = torch.stack([to_before[:, 0], to_before[:, 1] + received[:, :s] + received[:, s:]], 1)
    to_after = torch.stack([to_after[:, 0] + of_early * early, to_after[:, 1]], 1)
    return dq, dk, to_before, to_after, torch.stack(totals, 1).flatten(0, 1)


def _corners(x: torch.Tensor, s: int) -> torch.Tensor:
    """Return the late rows and early columns [pairs, 2s, s] of pairs of groups of s tokens, of both halves of x."""
    R, _, C = x.shape
    pairs = C // (2 * s)
    corners = x.view(R, 2, pairs, 2, s, pairs, 2, s)[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)
    return corners.movedim(-1, 1).reshape(-1, 2 * s, s)  # from [R, 2, s, s, pairs]
