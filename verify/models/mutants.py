"""Models with one real bug planted each, modelled on bugs that shipped: every one must fail a property."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kda_spec import layers
from kda_spec.layers import KdaState, MlaState
from verify.models.reference import Cache, Change, Memory, Reference
from verify.models.targets import MUTANT


@dataclass(frozen=True)
class Mutant:
    """A planted bug: its name, the bug that it imitates, and where it departs from the definition."""

    name: str
    imitates: str
    change: Change


CLEAN = Mutant("clean", "nothing: the definition in float32", Change())


def find(target: str) -> Callable[[Path], Reference]:
    """Return the function that loads a mutant, by its target's name. Raises KeyError."""
    by_name = {m.name: m for m in (CLEAN, *MUTANTS)}
    return partial(Reference, change=by_name[target.removeprefix(MUTANT)].change)


def _everywhere(**functions: Callable) -> Change:
    """Replace functions of `kda_spec.layers` in prompts and steps."""
    return Change(prefill=functions, decode=functions)


def _setting(layer: str, **fields) -> Change:
    """Change settings of a kind of layer; a function gets the old value."""

    def changed(settings):
        own = getattr(settings, layer)
        values = {name: x(getattr(own, name)) if callable(x) else x for name, x in fields.items()}
        return replace(settings, **{layer: replace(own, **values)})

    return Change(settings=changed)


def _tensors(suffix: str, function: Callable) -> Change:
    """Change the tensors whose names end so."""
    return Change(tensors=lambda all_: {n: function(x) if n.endswith(suffix) else x for n, x in all_.items()})


def _states(kind, function: Callable) -> Callable[[Memory, Memory, int], Memory]:
    """Change what layers of a kind remember: function(before, after, tokens)."""

    def carry(before: Memory, after: Memory, tokens: int) -> Memory:
        pairs = zip(before, after, strict=True)
        return tuple(function(b, a, tokens) if isinstance(a, kind) else a for b, a in pairs)

    return carry


def _kda(function: Callable) -> Change:
    return Change(carry=_states(KdaState, function))


def _without_tails(before: KdaState, after: KdaState, tokens: int) -> KdaState:
    return replace(after, **{name: np.zeros_like(getattr(after, name)) for name in "qkv"})


def _fork_without_last(cache: Cache) -> Cache:
    """Lose the last latent of every text: an end that is taken for the index of the last token."""
    drop = _states(MlaState, lambda before, after, tokens: MlaState(after.latent[:, :-1], after.key[:, :-1]))
    return replace(cache.copy(), memories=[drop(memory, memory, 0) for memory in cache.memories])


def _forget(cache: Cache) -> None:
    """Empty the states of KDA layers and the latents of MLA layers."""
    forget = _states(KdaState | MlaState, lambda before, after, n: type(after)(*(x * 0 for x in vars(after).values())))
    cache.memories = [forget(memory, memory, 0) for memory in cache.memories]


def _open_gate(x, w, settings):
    return np.full_like(_OUTPUT_GATE(x, w, settings), 100.0)


def _gated_norm_without_norm(x, weight, eps):
    return x * weight if x.ndim == 4 else _RMS_NORM(x, weight, eps)


def _norm_over_all_heads(x, weight, eps):
    if x.ndim < 4:
        return _RMS_NORM(x, weight, eps)
    return weight * (x / np.sqrt(np.mean(x * x, axis=(1, 3), keepdims=True) + eps))


def _last_of_equals(values, count):
    order, margin = _BEST(values[..., ::-1], count)
    return values.shape[-1] - 1 - order, margin


def _absorbed_without_shared(q, state, kv_b, settings):
    return _ABSORBED(q, replace(state, key=np.zeros_like(state.key)), kv_b, settings)


def _absorbed_scale(q, state, kv_b, settings):
    wrong = np.sqrt((settings.nope + settings.rope) / (settings.latent + settings.rope))
    return _ABSORBED(q * q.dtype.type(wrong), state, kv_b, settings)


def _own_piece_only(q, state, kv_b, settings):
    T = q.shape[2]
    return _EXPANDED(q, MlaState(state.latent[:, -T:], state.key[:, -T:]), kv_b, settings)


def _sees_the_next(scores):
    T, P = scores.shape[-2:]
    scores = np.where(np.arange(P) <= np.arange(P - T, P)[:, None] + 1, scores, -np.inf)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def _best_by_one(choice, settings):
    grouped = choice.reshape(*choice.shape[:-1], settings.groups, settings.experts // settings.groups)
    groups, margin = layers._best(np.max(grouped, axis=-1), settings.top_groups)
    kept = np.any(groups[..., None] == np.arange(settings.groups), axis=-2)
    return np.repeat(kept, grouped.shape[-1], axis=-1), margin


def _first_rate(x, w, settings):
    return _GATE(x, {**w, "A_log": np.full_like(w["A_log"], w["A_log"].reshape(-1)[0])}, settings)


def _noisy(x, gate, up, down, calls=iter(range(1, 2**62))):  # noqa: B008 - one count for all calls
    return _MLP(x, gate, up, down) * x.dtype.type(1 + 2.0**-23 * (next(calls).bit_count() % 2))  # never periodic


_RMS_NORM, _BEST, _ABSORBED, _EXPANDED = layers.rms_norm, layers._best, layers.attend_absorbed, layers.attend_expanded
_GATE, _OUTPUT_GATE, _MLP = layers.forget_gate, layers.output_gate, layers.mlp

MUTANTS = (
    Mutant("conv_not_carried", "each call starts the convolutions anew", _kda(_without_tails)),
    Mutant(
        "conv_not_moved_by_a_step",
        "the convolutions' inputs stay as the prompt left them",
        _kda(lambda before, after, n: replace(after, q=before.q, k=before.k, v=before.v) if n == 1 else after),
    ),
    Mutant(
        "conv_taps_reversed", "taps read from the wrong end", _tensors("conv1d.weight", lambda x: x[..., ::-1].copy())
    ),
    Mutant(
        "state_not_carried",
        "prefix caches with empty states (sglang#26575)",
        _kda(lambda before, after, n: replace(after, S=np.zeros_like(after.S))),
    ),
    Mutant(
        "state_transposed",
        "V-major written, K-major read (vllm#41292)",
        _kda(lambda before, after, n: replace(after, S=after.S.swapaxes(-1, -2))),
    ),
    Mutant("output_gate_missing", "eq. 10 without its sigmoid", _everywhere(output_gate=_open_gate)),
    Mutant("gated_norm_missing", "eq. 10 without its RMSNorm", _everywhere(rms_norm=_gated_norm_without_norm)),
    Mutant(
        "gated_norm_over_all_heads", "one norm for all heads of a token", _everywhere(rms_norm=_norm_over_all_heads)
    ),
    Mutant("l2norm_missing", "queries and keys of any length", _everywhere(l2norm=lambda x: x)),
    Mutant("beta_doubled", "allow_neg_eigval taken for granted", _setting("kda", allow_neg_eigval=True)),
    Mutant("dt_bias_missing", "the gate's bias is not read", _tensors("dt_bias", np.zeros_like)),
    Mutant("one_rate_for_all_heads", "A_log of the first head for all", _everywhere(forget_gate=_first_rate)),
    Mutant(
        "latent_eps_of_the_others",
        "the published code's 1e-6 is the config's 1e-5 in other engines, and the other way round",
        _setting("mla", latent_eps=lambda eps: 1.1e-5 - eps),
    ),
    Mutant(
        "absorbed_scale", "a step scales by the width of latents", Change(decode={"attend_absorbed": _absorbed_scale})
    ),
    Mutant(
        "absorbed_without_shared_key",
        "the part of keys beside the latent is left out of a step",
        Change(decode={"attend_absorbed": _absorbed_without_shared}),
    ),
    Mutant(
        "piece_sees_itself_only",
        "chunked prefill != one-shot prefill (vllm#52909)",
        Change(prefill={"attend_expanded": _own_piece_only}),
    ),
    Mutant("sees_the_next_token", "the causal mask one off", Change(prefill={"_causal_softmax": _sees_the_next})),
    Mutant(
        "router_weighs_with_bias",
        "scores += bias in place, in the published code (Automodel#3142); without it where it is asked for",
        _setting("moe", biased_weights=lambda biased: not biased),
    ),
    Mutant("router_ignores_bias", "the correction bias is not read", _tensors("score_correction_bias", np.zeros_like)),
    Mutant(
        "router_renormalises_always",
        "moe_renormalize is not read, or the other way round",
        _setting("moe", renormalise=lambda renormalise: not renormalise),
    ),
    Mutant("router_scaling_missing", "routed_scaling_factor is not read", _setting("moe", scaling=1.0)),
    Mutant("groups_by_their_best", "groups chosen by one expert, not two", _everywhere(_best_groups=_best_by_one)),
    Mutant("last_of_equals", "a top-k that takes equals from the end", _everywhere(_best=_last_of_equals)),
    Mutant("fork_loses_a_token", "a fork ends one token early", Change(fork=_fork_without_last)),
    Mutant("fork_is_the_same", "a fork shares what it was forked from", Change(fork=lambda cache: cache)),
    Mutant(
        "truncated_without_states",
        "a prefix cache that cuts latents and leaves states (sglang#30243)",
        Change(
            restore=lambda kept, now: tuple(n if isinstance(n, KdaState) else k for k, n in zip(kept, now, strict=True))
        ),
    ),
    Mutant(
        "states_of_the_boundary_before",
        "a prefix cache with states of another boundary (sglang#31474)",
        Change(
            keep=lambda before, now: tuple(
                b if isinstance(b, KdaState) else n for b, n in zip(before, now, strict=True)
            )
        ),
    ),
    Mutant("texts_swap_states", "a batch's rows in another order than its states", Change(mix=lambda x: x[1:] + x[:1])),
    Mutant("padding_is_remembered", "shorter texts are filled up, and remember it", Change(pad=True)),
    Mutant("ids_wrap_around", "ids are not checked", Change(checks=False)),
    Mutant("written_before_checked", "a refused call has changed the cache", Change(refuse=_forget)),
    Mutant("equal_calls_differ", "bits that depend on what ran before", _everywhere(mlp=_noisy)),
)
