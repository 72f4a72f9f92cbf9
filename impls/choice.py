"""Settle the configuration of one call: the caller's, checked, or the default for the sizes and the target."""

import os
from dataclasses import asdict, astuple
from functools import lru_cache

from impls.configs import ChunkTorchConfig, ChunkTritonConfig, RecurrentTorchConfig, RecurrentTritonConfig, invalid
from impls.defaults import CHUNK, default_chunk, default_recurrent
from impls.footprint import misfit
from impls.targets import Target


def chunk_torch_config(config: ChunkTorchConfig | None, chunk_size: int | None, device: str) -> ChunkTorchConfig:
    """Return the configuration to run on a kind of device, given what was asked for; None leaves it to the default.

    The default compiles on a CPU where the environment says KDA_COMPILE=1. Raises TypeError for another kind of
    configuration, ValueError for an invalid or a contradictory one, one that compiles elsewhere than on a CPU, and
    another value of that variable.
    """
    if config is None:
        given = {} if chunk_size is None else {"chunk_size": chunk_size}
        config = ChunkTorchConfig(compile=_compile_wanted() and device == "cpu", **given)
    return _compilable(_accepted(config, ChunkTorchConfig, "chunk_torch", chunk_size), device)


def recurrent_torch_config(
    config: RecurrentTorchConfig | None, chunk_size: int | None, device: str
) -> RecurrentTorchConfig:
    """Return the configuration to run; as `chunk_torch_config`."""
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_torch, which has no chunks, got {chunk_size}")
    if config is None:
        return RecurrentTorchConfig(compile=_compile_wanted() and device == "cpu")
    return _compilable(_accepted(config, RecurrentTorchConfig, "recurrent_torch"), device)


def chunk_triton_launch(config: ChunkTritonConfig | None, chunk_size: int | None) -> tuple[int, ...]:
    """Return what the op is told, C first: the fields of a configuration, or C alone, for the default of that C.

    The default depends on sizes and device, which are known inside the op: under torch.compile this here is traced.
    Raises as `chunk_torch_config`.
    """
    if config is not None:
        return _numbers(_accepted(config, ChunkTritonConfig, "chunk_triton", chunk_size))
    C = CHUNK if chunk_size is None else chunk_size
    return (_accepted(ChunkTritonConfig(chunk_size=C), ChunkTritonConfig, "chunk_triton").chunk_size,)


def recurrent_triton_launch(config: RecurrentTritonConfig | None, chunk_size: int | None) -> tuple[int, ...]:
    """Return what the op is told: the fields of a configuration, or nothing; as `chunk_triton_launch`."""
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_triton, which has no chunks, got {chunk_size}")
    return () if config is None else _numbers(_accepted(config, RecurrentTritonConfig, "recurrent_triton"))


@lru_cache(maxsize=256)
def chunk_triton_config(
    launch: tuple[int, ...], K: int, V: int, dtype: str, target: Target, keeps: bool = False
) -> ChunkTritonConfig:
    """Return the configuration that `chunk_triton_launch` stands for on a target; keeps: states on the way are kept.

    One that needs more shared memory than the target has is a ValueError that names what would fit.
    """
    told = len(launch) > 1
    config = ChunkTritonConfig(*launch) if told else default_chunk(K, V, dtype, target, launch[0], keeps)
    return _fitting(config, K, V, dtype, target, keeps)


@lru_cache(maxsize=256)
def recurrent_triton_config(
    launch: tuple[int, ...], K: int, V: int, dtype: str, target: Target
) -> RecurrentTritonConfig:
    """Return the configuration that `recurrent_triton_launch` stands for on a target; as `chunk_triton_config`."""
    config = RecurrentTritonConfig(*launch) if launch else default_recurrent(K, V, dtype, target)
    return _fitting(config, K, V, dtype, target)


def _compile_wanted() -> bool:
    value = os.environ.get("KDA_COMPILE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable KDA_COMPILE must be 0 or 1, got {value!r}")
    return value == "1"


def _compilable(config, device: str):
    if config.compile and device != "cpu":
        raise ValueError(f"config.compile must be False on {device}: what is compiled runs on a CPU")
    return config


def _numbers(config) -> tuple[int, ...]:
    return tuple(int(x) for x in astuple(config))


def _accepted(config, kind: type, name: str, chunk_size: int | None = None):
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__} for {name}, got {config!r}")
    if chunk_size is not None and chunk_size != config.chunk_size:
        raise ValueError(f"chunk_size must be config.chunk_size = {config.chunk_size}, got {chunk_size}")
    if reason := invalid(config):
        raise ValueError(reason)
    return config


def _fitting(config, K: int, V: int, dtype: str, target: Target, keeps: bool = False):
    capped = [name for name, x in asdict(config).items() if name.endswith("registers") and x]
    if capped and target.backend == "hip":
        raise ValueError(f"{capped[0]} must be 0 on {target.name}, whose compiler takes no cap, got {config}")
    if reason := misfit(config, K, V, dtype, target, keeps):
        raise ValueError(reason)
    return config
