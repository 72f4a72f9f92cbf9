"""Say which implementation and configuration each layer of one of transformers' models runs with."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from impls.choice import (
    chunk_torch_config,
    chunk_torch_launch,
    chunk_triton_config,
    recurrent_torch_config,
    recurrent_torch_launch,
    recurrent_triton_config,
    tuned_chunk_triton,
    tuned_recurrent_triton,
)
from impls.ops import DECODE_TOKENS
from impls.plan import Problem
from impls.table import chosen, described
from impls.targets import of as target_of
from impls.tuned import looked_up, shape_of
from kimi_linear.hf.absorbed import absorbed_forward_of, expanded_because
from kimi_linear.hf.routes import FAMILIES, MLA, ROUTED

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class LayerRun:
    """Say how a layer runs in a phase: by which implementation, with which configuration, and where that is from."""

    layer: str
    phase: str
    implementation: str
    config: object | None
    source: str

    def __str__(self) -> str:
        config = "" if self.config is None else f" {self.config}"
        return f"{self.layer} {self.phase}: {self.implementation}{config} ({self.source})"


def describe(model: nn.Module, *, tokens: int = 2048, batch: int = 1) -> tuple[LayerRun, ...]:
    """Return how every KDA layer, and every MLA layer of kimi_linear, runs in prefill and decoding, in their order.

    tokens, batch: of the prefill that is asked about; the batch is that of decoding as well. In training mode the
    prefill is one with gradients. Raises ValueError for a model without such layers and for numbers below 1.
    """
    if tokens < 1 or batch < 1:
        raise ValueError(f"expected tokens >= 1 and batch >= 1, got {tokens} and {batch}")
    found = tuple(run for name, layer in model.named_modules() for run in _runs(name, layer, tokens, batch))
    if not found:
        raise ValueError(f"expected a model of {', '.join(FAMILIES)}, got a {type(model).__name__} without such layers")
    return found


def _runs(name: str, layer: nn.Module, tokens: int, batch: int) -> Iterator[LayerRun]:
    kind = type(layer).__name__
    if kind in FAMILIES.values():
        yield _kda(name, layer, PREFILL, batch, tokens)
        yield _kda(name, layer, DECODE, batch, 1)
    elif kind == MLA:
        yield LayerRun(name, PREFILL, "transformers", None, f"attention of {layer.config._attn_implementation}")
        yield _mla_step(name, layer)


def _mla_step(name: str, layer: nn.Module) -> LayerRun:
    if not absorbed_forward_of(type(layer)):
        return LayerRun(name, DECODE, "transformers", None, "absorbed_mla is not enabled")
    if reason := expanded_because(layer):
        return LayerRun(name, DECODE, "transformers", None, reason)
    return LayerRun(name, DECODE, "absorbed", None, "over latents")


def _kda(name: str, layer: nn.Module, phase: str, B: int, T: int) -> LayerRun:
    ours = ROUTED[phase == DECODE]
    function = inspect.unwrap(type(layer).forward).__globals__[ours.__name__]
    if function is not ours:
        return LayerRun(name, phase, "transformers", None, f"{function.__module__}.{ours.__name__}")
    weight, H = layer.q_proj.weight, layer.num_heads
    # stand-ins for q and v: of their sizes, in no memory
    x = torch.empty((), dtype=weight.dtype, device=weight.device).expand(B, T, H, layer.head_dim)
    form, backward = "recurrent" if T <= DECODE_TOKENS else "chunk", layer.training and phase == PREFILL
    row = chosen(form=form, backward=backward, **described(x, x))
    found = looked_up(row.name, str(x.device), shape_of(x, x, None))
    source = f"the {found.row} row of {found.path}" if found else "nothing is tuned: the default"
    return LayerRun(name, phase, row.name, _config(row.name, x), source)


def _config(implementation: str, x: torch.Tensor) -> object:
    """Return the configuration that a call on q and v like x [B, T, H, K] would run with."""
    device = x.device.type
    if implementation == "chunk_torch":
        return chunk_torch_config(chunk_torch_launch(None, None, device), x, x, None, 0)
    if implementation == "recurrent_torch":
        return recurrent_torch_config(recurrent_torch_launch(None, None, device), x, x, None)
    B, T, H, K = x.shape
    dtype, target = str(described(x, x)["dtype"]), target_of(x.device)
    problem = Problem(B=B, T=T, N=B, H=H, HV=H, K=K, V=K, dtype=dtype)
    if implementation == "chunk_triton":
        tuned = tuned_chunk_triton((0,), problem, str(x.device), 0)
        return tuned or chunk_triton_config((0,), K, K, dtype, target)
    assert implementation == "recurrent_triton"
    return tuned_recurrent_triton((), problem, str(x.device)) or recurrent_triton_config((), K, K, dtype, target)
