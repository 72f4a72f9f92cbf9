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
    if about.get("model") != _shaping(config):
        raise CacheError(f"{path}: expected a cache of {_shaping(config)}, got one of {about.get('model')}")
    cache, lengths = _empty(path, config, device, about)
    longest = max(lengths)
    for i, latents in enumerate(cache.latents):
        latents[:, :longest] = _taken(path, tensors, f"latents.{i}", latents[:, :longest])
    for row, length in _kept(path, tensors, lengths):
        one = cache.live.mapped(lambda x: x[:1])
        cache.kept[row][length] = _live(path, tensors, f"kept.{row}.{length}", one, (length,))
    cache.live = _live(path, tensors, "live", cache.live, lengths)
    return cache


def _empty(path: Path, config: KimiConfig, device, about: dict) -> tuple[Cache, tuple[int, ...]]:
    """Return an empty cache of the sizes that a file names, and the lengths."""
    try:
        lengths, dtype = tuple(map(int, about["lengths"])), getattr(torch, about["dtype"])
        cache = Cache(config, len(lengths), about["capacity"], boundary=about["boundary"], dtype=dtype, device=device)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(f"{path}: expected sizes of a cache, got {error!r}") from error
    if not all(0 <= length <= cache.capacity for length in lengths):
        raise CacheError(f"{path}: lengths must be from 0 to the capacity {cache.capacity}, got {lengths}")
    return cache, lengths


def _kept(path: Path, tensors: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> set[tuple[int, int]]:
    """Return sequence and length of everything that was kept at boundaries."""
    parts = [name.split(".") for name in tensors if name.startswith("kept.")]
    if not all(len(x) == 5 and x[1].isdecimal() and x[2].isdecimal() and int(x[1]) < len(lengths) for x in parts):
        raise CacheError(f"{path}: expected names kept.SEQUENCE.LENGTH.KIND.LAYER")
    return {(int(x[1]), int(x[2])) for x in parts}


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
