"""Take one token of each sequence through all of a KDA layer that lies between its projections, in one call.

    q, k, v = silu(conv(qkv))      o, S = KDA(l2norm q, l2norm k, v, decay(g), sigmoid(beta), S)
    y = rms_norm(o) * sigmoid(gate)

What `impls.decode_kda` does with rings and a pool, as a function: nothing that is given changes, so that who is
interrupted has lost nothing. An op of its own: torch.compile takes it as it is, and a CUDA graph holds it.
"""

import torch

from impls.decode import GatedNorm, ShortConvolution, decode_kda
from impls.pages import room
from impls.registration import in_full_precision, library


def decode_layer(
    qkv: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    inputs: torch.Tensor,
    state: torch.Tensor,
    *,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [N, HV, V] in qkv's dtype, and the inputs and states behind the token, in those of the ones before.

    Args:
        qkv: [N, D] with D = 2 H K + HV V, raw projections of q, k and v, one behind the other.
        g: [N, HV, K]. beta: [N, HV]. gate: [N, HV, V]. All before their activations.
        inputs: [N, W - 1, D], what the convolutions remember, the oldest first. state: [N, HV, K, V].
        weight: [D, W], W from 2 to 4. norm_weight: [V]. A_log, dt_bias, lower_bound: as for `impls.chunk_kda`.
        implementation: as for `impls.decode_kda`.

    Raises as `impls.decode_kda`, with its names.
    """
    _check_sizes(qkv, g, beta, gate, inputs, state, weight)
    y, window, S = _op(
        qkv, g, beta, gate, inputs, state, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon,
        implementation or "",
    )  # fmt: skip
    return y, window[:, 1:], S


def _check_sizes(qkv, g, beta, gate, inputs, state, weight) -> None:
    if qkv.ndim != 2 or state.ndim != 4:
        raise ValueError(f"qkv must be [N, D] and state [N, HV, K, V], got {list(qkv.shape)} and {list(state.shape)}")
    (N, D), (HV, K, V) = qkv.shape, state.shape[1:]
    if D <= HV * V or (D - HV * V) % (2 * K):
        raise ValueError(f"qkv must be [N, 2 H K + HV V] for state [N, HV, K, V] = {list(state.shape)}, got D = {D}")
    if weight.ndim != 2 or tuple(inputs.shape) != (N, weight.shape[1] - 1, D):
        raise ValueError(
            f"inputs must be [N, W - 1, D] for qkv [N, D] = {list(qkv.shape)} and weight [D, W] = "
            f"{list(weight.shape)}, got {list(inputs.shape)}"
        )
    for name, x, shape in (("g", g, (N, HV, K)), ("beta", beta, (N, HV)), ("gate", gate, (N, HV, V))):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")


def _forward(
    qkv, g, beta, gate, inputs, state, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon, implementation
):
    """Return y, the inputs [N, W, D] with those of the token, and the states behind it."""
    (N, past, D), (HV, K, V) = inputs.shape, state.shape[1:]
    sizes = [(D - HV * V) // 2] * 2 + [HV * V]
    window = inputs.new_empty((N, past + 1, D))
    window[:, :past] = inputs
    q, k, v = (x.unflatten(1, (-1, size))[:, None] for x, size in zip(qkv.split(sizes, 1), (K, K, V), strict=True))
    S = room(tuple(state.shape), state.dtype, state.device)
    y = decode_kda(
        q, k, v, g[:, None], beta[:, None], state, final_state=S,
        convolution=ShortConvolution(*weight.split(sizes), *window.split(sizes, 2)),
        norm=GatedNorm(norm_weight, gate[:, None], epsilon), A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        implementation=implementation or None,
    )  # fmt: skip
    return y[:, 0], window, S


def _fake(qkv, g, beta, gate, inputs, state, *others):
    (N, past, D), (HV, _, V) = inputs.shape, state.shape[1:]
    return qkv.new_empty((N, HV, V)), inputs.new_empty((N, past + 1, D)), state.new_empty(state.shape)


_SCHEMA = (
    "decode_layer(Tensor qkv, Tensor g, Tensor beta, Tensor gate, Tensor inputs, Tensor state, Tensor weight, "
    "Tensor norm_weight, Tensor A_log, Tensor? dt_bias, float? lower_bound, float epsilon, str implementation) -> "
    "(Tensor, Tensor, Tensor)"
)
library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
library.impl("decode_layer", in_full_precision(_forward), "CompositeExplicitAutograd")
torch.library.register_fake("kda_forge::decode_layer", _fake, lib=library)
_op = torch.ops.kda_forge.decode_layer.default
