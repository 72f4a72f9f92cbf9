"""Call other people's KDA for a CPU as ours: q, k, v, g, beta and the state in, (o, state) out.

A peer runs in a process of its own, as its users have it. In ours its tensors would lie in memory that our setting of
the C library keeps: a decode step of transformers takes 0.22 ms there and 2.5 ms alone.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise

import torch
from cases_cpu import Case, draw
from processes import apart

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


def called(case: Case, name: str) -> Callable | None:
    """Return a peer's call of a case; None where its package is missing."""
    if (function := load(name)) is None:
        return None
    tokens, keywords = draw(case)
    function = one_by_one(function, case.bounds) if case.bounds else function
    return lambda: function(*tokens, **keywords)


def trained(case: Case, name: str) -> Callable | None:
    """Return a peer's forward and backward of a case; None where its package is missing."""
    return None if (function := load(name)) is None else step_of(function, case)


def step_of(function: Callable, case: Case) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a call of a function of q, k, v, g, beta that returns their gradients of |o|^2 / 2."""
    tokens, keywords = draw(case)
    tokens = [x.requires_grad_() for x in tokens]

    def step() -> tuple[torch.Tensor, ...]:
        o, _ = function(*tokens, **keywords)
        return torch.autograd.grad(o, tokens, o.detach())

    return step


SERVING = """
import sys, torch
from cases_cpu import CASES, TRAINING
from limits_cpu import in_a_row
from peers_cpu import called, trained
case = next(case for case in CASES + TRAINING if case.name == sys.argv[1])
training = case in TRAINING
run = (trained if training else called)(case, sys.argv[2])
torch.set_grad_enabled(training)
run()
print("ready", flush=True)
for _ in sys.stdin:
    print(in_a_row(run, case.calls), flush=True)
"""
serving = partial(apart, SERVING)
"""Serves the name of a case and a peer in a process of its own, which answers with the seconds of a call or a training
step whatever it is told."""


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
