"""The mathematics of Kimi Delta Attention in NumPy float64: definition, other forms, family, gradients, costs,
and of Kimi Linear, the model built on it."""

from kda_spec import costs
from kda_spec.attention import attention
from kda_spec.chunkwise import chunkwise
from kda_spec.family import FAMILY, Dplr, Member, Parameters, Step
from kda_spec.gates import (
    beta_sigmoid,
    beta_sigmoid_backward,
    l2norm,
    l2norm_backward,
    lower_bound_gate,
    lower_bound_gate_backward,
    softplus_gate,
    softplus_gate_backward,
)
from kda_spec.gradients import gradients
from kda_spec.layers import (
    KdaSettings,
    KdaState,
    MlaSettings,
    MlaState,
    MoeSettings,
    Routing,
    attend_absorbed,
    attend_expanded,
    kda_layer,
    mla_layer,
    moe_layer,
    route,
    short_convolution,
)
from kda_spec.model import ModelOutputs, Settings, block, empty_cache, forward, settings_of, tensor_shapes
from kda_spec.recurrent import constrained_dplr, general_dplr, kda, recurrent
from kda_spec.types import Gradients, Inputs, Outputs, Sizes, check_domain

__all__ = [
    "FAMILY",
    "Dplr",
    "Gradients",
    "Inputs",
    "KdaSettings",
    "KdaState",
    "Member",
    "MlaSettings",
    "MlaState",
    "ModelOutputs",
    "MoeSettings",
    "Outputs",
    "Parameters",
    "Routing",
    "Settings",
    "Sizes",
    "Step",
    "attend_absorbed",
    "attend_expanded",
    "attention",
    "beta_sigmoid",
    "beta_sigmoid_backward",
    "block",
    "check_domain",
    "chunkwise",
    "constrained_dplr",
    "costs",
    "empty_cache",
    "forward",
    "general_dplr",
    "gradients",
    "kda",
    "kda_layer",
    "l2norm",
    "l2norm_backward",
    "lower_bound_gate",
    "lower_bound_gate_backward",
    "mla_layer",
    "moe_layer",
    "recurrent",
    "route",
    "settings_of",
    "short_convolution",
    "softplus_gate",
    "softplus_gate_backward",
    "tensor_shapes",
]
