"""Keep a cache in a safetensors file: the latents of tokens that are there, the states, and those at boundaries."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kimi_linear.cache import Cache, CacheError, Live
from kimi_linear.config import KimiConfig

SCHEMA = 1
SHAPING = (
    "layers", "kda_heads", "kda_head_dim", "kv_lora_rank", "qk_rope_head_dim", "conv_size",
)  # fmt: skip
"""The fields of a configuration that decide what a cache looks like."""


def save(cache: Cache, path: Path) -> None:
    """Write a cache, whole or not at all: to a file beside it that then takes its name."""
    tensors = _named("live", cache.live)
    for row, kept in enumerate(cache.kept):
        for length, live in kept.items():
            tensors |= _named(f"kept.{row}.{length}", live)
    longest = max(cache.lengths)
    tensors |= {f"latents.{i}": x[:, :longest].contiguous() for i, x in enumerate(cache.latents)}
    about = {
        "schema": SCHEMA,
        "lengths": cache.lengths,
        "capacity": cache.capacity,
        "boundary": cache.boundary,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "model": _shaping(cache.config),
    }
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        save_file(tensors, part, metadata={"kimi_linear.cache": json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, config: KimiConfig, device) -> Cache:
    """Read a cache; CacheError where the file is none, is another model's, or is damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("kimi_linear.cache", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
    except (OSError, SafetensorError, ValueError) as error:
        raise CacheError(f"{path}: expected a file written by Cache.save, got {error}") from error
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise CacheError(f"{path}: expected a cache of schema {SCHEMA}")
    if about["model"] != _shaping(config):
        raise CacheError(f"{path}: expected a cache of {_shaping(config)}, got one of {about['model']}")
    return _restored(path, config, device, about, tensors)


def _restored(path: Path, config: KimiConfig, device, about: dict, tensors: dict[str, torch.Tensor]) -> Cache:
    lengths = tuple(about["lengths"])
    cache = Cache(
        config,
        len(lengths),
        about["capacity"],
        boundary=about["boundary"],
        dtype=getattr(torch, about["dtype"]),
        device=device,
    )
    for i, latents in enumerate(cache.latents):
        stored = _taken(path, tensors, f"latents.{i}", latents[:, : max(lengths)])
        latents[:, : max(lengths)] = stored
    for row, length in {tuple(map(int, name.split(".")[1:3])) for name in tensors if name.startswith("kept.")}:
        one = cache.live.mapped(lambda x: x[:1])
        cache.kept[row][length] = _live(path, tensors, f"kept.{row}.{length}", one, (length,))
    cache.live = _live(path, tensors, "live", cache.live, lengths)
    return cache


def _live(path: Path, tensors: dict, prefix: str, like: Live, lengths: tuple[int, ...]) -> Live:
    found = {name: _taken(path, tensors, name, x) for name, x in _named(prefix, like).items()}
    half = len(like.states)
    values = tuple(found.values())
    return Live(values[:half], values[half:], lengths)


def _taken(path: Path, tensors: dict, name: str, like: torch.Tensor) -> torch.Tensor:
    x = tensors.get(name)
    if x is None or x.shape != like.shape or x.dtype != like.dtype:
        got = "nothing" if x is None else f"{list(x.shape)} of {x.dtype}"
        raise CacheError(f"{path}: {name} must be {list(like.shape)} of {like.dtype}, got {got}")
    return x


def _named(prefix: str, live: Live) -> dict[str, torch.Tensor]:
    states = {f"{prefix}.states.{i}": x.contiguous() for i, x in enumerate(live.states)}
    return states | {f"{prefix}.inputs.{i}": x.contiguous() for i, x in enumerate(live.inputs)}


def _shaping(config: KimiConfig) -> dict:
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name in SHAPING}))
