"""Compute KDA chunk by chunk, from the paper's equations 6 to 9: the WY representation and the UT transform.

For one chunk of C tokens with rows Q, K [C, K], V [C, V], the state S before it and Gamma [C, K] the products of decays
from the start of the chunk up to and including each token:

    W, U  = M (Gamma * K), M V      M = (I + StrictTril(Diag(beta) (Gamma * K)(K / Gamma)^T))^-1 Diag(beta)    (6), (7)
    S'    = Diag(gamma^C) S + (Gamma^{i->C} * K)^T (U - W S)                gamma^C = last row of Gamma         (8)
    O     = (Gamma * Q) S + Tril((Gamma * Q)(K / Gamma)^T) (U - W S)        times scale                         (9)

M is applied by forward substitution, row by row, which is equations 4 and 5.

Domain: finite gates, and 1 / Gamma must be representable (equation 9 divides by Gamma): the gates of one channel may
add up to no less than -SPAN_LIMIT within a chunk. Outside, use the recurrent or the attention form.

Two slips of the paper: the second sum of equation 3 runs to r, not to t; and Listing 8b, taken literally, is another
function: beta occurs nowhere in it, and its state update (line 29) writes `v_i` where equation 8 has U - W S.
"""

from __future__ import annotations

import numpy as np

from kda_spec.types import Inputs, Outputs

# exp(-600) = 1e-261 is 47 powers of ten above the smallest normal number: room for the keys that 1 / Gamma multiplies.
SPAN_LIMIT = 600.0


def chunkwise(inputs: Inputs, chunk_size: int = 64) -> Outputs:
    """Run KDA in chunks of any length, the last one of a sequence as short as it comes: o, final_state as `recurrent`.

    Raises ValueError for a chunk_size below 1, and for gates outside the domain of this form (see the top of the file).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    sizes = inputs.sizes
    o = np.empty((sizes.B, sizes.T, sizes.HV, sizes.V))
    final_state = np.zeros((sizes.N, sizes.HV, sizes.K, sizes.V))
    if inputs.initial_state is not None:
        final_state[:] = inputs.initial_state
    for batch, tokens, states in inputs.runs():
        rows = inputs.heads_first(batch, tokens)
        S = final_state[states]
        for start in range(0, tokens.stop - tokens.start, chunk_size):
            chunk = [x[:, :, start : start + chunk_size] for x in rows]
            stop = start + chunk[0].shape[2]
            O, S = _chunk(*chunk, S)
            o[batch, tokens.start + start : tokens.start + stop] = inputs.resolved_scale * O.swapaxes(1, 2)
        final_state[states] = S
    return Outputs(o, final_state)


def _chunk(Q, K, V, g, beta, S) -> tuple[np.ndarray, np.ndarray]:
    """Return O [..., C, V] before the scale and the next state; Q, K, g [..., C, K], V [..., C, V], S [..., K, V]."""
    Gamma = _cumulative_decay(g)
    Q_in, K_in, K_over = Gamma * Q, Gamma * K, (K / Gamma).swapaxes(-1, -2)
    # The entries above the diagonal may overflow; they are no part of the form and np.tril selects them away.
    with np.errstate(over="ignore", invalid="ignore"):
        A, L = np.tril(Q_in @ K_over), np.tril(K_in @ K_over, -1)
    W, U = np.split(_forward_substitution(L, beta, np.concatenate([K_in, V], axis=-1)), [K.shape[-1]], axis=-1)
    pseudo_value = U - W @ S
    gamma_C = Gamma[..., -1:, :]
    to_end = (gamma_C / Gamma * K).swapaxes(-1, -2)
    return Q_in @ S + A @ pseudo_value, gamma_C.swapaxes(-1, -2) * S + to_end @ pseudo_value


def _cumulative_decay(g: np.ndarray) -> np.ndarray:
    """Return Gamma, the products of exp g so far: products keep their last digits, the exp of a large sum does not."""
    span = np.sum(g, axis=-2)
    if not np.all(span >= -SPAN_LIMIT):
        raise ValueError(
            f"g must be finite and add up to at least -{SPAN_LIMIT:g} per channel within a chunk (the chunkwise form "
            f"divides by the cumulative decay), got {np.min(span):g} in a chunk of {g.shape[-2]} tokens"
        )
    return np.cumprod(np.exp(g), axis=-2)


def _forward_substitution(L: np.ndarray, beta: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return X with (I + Diag(beta) L) X = Diag(beta) rows: x_r = beta_r (rows_r - sum_{i<r} L_ri x_i)."""
    X = np.zeros_like(rows)
    for r in range(rows.shape[-2]):
        earlier = (L[..., r : r + 1, :r] @ X[..., :r, :])[..., 0, :]
        X[..., r, :] = beta[..., r, None] * (rows[..., r, :] - earlier)
    return X
