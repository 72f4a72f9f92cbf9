"""Write a random checkpoint in the released layout: seeded, sharded, each tensor drawn by its own name."""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from kimi_linear.checkpoint import INDEX, SINGLE
from kimi_linear.config import KimiConfig
from kimi_linear.layout import Stored, stored
from kimi_linear.parameters import allocated

SHARD_BYTES = 5 * 10**9
"""Bytes of a shard where nothing else is asked for, as released."""


def write_random(
    config: KimiConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write config.json, shards and their index, and return the shards.

    dtype: of all tensors but A_log and dt_bias; config.dtype where None. A tensor's numbers depend on seed, name and
    shape alone. The memory is that of one shard. progress: called with bytes written and bytes in all. FileExistsError
    where the folder holds a checkpoint.
    """
    folder = Path(folder)
    for name in ("config.json", INDEX, SINGLE):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists: expected a folder without a checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype) if dtype is None else dtype
    groups = list(_groups(config, dtype, shard_bytes))
    total, done, weight_map, paths = sum(_bytes(x, dtype) for group in groups for x in group), 0, {}, []
    for i, group in enumerate(groups, 1):
        path = folder / f"model-{i:05}-of-{len(groups):05}.safetensors"
        save_file({each.name: draw(each, config, seed, dtype) for each in group}, path, metadata={"format": "pt"})
        weight_map |= {each.name: path.name for each in group}
        paths.append(path)
        done += sum(_bytes(each, dtype) for each in group)
        if progress:
            progress(done, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    about = config.to_json() | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")  # last: without it there is no checkpoint
    return paths


def draw(each: Stored, config: KimiConfig, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a random tensor: matrices normal, norms near one, decays and steps spread as at the start of training."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {each.name}".encode()))  # takes 32 bits
    leaf = each.name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A_log":
        x = torch.rand(each.shape, generator=generator).mul_(15).add_(1).log_()
    elif leaf == "dt_bias":
        step = torch.exp(torch.rand(each.shape, generator=generator) * math.log(100) + math.log(1e-3))
        x = step + torch.log(-torch.expm1(-step))
    elif leaf.endswith("norm"):
        x = 1 + 0.1 * torch.randn(each.shape, generator=generator)
    elif leaf == "e_score_correction_bias":
        x = 0.05 * torch.randn(each.shape, generator=generator)
    elif leaf.endswith("conv1d"):
        x = torch.randn(each.shape, generator=generator) * config.conv_size**-0.5
    else:
        x = torch.randn(each.shape, generator=generator) * config.initializer_range
    return x.to(torch.float32 if each.float32 else dtype)


def _groups(config: KimiConfig, dtype: torch.dtype, shard_bytes: int) -> Iterator[list[Stored]]:
    group, size = [], 0
    for each in stored(config):
        if group and size + _bytes(each, dtype) > shard_bytes:
            yield group
            group, size = [], 0
        group.append(each)
        size += _bytes(each, dtype)
    yield group


def _bytes(each: Stored, dtype: torch.dtype) -> int:
    return each.elements * (4 if each.float32 else dtype.itemsize)


def random_model(config: KimiConfig, *, seed: int = 0, dtype: torch.dtype | None = None, device="cpu"):
    """Return the model that `write_random` would write, without a file."""
    from kimi_linear.model import KimiLinear

    dtype = getattr(torch, config.dtype) if dtype is None else dtype
    with torch.device("meta"):
        model = KimiLinear(config)
    places = allocated(model, {each.into: torch.float32 if each.float32 else dtype for each in stored(config)}, device)
    for each in stored(config):
        place = places[each.into][each.at or slice(None)]
        place.copy_(draw(each, config, seed, dtype).reshape(place.shape))
    return model.eval()
