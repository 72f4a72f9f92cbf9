"""A training step of other people's functions: rows beside those of `impls.training_steps`."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch.nn.functional as F

from impls.peers import fla
from impls.peers.layers import TRANSFORMERS
from impls.training_steps import row


def load_fla(safe_gate: bool, saves: bool) -> Callable:
    """Import FLA's chunk_kda; saves: its disable_recompute, which keeps what the backward else computes again."""
    return partial(fla.load(safe_gate), disable_recompute=saves)


def load_transformers(name: str) -> Callable:
    """Import a function of transformers' Kimi Linear, and activate before it as its model does.

    ImportError where it has none (5.16 or later).
    """
    function = getattr(import_module(TRANSFORMERS), name)
    function = inspect.unwrap(function)  # beside an installed FLA it would call Triton kernels, on a CPU too

    def run(q, k, v, g, beta, *, A_log, dt_bias, lower_bound=None, cu_seqlens=None, cu_seqlens_cpu=None, **flags):
        if lower_bound is not None or cu_seqlens is not None:
            raise ValueError("transformers' Kimi Linear has neither a lower bound of the gate nor packed sequences")
        decay = -A_log.exp()[:, None] * F.softplus(g.float() + dt_bias.view(g.shape[-2:]))
        return function(
            q, k, v, g=decay, beta=beta.sigmoid(), initial_state=None, output_final_state=False,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    return run


FLA_ROWS = tuple(
    row(f"train_{name}{'_saving' if saves else ''}", f"{what}, forward and backward{', disable_recompute' * saves}",
        partial(load_fla, safe_gate, saves), ("cuda",))
    for name, what, safe_gate in (("fla", "FLA's chunk_kda", False), ("fla_safe_gate", "FLA with safe_gate", True))
    for saves in (False, True)
)  # fmt: skip
TRANSFORMERS_ROWS = tuple(
    row(f"train_transformers_{form}", f"transformers' {form} function, forward and backward",
        partial(load_transformers, f"{form}_kimi_delta_attention"), ("cpu",))
    for form in ("chunk", "recurrent")
)  # fmt: skip
