"""Call other people's KDA for a CPU as ours: q, k, v, g, beta and the state in, (o, state) out."""

import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import torch

Call = Callable[..., tuple[torch.Tensor, torch.Tensor]]

TRANSFORMERS = "transformers.models.kimi_linear.modeling_kimi_linear"
PEERS = {
    "transformers chunk": (TRANSFORMERS, "chunk_kimi_delta_attention"),
    "transformers recurrent": (TRANSFORMERS, "recurrent_kimi_delta_attention"),
    "fla naive chunk": ("fla.ops.kda.naive", "naive_chunk_kda"),
    "fla naive recurrent": ("fla.ops.kda.naive", "naive_recurrent_kda"),
}


def load(name: str) -> Call | None:
    """Import a peer; None where its package is missing."""
    module, function = PEERS[name]
    try:
        function = getattr(import_module(module), function)
    except ImportError:
        return None
    # unwrapped: beside an installed FLA transformers would call its Triton kernels, on a CPU too
    return _transformers(inspect.unwrap(function)) if module == TRANSFORMERS else _fla(function)


def one_by_one(function: Call, bounds: list[int]) -> Call:
    """Return a function that calls another once per packed sequence, without initial states."""

    def run(*tokens, **keywords):
        found = [function(*(x[:, a:b] for x in tokens), **keywords) for a, b in pairwise(bounds)]
        return torch.cat([o for o, _ in found], 1), torch.cat([S for _, S in found])

    return run


def _transformers(function: Callable) -> Call:
    def run(q, k, v, g, beta, *, initial_state=None, use_qk_l2norm_in_kernel=False):
        flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return function(q, k, v, g, beta, initial_state=initial_state, **flags)

    return run


def _fla(function: Callable) -> Call:
    def run(q, k, v, g, beta, *, initial_state=None, use_qk_l2norm_in_kernel=False):
        if use_qk_l2norm_in_kernel:
            q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return function(q, k, v, g, beta, initial_state=initial_state, output_final_state=True)

    return run
