"""Differentiate Kimi Delta Attention token by token: the adjoint recurrence, written by hand.

With P = Diag(alpha) S_prev, u = v - P^T k, delta = beta u, S = P + k delta^T, o = scale S^T q, going back in time:

    dS    += scale q do^T            dq     = scale S do
    ddelta = dS^T k                  dk     = dS delta - P du
    dbeta  = <ddelta, u>             dv     = du = beta ddelta
    dP     = dS - k du^T             dg     = sum_j (dP * P)_j
    dS_prev = alpha dP

dg comes from P, which is 0 where alpha is: no logarithm and no quotient, so g = -inf has dg = 0. The states are
recomputed from one kept every 64 tokens, for a limited number of heads at a time.
"""

import torch

from impls.activations import compute_dtype
from impls.checks import bounds_of
from impls.sequences import Runs, by_token, flat, groups, padded, runs_of, scatter
from impls.states import States

SEGMENT = 64
STATE_ELEMENTS = 2**23
"""How many elements the recomputed states of one segment may have: 32 MiB in float32."""


def adjoint(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS, launch):
    """Return the gradients of <do, o> + <dS, S_T> for q, k, v, g, beta and the initial state (empty where None).

    Shapes and dtypes are those of the inputs; do [B, T, HV, V] and dS [N, HV, K, V] count as zero where None.
    launch, the configuration of the forward, is part of `register`'s backward and has no use here: token by token
    there is no chunk to size, so the gradients are the same bits for every configuration.
    """
    (B, T, HV, V), H, K = v.shape, q.shape[2], q.shape[3]
    dtype, runs = compute_dtype(v), runs_of(B, T, bounds_of(cu_seqlens, T))
    tokens = [flat(x) for x in (q, k, v, g, beta, v.new_zeros(v.shape) if do is None else do)]
    gradients = [v.new_empty((B * T, HV, size), dtype=dtype) for size in (K, K, V, K, 1)]
    entering, leaving = (States(x, q, v, cu_seqlens, runs, 0) for x in (initial_state, dS))
    for some, heads in groups(runs, HV, max(1, STATE_ELEMENTS // (SEGMENT * padded(K) * padded(V)))):
        part = runs.part(some)
        walk = _Walk(tokens, gradients, part, heads, scale, dtype)
        leaving.put(walk.back(entering.take(part, heads), leaving.take(part, heads)), part, heads)
    gradients[:2] = [x.view(B * T, H, HV // H, K).sum(2) for x in gradients[:2]]
    shaped = [x.to(y.dtype).view(y.shape) for x, y in zip(gradients, (q, k, v, g, beta), strict=True)]
    return *shaped, v.new_empty(0) if initial_state is None else leaving.final.to(initial_state.dtype)


class _Walk:
    """Walk over some runs and heads: forward to recompute the states, backward to differentiate.

    M counts the runs that have the token times the heads; a row is [M, 1, K or V], a state [M, K, V].
    """

    def __init__(self, tokens, gradients, runs: Runs, heads: slice, scale: float, dtype: torch.dtype):
        self.tokens, self.gradients, self.runs, self.heads = tokens, gradients, runs, heads
        self.scale, self.dtype = scale, dtype

    def rows(self, first: int) -> list[list[torch.Tensor]]:
        """Return for each token of the segment at `first` the rows q, k, v, alpha, beta, do."""
        L, HV = min(SEGMENT, self.runs.longest - first), self.tokens[-1].shape[1]
        blocks = [by_token(x, self.runs, first, L, self.heads, HV, self.dtype) for x in self.tokens]
        blocks[3].exp_()
        counts = [self.runs.running(first + t) for t in range(L)]
        return [[x[t, :n].flatten(0, 1).unsqueeze(1) for x in blocks] for t, n in enumerate(counts)]

    def recompute(self, rows: list[list[torch.Tensor]], S: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Move S in place over the tokens of a segment; return P and u of each."""
        done = []
        for _, k, v, alpha, beta, _ in rows:
            here = S[: len(k)]
            P = here.mul_(alpha.mT).clone()
            u = v - k @ P
            here.addcmul_(k.mT, beta * u)
            done.append((P, u))
        return done

    def back(self, S: torch.Tensor, dS: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the states S [n, heads, K, V] that enter the runs, given dS of those that leave."""
        shape, segments, kept = S.shape, range(0, self.runs.longest, SEGMENT), []
        S, dS = S.flatten(0, 1), dS.flatten(0, 1)
        for first in segments:
            kept.append(S.clone())
            self.recompute(self.rows(first), S)
        for first in reversed(segments):
            rows = self.rows(first)
            done = self.recompute(rows, kept.pop())
            parts = [self.retreat(*rows.pop(), *done.pop(), dS) for _ in range(len(rows))]
            self.write(first, parts[::-1])
        return dS.view(shape)

    def retreat(self, q, k, v, alpha, beta, do, P, u, dS) -> tuple[torch.Tensor, ...]:
        """Move dS in place back over one token; return dq, dk, dv, dg, dbeta: the equations above."""
        dS, delta = dS[: len(q)], beta * u
        dS.addcmul_(q.mT, self.scale * do)
        dq = self.scale * (do @ torch.addcmul(P, k.mT, delta).mT)
        ddelta = k @ dS
        du = beta * ddelta
        dk = delta @ dS.mT - du @ P.mT
        dbeta = (ddelta * u).sum(-1, keepdim=True)
        dS.addcmul_(k.mT, du, value=-1)
        dg = (dS * P).sum(-1).unsqueeze(1)
        dS *= alpha.mT
        return dq, dk, du, dg, dbeta

    def write(self, first: int, parts: list[tuple[torch.Tensor, ...]]) -> None:
        """Store the gradients of the tokens of the segment at `first`."""
        n, heads = self.runs.running(first), self.heads.stop - self.heads.start
        for whole, tokens in zip(self.gradients, zip(*parts, strict=True), strict=True):
            block = tokens[0].new_zeros((len(tokens), n * heads, tokens[0].shape[-1]))
            for place, rows in zip(block, tokens, strict=True):
                place[: len(rows)] = rows.squeeze(1)
            scatter(whole, block.view(len(tokens), n, heads, -1).transpose(0, 1), self.runs, first, self.heads)
