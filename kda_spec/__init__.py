"""The mathematics of Kimi Delta Attention in NumPy float64: definition, other forms, family, gradients, costs."""

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
from kda_spec.recurrent import constrained_dplr, general_dplr, kda, recurrent
from kda_spec.types import Gradients, Inputs, Outputs, Sizes, check_domain

__all__ = [
    "FAMILY",
    "Dplr",
    "Gradients",
    "Inputs",
    "Member",
    "Outputs",
    "Parameters",
    "Sizes",
    "Step",
    "attention",
    "beta_sigmoid",
    "beta_sigmoid_backward",
    "check_domain",
    "chunkwise",
    "constrained_dplr",
    "costs",
    "general_dplr",
    "gradients",
    "kda",
    "l2norm",
    "l2norm_backward",
    "lower_bound_gate",
    "lower_bound_gate_backward",
    "recurrent",
    "softplus_gate",
    "softplus_gate_backward",
]
