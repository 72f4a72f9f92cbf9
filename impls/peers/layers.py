"""The step of a whole KDA layer as other people's models compose it: rows beside those of `impls.layer_steps`.

Their convolutions write the window of inputs in place: they get a copy of it at each call, as ours make one, so that
calls can be repeated and what is given stays as it was.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from impls.layer_steps import row

TRANSFORMERS = "transformers.models.kimi_linear.modeling_kimi_linear"


def load_transformers() -> Callable:
    """Import the functions of transformers' Kimi Linear; ImportError where it has none (5.16 or later)."""
    theirs = import_module(TRANSFORMERS)

    def run(qkv, g, beta, gate, inputs, state, *, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon):
        if lower_bound is not None:
            raise ValueError(f"transformers' Kimi Linear has no lower bound of the gate, got {lower_bound}")
        N, HV, K, V = state.shape
        # unwrapped on a CPU: beside an installed FLA it would call Triton kernels there too
        update, recurrent = (
            inspect.unwrap(x) if qkv.device.type == "cpu" else x
            for x in (theirs.causal_conv1d_update, theirs.recurrent_kimi_delta_attention)
        )
        window = inputs.transpose(1, 2).contiguous()
        mixed = update(qkv[:, :, None], window, weight=weight, bias=None, activation="silu").transpose(1, 2)
        q, k, v = (x.unflatten(2, (HV, -1)) for x in mixed.split((HV * K, HV * K, HV * V), 2))
        raw = (g.float() + dt_bias.float().view(HV, K))[:, None]
        decay = -A_log.float().exp()[:, None] * torch.where(raw > 20.0, raw, torch.log(1.0 + torch.exp(raw)))
        o, S = recurrent(
            q, k, v, g=decay, beta=beta[:, None].sigmoid(), initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        norm = SimpleNamespace(weight=norm_weight, variance_epsilon=epsilon, activation="sigmoid")
        return theirs.KimiLinearRMSNormGated.forward(norm, o, gate[:, None])[:, 0], S

    return run


def load_fla() -> Callable:
    """Import what FLA's KimiDeltaAttention calls in a decoding step. Raises ImportError without fla-core."""
    from fla.modules.causal_conv1d.ops import causal_conv1d_update
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.kda import fused_recurrent_kda

    def run(qkv, g, beta, gate, inputs, state, *, weight, norm_weight, A_log, dt_bias, lower_bound, epsilon):
        N, HV, K, V = state.shape
        sizes, parts = (HV * K, HV * K, HV * V), []
        # their cache holds W inputs, of which the oldest falls out first; one convolution for each of q, k and v
        window = F.pad(inputs.transpose(1, 2), (1, 0))
        own = zip(qkv.split(sizes, 1), window.split(sizes, 1), weight.split(sizes), strict=True)
        for x, cache, w in own:
            mixed, _ = causal_conv1d_update(x[:, None], cache.contiguous(), weight=w, activation="silu")
            parts.append(mixed.unflatten(2, (HV, -1)))
        o, S = fused_recurrent_kda(
            *parts, g[:, None], beta[:, None], A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
            initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        return rms_norm_gated(o[:, 0], gate, norm_weight, None, activation="sigmoid", eps=epsilon), S

    return run


TRANSFORMERS_LAYER = row(
    "transformers_layer", "transformers' functions for a layer's step", load_transformers, ("cpu", "cuda")
)
FLA_LAYER = row("fla_layer", "FLA's kernels for a layer's step", load_fla, ("cuda",))
