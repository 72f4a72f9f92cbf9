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
from impls.sequences import Runs, flat, groups, runs_of

SEGMENT = 64
STATE_ELEMENTS = 2**23
"""How many elements the recomputed states of one segment may have: 32 MiB in float32."""


def adjoint(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS):
    """Return the gradients of <do, o> + <dS, S_T> for q, k, v, g, beta and the initial state (empty where None).

    Shapes and dtypes are those of the inputs; do [B, T, HV, V] and dS [N, HV, K, V] count as zero where None.
    """
    (B, T, HV, V), H, K = v.shape, q.shape[2], q.shape[3]
    dtype, runs = compute_dtype(v), runs_of(B, T, bounds_of(cu_seqlens, T))
    tokens = [flat(x) for x in (q, k, v, g, beta, v.new_zeros(v.shape) if do is None else do)]
    gradients = [v.new_empty((B * T, HV, *size), dtype=dtype) for size in ((K,), (K,), (V,), (K,), ())]
    zeros = v.new_zeros((len(runs.order), HV, K, V), dtype=dtype)
    S0, dST = (zeros if x is None else x.to(dtype) for x in (initial_state, dS))
    dS0 = torch.empty_like(zeros)
    for some, heads in groups(runs, HV, max(1, STATE_ELEMENTS // (SEGMENT * K * V))):
        walk = _Walk(tokens, gradients, runs.part(some.start, some.stop), heads, scale, dtype)
        places = list(walk.runs.order)
        dS0[places, heads] = walk.back(S0[places, heads], dST[places, heads])
    gradients[:2] = [x.view(B * T, H, HV // H, K).sum(2) for x in gradients[:2]]
    shaped = [x.to(y.dtype).view(y.shape) for x, y in zip(gradients, (q, k, v, g, beta), strict=True)]
    return *shaped, v.new_empty(0) if initial_state is None else dS0.to(initial_state.dtype)


class _Walk:
    """Walk over some runs and heads: forward to recompute the states, backward to differentiate."""

    def __init__(self, tokens, gradients, runs: Runs, heads: slice, scale: float, dtype: torch.dtype):
        self.tokens, self.gradients, self.runs, self.heads = tokens, gradients, runs, heads
        self.scale, self.dtype = scale, dtype
        HV, device = tokens[2].shape[1], tokens[2].device
        self.starts = torch.tensor(runs.starts, device=device)
        values = torch.arange(heads.start, heads.stop, device=device)
        self.columns = [values // (HV // x.shape[1]) for x in tokens]

    def rows(self, t: int) -> torch.Tensor:
        """Return where token t of the n runs that have one lies: [n]."""
        return self.starts[: self.runs.running(t)] + t

    def token(self, t: int) -> list[torch.Tensor]:
        """Return q, k, v, alpha, beta, do of token t, shaped to meet states [n, heads, K, V]."""
        rows = self.rows(t).unsqueeze(-1)
        q, k, v, g, beta, do = (
            x[rows, columns].to(self.dtype) for x, columns in zip(self.tokens, self.columns, strict=True)
        )
        q, k, alpha = (x.unsqueeze(-1) for x in (q, k, torch.exp(g)))
        return [q, k, v.unsqueeze(-2), alpha, beta[..., None, None], do.unsqueeze(-2)]

    def advance(self, t: int, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Move S [n, heads, K, V] over token t in place; return P [n, heads, K, V] and u [n, heads, 1, V]."""
        _, k, v, alpha, beta, _ = self.token(t)
        P = alpha * S
        u = v - k.mT @ P
        S.copy_(P).add_(k * (beta * u))
        return P, u

    def segment(self, first: int, S: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Move S in place over the segment that begins at token `first`; return what `advance` did, token by token."""
        last = min(first + SEGMENT, self.runs.longest)
        return [self.advance(t, S[: self.runs.running(t)]) for t in range(first, last)]

    def back(self, S: torch.Tensor, dS: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the states S that enter the runs, given dS for those that leave; both are kept."""
        entering, S, dS = [], S.clone(), dS.clone()
        for first in range(0, self.runs.longest, SEGMENT):
            entering.append(S.clone())
            self.segment(first, S)
        for first in reversed(range(0, self.runs.longest, SEGMENT)):
            done = self.segment(first, entering.pop())
            for t in reversed(range(first, first + len(done))):
                self.retreat(t, *done.pop(), dS[: self.runs.running(t)])
        return dS

    def retreat(self, t: int, P: torch.Tensor, u: torch.Tensor, dS: torch.Tensor) -> None:
        """Move dS back over token t in place and store the token's gradients: the equations above."""
        q, k, _, alpha, beta, do = self.token(t)
        delta = beta * u
        dS += self.scale * q * do
        dq = self.scale * ((P + k * delta) @ do.mT)
        ddelta = k.mT @ dS
        du = beta * ddelta
        dk = dS @ delta.mT - P @ du.mT
        dbeta = (ddelta * u).sum((-1, -2))
        dS -= k * du
        dg = (dS * P).sum(-1)
        dS *= alpha
        rows = self.rows(t)
        parts = (dq.squeeze(-1), dk.squeeze(-1), du.squeeze(-2), dg, dbeta)
        for whole, part in zip(self.gradients, parts, strict=True):
            whole[rows, self.heads] = part
