"""Compute KDA as an attention: every query weighs every earlier value (equation 12), no state is ever formed.

Unrolling equation 1 with A_j = (I - beta_j k_j k_j^T) Diag(alpha_j) gives, later factors to the left,

    o_t = scale * ( sum_{i<=t} [q_t^T A_t A_{t-1} ... A_{i+1} (beta_i k_i)] v_i  +  [q_t^T A_t ... A_1] S_0 )

Equation 12 as printed is not this: it has the two factors of A_j in the other order (decay after erase), omits beta_i,
and numbers key and value by the index of the product. The KDA row of Table 6 has the factors in that other order, too.

The brackets need one row r_t = q_t^T A_t ... A_{i+1} per query. All rows walk back through the tokens together:

    score_{t,i} = r_t (beta_i k_i)         r_t <- r_t A_i = (r_t - score_{t,i} k_i^T) Diag(alpha_i)

The final state is what K unit queries would read behind the last token. Decays are only multiplied, so every gate in
[-inf, 0] is in the domain. Work is quadratic in T; memory holds the T x T scores.
"""

from __future__ import annotations

import numpy as np

from kda_spec.types import Inputs, Outputs


def attention(inputs: Inputs) -> Outputs:
    """Run KDA in its quadratic form: o [B, T, HV, V] and final_state [N, HV, K, V] as `recurrent`."""
    sizes = inputs.sizes
    o = np.empty((sizes.B, sizes.T, sizes.HV, sizes.V))
    final_state = np.empty((sizes.N, sizes.HV, sizes.K, sizes.V))
    for batch, tokens, states in inputs.runs():
        q, k, v, g, beta = inputs.heads_first(batch, tokens)
        rows, scores = _walk_back(q, k, np.exp(g), beta)
        read = scores @ v
        if inputs.initial_state is not None:
            read += rows @ inputs.initial_state[states]
        T = q.shape[2]
        o[batch, tokens] = inputs.resolved_scale * read[:, :, :T].swapaxes(1, 2)
        final_state[states] = read[:, :, T:]
    return Outputs(o, final_state)


def _walk_back(q, k, alpha, beta) -> tuple[np.ndarray, np.ndarray]:
    """Return r_t before token 1 [..., T + K, K] and the scores [..., T + K, T]; the last K rows are unit queries."""
    *lead, T, K = q.shape
    rows = np.concatenate([q, np.broadcast_to(np.eye(K), (*lead, K, K))], axis=-2)
    scores = np.zeros((*lead, T + K, T))
    for i in reversed(range(T)):
        later = rows[..., i:, :]
        k_i = k[..., i, :, None]
        score = later @ k_i * beta[..., i, None, None]
        scores[..., i:, i] = score[..., 0]
        rows[..., i:, :] = (later - score * k_i.swapaxes(-1, -2)) * alpha[..., i, None, :]
    return rows, scores
