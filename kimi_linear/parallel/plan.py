"""Tensor parallelism as a plan of DTensor placements: which modules hold shards, and where the ranks' shares meet.

    embed                    rows of words        Shard(0), a masked lookup, summed
    mixer                    heads                q, k, v, gates, convolutions, states and kv_b by head
    mixer.out_proj           columns of heads     Shard(1), summed
    ffn                      columns or experts   whole tokens through what this rank holds, summed
    head                     rows of words        Shard(0), gathered

Norms, routers, the latents of MLA and its cache are whole on every rank. A layer sums twice, a token's words are looked
up and its logits gathered once. Every rank has the same bits behind a sum, so that all of them route and choose alike.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from kimi_linear.checkpoint import Checkpoint
from kimi_linear.config import KimiConfig
from kimi_linear.model import KimiLinear
from kimi_linear.parallel.job import Job


class Summed(ParallelStyle):
    """Sum what every rank's share of a module returns: a Partial output becomes a Replicate one."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def total(module: nn.Module, given: tuple, y: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(y, device_mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()

        module.register_forward_hook(total)
        return module


def plan() -> dict[str, ParallelStyle]:
    """Return what is done to which modules of a share."""
    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.mixer.out_proj": RowwiseParallel(),
        "layers.*.ffn": Summed(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def parallelize(model: KimiLinear, mesh: DeviceMesh) -> KimiLinear:
    """Join the shares that the ranks of a mesh hold to one model, and return this rank's: all of them must call it."""
    axes = {model.embed: 0, model.head: 0} | {block.mixer.out_proj: 1 for block in model.layers}
    for module, axis in axes.items():
        shard = DTensor.from_local(module.weight, mesh, [Shard(axis)], run_check=False)
        module.weight = nn.Parameter(shard, requires_grad=False)
    return parallelize_module(model, mesh, plan())


def load(
    folder: str | Path,
    job: Job,
    *,
    config: KimiConfig | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KimiLinear:
    """Return this rank's share of a checkpoint's model, joined with those of the others: every rank must call it.

    It is used as any model, by all ranks alike, with the same arguments: each gets the same logits. Its caches hold the
    states of the rank's own heads. No bytes are read but the share's. config, dtype and progress are those of
    `KimiLinear.from_pretrained`. Raises ConfigError where heads, experts, columns or words cannot be divided by the
    ranks, CheckpointError, and JobError on all ranks where they do not find the same tensors.
    """
    config = KimiConfig.read(folder) if config is None else config
    job.share.check(config)
    checkpoint = Checkpoint(folder, config)
    job.agree("the checkpoint", _digest(checkpoint))
    return parallelize(checkpoint.model(dtype=dtype, device=job.device, progress=progress, share=job.share), job.mesh)


def _digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the configuration, and of the names, shapes and dtypes of all tensors."""
    tensors = sorted((entry.name, entry.dtype, entry.shape) for entry in checkpoint.entries.values())
    return hashlib.sha256(json.dumps([checkpoint.config.to_json(), tensors]).encode()).hexdigest()[:16]
