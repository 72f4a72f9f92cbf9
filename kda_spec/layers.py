"""Compute the layers of Kimi Linear, each from its input x [B, T, D] and its own tensors of the released checkpoint.

    KDA        short convolutions, SiLU, l2norm, gates, the recurrence, gated norm         section 4, equations 1 and 10
    MLA        full attention over latents, without positions, expanded and absorbed       section 4; DeepSeek-V2
    experts    sigmoid router with a bias for the choice alone, routed and shared MLPs     section 4; DeepSeek-V3
    MLP        down(SiLU(gate x) * up x)

`w` maps the names behind the layer's prefix ("q_proj.weight") to arrays; a projection is stored [out, in]. A layer that
remembers takes the state behind the tokens before x and returns the one behind its last token; nothing is changed in
place. Results have the dtype of x: float64 is the definition, float32 shows what that precision loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kda_spec.gates import beta_sigmoid, l2norm, lower_bound_gate, softplus_gate
from kda_spec.recurrent import kda

Tensors = Mapping[str, np.ndarray]

RENORMALISE_EPS = 1e-20


@dataclass(frozen=True)
class KdaSettings:
    """Hold the sizes and the forms of a KDA layer, K = V = head_dim."""

    heads: int
    head_dim: int
    taps: int
    """Tokens that a short convolution reads, its own included."""
    eps: float = 1e-5
    lower_bound: float | None = None
    """None: softplus gate (Kimi Linear). A negative number: lower-bound gate (Kimi K3, Ling 3.0, GLM 5.3 Flash)."""
    full_rank_decay: bool = False
    """The gate's input is f_proj x (Ling 3.0) instead of f_b_proj f_a_proj x."""
    decay_per_head: bool = False
    """One decay for all channels of a head, from f_proj x, as in Gated DeltaNet; dt_bias is [H] then."""
    full_rank_gate: bool = False
    """The output gate's input is g_proj x (Kimi K3, Ling 3.0) instead of g_b_proj g_a_proj x."""
    allow_neg_eigval: bool = False
    """beta = 2 sigmoid(b_proj x) instead of sigmoid(b_proj x)."""

    @property
    def decays(self) -> int:
        """Return how many decays a token has."""
        return self.heads if self.decay_per_head else self.heads * self.head_dim


@dataclass(frozen=True, eq=False)
class KdaState:
    """Hold what a KDA layer remembers: the last inputs of its convolutions [B, taps - 1, H K], and S [B, H, K, V]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    S: np.ndarray


@dataclass(frozen=True)
class MlaSettings:
    """Hold the sizes of an MLA layer: a key is `nope` channels of its head's own and `rope` that all heads share."""

    heads: int
    latent: int
    nope: int
    rope: int
    value: int
    latent_eps: float = 1e-6
    """Of kv_a_layernorm and q_a_layernorm: 1e-6 in the published code and in transformers, 1e-5 in other engines."""
    q_latent: int | None = None
    """Size of the queries' own latent (Kimi K3); None: q_proj."""


@dataclass(frozen=True, eq=False)
class MlaState:
    """Hold what an MLA layer remembers of P tokens: latents [B, P, latent] and shared keys [B, P, rope]."""

    latent: np.ndarray
    key: np.ndarray


@dataclass(frozen=True)
class MoeSettings:
    """Hold the sizes of the experts and the rules of their choice."""

    experts: int
    top_k: int
    width: int
    shared: int = 1
    """Shared experts, stored as one MLP of `shared * width` channels; 0: none."""
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scaling: float = 1.0
    biased_weights: bool = False
    """Weigh with sigmoid + bias, as the published code does by an alias, instead of with the sigmoid."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Hold which experts a token takes [..., top_k], best first, their weights, and how clear the choice was [...].

    `margin` is the smallest gap between what was chosen and what was not, of groups and of experts; 0 is a tie.
    """

    experts: np.ndarray
    weights: np.ndarray
    margin: np.ndarray


def kda_layer(x, w: Tensors, settings: KdaSettings, state: KdaState, recurrence=kda) -> tuple[np.ndarray, KdaState]:
    """Run a KDA layer (section 4, equations 1 and 10): x [B, T, D] to y [B, T, D] and the state behind it.

        q, k = l2norm(SiLU(conv(W_q x))), l2norm(SiLU(conv(W_k x)))      v = SiLU(conv(W_v x))
        y    = W_o (sigmoid(gate) * RMSNorm(KDA(q, k, v, g, beta)))      head by head

    `recurrence` is a form of equation 1 with the arguments and results of `kda_spec.kda`.
    """
    streams, tails = {}, {}
    for name in "qkv":
        projected = x @ w[f"{name}_proj.weight"].T
        streams[name], tails[name] = short_convolution(projected, w[f"{name}_conv1d.weight"], getattr(state, name))
    q, k, v = (_heads(silu(streams[name]), settings.heads) for name in "qkv")
    g, beta = forget_gate(x, w, settings), write_strength(x, w, settings)
    q, k, g, beta = (array.astype(x.dtype) for array in (l2norm(q), l2norm(k), g, beta))
    o, S = recurrence(q, k, v, g.swapaxes(1, 2), beta.swapaxes(1, 2), state.S)
    o = rms_norm(o.astype(x.dtype), w["o_norm.weight"], settings.eps) * sigmoid(output_gate(x, w, settings))
    return _merged(o) @ w["o_proj.weight"].T, KdaState(**tails, S=S.astype(x.dtype))


def short_convolution(x, weight, tail) -> tuple[np.ndarray, np.ndarray]:
    """Convolve every channel with its own taps, causally (section 4): y_t = sum_j weight_j x_{t - taps + 1 + j}.

    x [B, T, D], weight [D, 1, taps], tail [B, taps - 1, D], the inputs before x, zeros at a sequence's start.
    Returns y [B, T, D], not yet activated, and the tail behind x.
    """
    T, inputs = x.shape[1], np.concatenate([tail, x], axis=1)
    y = sum(weight[:, 0, j] * inputs[:, j : j + T] for j in range(weight.shape[-1]))
    return y, inputs[:, T:]


def forget_gate(x, w: Tensors, settings: KdaSettings) -> np.ndarray:
    """Return g [B, T, H, K], natural log, in one of the family's forms (section 4), in float64.

    A_log is stored [H], [H, 1] or [1, 1, H, 1], or longer where it was padded; dt_bias [H K] or [H, K].
    """
    direct = settings.full_rank_decay or settings.decay_per_head
    f = x @ w["f_proj.weight"].T if direct else _low_rank(x, w, "f")
    f = f.reshape(*f.shape[:2], settings.heads, settings.decays // settings.heads)
    A_log, dt_bias = w["A_log"].reshape(-1)[: settings.heads], w["dt_bias"].reshape(-1)
    if settings.lower_bound is None:
        g = softplus_gate(f, A_log, dt_bias)
    else:
        g = lower_bound_gate(f, settings.lower_bound, A_log, dt_bias)
    return np.broadcast_to(g, (*g.shape[:3], settings.head_dim))


def write_strength(x, w: Tensors, settings: KdaSettings) -> np.ndarray:
    """Return beta [B, T, H] (section 4), in float64."""
    return beta_sigmoid(x @ w["b_proj.weight"].T, settings.allow_neg_eigval)


def output_gate(x, w: Tensors, settings: KdaSettings) -> np.ndarray:
    """Return what equation 10 takes the sigmoid of, heads first: [B, H, T, V]."""
    return _heads(x @ w["g_proj.weight"].T if settings.full_rank_gate else _low_rank(x, w, "g"), settings.heads)


def mla_layer(x, w: Tensors, settings: MlaSettings, state: MlaState, absorbed=False) -> tuple[np.ndarray, MlaState]:
    """Run an MLA layer without positions (section 4, "NoPE for MLA Layers"): x [B, T, D] to y and the state behind it.

    Token t attends to itself and to all before it, those of the state included. `absorbed` chooses the form of the same
    attention: `attend_absorbed` or `attend_expanded`.
    """
    queries = x @ w["q_proj.weight"].T if settings.q_latent is None else _queries_from_latent(x, w, settings)
    latent, key = np.split(x @ w["kv_a_proj_with_mqa.weight"].T, [settings.latent], axis=-1)
    latent = rms_norm(latent, w["kv_a_layernorm.weight"], settings.latent_eps)
    state = MlaState(*(np.concatenate(pair, axis=1) for pair in ((state.latent, latent), (state.key, key))))
    attend = attend_absorbed if absorbed else attend_expanded
    o = attend(_heads(queries, settings.heads), state, w["kv_b_proj.weight"], settings)
    return _merged(o) @ w["o_proj.weight"].T, state


def attend_expanded(q, state: MlaState, kv_b, settings: MlaSettings) -> np.ndarray:
    """Attend with a key and a value per head, grown from the latents: o [B, H, T, V] for q [B, H, T, nope + rope].

        k_h = [W_K,h latent, key]     v_h = W_V,h latent     o_h = softmax(q_h k_h^T / sqrt(nope + rope)) v_h

    kv_b [H (nope + V), latent] holds W_K,h above W_V,h for every head.
    """
    W_K, W_V = _up_projections(kv_b, settings)
    own = np.einsum("bpr,hnr->bhpn", state.latent, W_K)
    shared = np.broadcast_to(state.key[:, None], (*own.shape[:3], settings.rope))
    k = np.concatenate([own, shared], axis=-1)
    v = np.einsum("bpr,hvr->bhpv", state.latent, W_V)
    return _causal_softmax(q @ k.swapaxes(-1, -2) * _scale(settings)) @ v


def attend_absorbed(q, state: MlaState, kv_b, settings: MlaSettings) -> np.ndarray:
    """Attend as `attend_expanded` does, with the latents themselves as the keys and values of all heads.

        q_h k_h^T = [W_K,h^T q_h,nope, q_h,rope] [latent, key]^T        o_h = W_V,h (softmax(...) latent)

    No key of a past token is expanded: multi-query attention over latent + rope channels (section 4).
    """
    W_K, W_V = _up_projections(kv_b, settings)
    q_nope, q_rope = np.split(q, [settings.nope], axis=-1)
    q = np.concatenate([np.einsum("bhtn,hnr->bhtr", q_nope, W_K), q_rope], axis=-1)
    k = np.concatenate([state.latent, state.key], axis=-1)[:, None]
    weights = _causal_softmax(q @ k.swapaxes(-1, -2) * _scale(settings))
    return np.einsum("bhtr,hvr->bhtv", weights @ state.latent[:, None], W_V)


def moe_layer(x, w: Tensors, settings: MoeSettings) -> tuple[np.ndarray, Routing]:
    """Return shared(x) + sum of weight_e expert_e(x) over a token's experts e, x [B, T, D] (section 4, Figure 3)."""
    routing = route(x, w, settings)
    shared = [w[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")] if settings.shared else None
    y = mlp(x, *shared) if shared else np.zeros_like(x)
    for e in np.unique(routing.experts):
        weight = np.sum(routing.weights * (routing.experts == e), axis=-1, keepdims=True)
        y = y + weight * mlp(x, *(w[f"experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2")))
    return y, routing


def route(x, w: Tensors, settings: MoeSettings) -> Routing:
    """Choose a token's experts and their weights (DeepSeek-V3, section 2.1.2), x [..., D].

    s       = sigmoid(W x)                    one score per expert
    choice  = s + bias                        the bias decides what is taken, not how much of it
    groups  : only experts of the best groups, by the sum of their two best choices
    experts : the best top_k by choice, of equals the one with the lower index
    weights = scaling * s / (sum s + 1e-20)   the sum over the chosen; not divided unless renormalise
    """
    s = sigmoid(x @ w["gate.weight"].T)
    choice = s + w["gate.e_score_correction_bias"]
    allowed, group_margin = _best_groups(choice, settings)
    experts, expert_margin = _best(np.where(allowed, choice, -np.inf), settings.top_k)
    weights = np.take_along_axis(choice if settings.biased_weights else s, experts, axis=-1)
    if settings.renormalise:
        weights = weights / (np.sum(weights, axis=-1, keepdims=True) + RENORMALISE_EPS)
    return Routing(experts, settings.scaling * weights, np.minimum(group_margin, expert_margin))


def mlp(x, gate, up, down) -> np.ndarray:
    """Return down (SiLU(gate x) * up x), x [..., D], gate and up [width, D], down [D, width]."""
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def rms_norm(x, weight, eps: float) -> np.ndarray:
    """Return weight * x / sqrt(mean x^2 + eps) along the last axis."""
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def sigmoid(x) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), which neither over- nor underflows on its way."""
    return np.exp(-np.logaddexp(0, -x, dtype=x.dtype))


def silu(x) -> np.ndarray:
    """Return x sigmoid(x), the report's Swish."""
    return x * sigmoid(x)


def _heads(x, heads: int) -> np.ndarray:
    """Return [B, T, H C] as [B, H, T, C]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _merged(x) -> np.ndarray:
    """Return [B, H, T, C] as [B, T, H C]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def _low_rank(x, w: Tensors, name: str) -> np.ndarray:
    return x @ w[f"{name}_a_proj.weight"].T @ w[f"{name}_b_proj.weight"].T


def _queries_from_latent(x, w: Tensors, settings: MlaSettings) -> np.ndarray:
    latent = rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], settings.latent_eps)
    return latent @ w["q_b_proj.weight"].T


def _up_projections(kv_b, settings: MlaSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return W_K [H, nope, latent] and W_V [H, V, latent]."""
    per_head = kv_b.reshape(settings.heads, settings.nope + settings.value, settings.latent)
    return per_head[:, : settings.nope], per_head[:, settings.nope :]


def _scale(settings: MlaSettings) -> float:
    return (settings.nope + settings.rope) ** -0.5


def _causal_softmax(scores) -> np.ndarray:
    """Return the softmax over the last axis of [..., T, P], the T queries being those of the last T of P tokens."""
    T, P = scores.shape[-2:]
    seen = np.arange(P) <= np.arange(P - T, P)[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True, initial=-np.inf))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def _best(values, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the `count` largest along the last axis, of equals the lower first, and their margin."""
    order = np.argsort(-values, axis=-1, kind="stable")
    if count == values.shape[-1]:
        return order, np.full(values.shape[:-1], np.inf)
    edge = np.take_along_axis(values, order[..., count - 1 : count + 1], axis=-1)
    return order[..., :count], edge[..., 0] - edge[..., 1]


def _best_groups(choice, settings: MoeSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return which experts stand in one of the best groups, as a mask [..., experts], and the groups' margin."""
    grouped = choice.reshape(*choice.shape[:-1], settings.groups, settings.experts // settings.groups)
    score = np.sum(np.sort(grouped, axis=-1)[..., -2:], axis=-1)
    groups, margin = _best(score, settings.top_groups)
    kept = np.any(groups[..., None] == np.arange(settings.groups), axis=-2)
    return np.repeat(kept, grouped.shape[-1], axis=-1), margin
