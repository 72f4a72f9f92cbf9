"""Settle the configuration of one call: the caller's, checked, else what is tuned, else the default."""

import os
from dataclasses import fields, replace
from functools import lru_cache

import torch

from impls.configs import ChunkTorchConfig, ChunkTritonConfig, RecurrentTorchConfig, RecurrentTritonConfig, invalid
from impls.defaults import default_chunk, default_recurrent
from impls.footprint import unfit
from impls.plan import Problem
from impls.targets import Target
from impls.tuned import Shape, for_call, shape_of


def chunk_torch_launch(config: ChunkTorchConfig | None, chunk_size: int | None, device: str) -> tuple[int, ...]:
    """Return what the op is told: the fields of a configuration, or (C, compile) for one that fits the call's sizes.

    There 0 stands for any C, and -1 for compiling where the tuned configuration says so: the environment variable
    KDA_COMPILE says 0 or 1. Raises TypeError for another kind of configuration, ValueError for an invalid or a
    contradictory one, one that compiles elsewhere than on a CPU, and another value of that variable.
    """
    if config is not None:
        return _numbers(_compilable(_accepted(config, ChunkTorchConfig, "chunk_torch", chunk_size), device))
    if chunk_size is not None:
        _accepted(ChunkTorchConfig(chunk_size=chunk_size), ChunkTorchConfig, "chunk_torch")
    return chunk_size or 0, _compile_wanted(device)


def recurrent_torch_launch(
    config: RecurrentTorchConfig | None, chunk_size: int | None, device: str
) -> tuple[int, ...]:
    """Return what the op is told: whether to compile, -1 for where the tuned file says so; as `chunk_torch_launch`."""
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_torch, which has no chunks, got {chunk_size}")
    if config is None:
        return (_compile_wanted(device),)
    return _numbers(_compilable(_accepted(config, RecurrentTorchConfig, "recurrent_torch"), device))


def chunk_torch_config(launch: tuple[int, ...], q, v, cu_seqlens, interval: int) -> ChunkTorchConfig:
    """Return the configuration that `chunk_torch_launch` stands for: given, else tuned for the call, else the default.

    interval: tokens between the states that are kept, a multiple of C; 0 where none are.
    """
    if len(launch) > 2:
        return ChunkTorchConfig(*launch[:-1], compile=bool(launch[-1]))
    C, compile = launch
    found = for_call("chunk_torch", str(v.device), shape_of(q, v, cu_seqlens), interval or None)
    usual = ChunkTorchConfig(chunk_size=C or ChunkTorchConfig.chunk_size)
    fits = found and C in (0, found.config.chunk_size) and compile in (-1, found.config.compile)
    config = found.config if fits else usual  # what is tuned uncompiled says nothing of compiled blocks: 64 ms, not 50
    if config.threads and not found.tuned_with(torch.get_num_threads()):
        config = replace(config, threads=0)  # the quickest of two threads says nothing of sixteen
    return replace(config, compile=(config.compile if compile < 0 else compile == 1) and v.device.type == "cpu")


def recurrent_torch_config(launch: tuple[int, ...], q, v, cu_seqlens) -> RecurrentTorchConfig:
    """Return the configuration that `recurrent_torch_launch` stands for; as `chunk_torch_config`."""
    if launch[0] >= 0:
        return RecurrentTorchConfig(compile=launch[0] == 1)
    found = for_call("recurrent_torch", str(v.device), shape_of(q, v, cu_seqlens))
    return RecurrentTorchConfig(compile=found is not None and found.config.compile and v.device.type == "cpu")


def chunk_triton_launch(
    config: ChunkTritonConfig | None, chunk_size: int | None, saves: bool = False
) -> tuple[tuple[int, ...], bool]:
    """Return what the op is told, C first, and whether the forward saves: asked for here, or by the configuration.

    It is told the fields of a configuration, or C alone, 0 for any. What is tuned, and the default, depend on sizes and
    device, which are known inside the op: under torch.compile this here is traced. Raises as `chunk_torch_launch`.
    """
    if config is not None:
        accepted = _accepted(config, ChunkTritonConfig, "chunk_triton", chunk_size)
        if saves and not accepted.saves:
            accepted = _accepted(replace(accepted, saves=True), ChunkTritonConfig, "chunk_triton")
        return _numbers(accepted), accepted.saves
    if chunk_size is not None or saves:
        asked = ChunkTritonConfig(chunk_size=chunk_size or ChunkTritonConfig.chunk_size, saves=bool(saves))
        _accepted(asked, ChunkTritonConfig, "chunk_triton")
    return (chunk_size or 0,), bool(saves)


def recurrent_triton_launch(config: RecurrentTritonConfig | None, chunk_size: int | None) -> tuple[int, ...]:
    """Return what the op is told: the fields of a configuration, or nothing; as `chunk_triton_launch`."""
    if chunk_size is not None:
        raise ValueError(f"chunk_size must be None for recurrent_triton, which has no chunks, got {chunk_size}")
    return () if config is None else _numbers(_accepted(config, RecurrentTritonConfig, "recurrent_triton"))


def tuned_chunk_triton(
    launch: tuple[int, ...], problem: Problem, device: str, interval: int
) -> ChunkTritonConfig | None:
    """Return what is tuned for a call that `chunk_triton_launch` gave no configuration for, and fits its C and device.

    interval: as in `chunk_torch_config`. None where nothing is: then `chunk_triton_config`.
    """
    if len(launch) > 1:
        return None
    found = for_call("chunk_triton", device, _shape(problem), interval or None)
    return found.config if found and launch[0] in (0, found.config.chunk_size) else None


def tuned_recurrent_triton(launch: tuple[int, ...], problem: Problem, device: str) -> RecurrentTritonConfig | None:
    """Return what is tuned for a call that `recurrent_triton_launch` gave no configuration for, else None."""
    found = None if launch else for_call("recurrent_triton", device, _shape(problem))
    return found and found.config


@lru_cache(maxsize=256)
def chunk_triton_config(
    launch: tuple[int, ...], K: int, V: int, dtype: str, target: Target, keeps: bool = False
) -> ChunkTritonConfig:
    """Return the configuration that was given, else the default of C; keeps: states on the way are kept.

    One that needs more shared memory than the target has is a ValueError that names what would fit.
    """
    told = len(launch) > 1
    config = ChunkTritonConfig(*launch) if told else default_chunk(K, V, dtype, target, launch[0], keeps)
    return _fitting(config, K, V, dtype, target, keeps)


@lru_cache(maxsize=256)
def recurrent_triton_config(
    launch: tuple[int, ...], K: int, V: int, dtype: str, target: Target
) -> RecurrentTritonConfig:
    """Return the configuration that was given, else the default; as `chunk_triton_config`."""
    config = RecurrentTritonConfig(*launch) if launch else default_recurrent(K, V, dtype, target)
    return _fitting(config, K, V, dtype, target)


def _shape(problem: Problem) -> Shape:
    p = problem
    return Shape(p.T, p.N, p.HV, p.K, p.V, p.dtype, p.packed)


def _compile_wanted(device: str) -> int:
    """Return 1 or 0 where the environment says so, on a CPU, else -1."""
    value = os.environ.get("KDA_COMPILE")
    if value not in (None, "0", "1"):
        raise ValueError(f"the environment variable KDA_COMPILE must be 0 or 1, got {value!r}")
    return -1 if value is None or device != "cpu" else int(value)


def _compilable(config, device: str):
    if config.compile and device != "cpu":
        raise ValueError(f"config.compile must be False on {device}: what is compiled runs on a CPU")
    return config


def _numbers(config) -> tuple[int, ...]:
    return tuple(int(getattr(config, x.name)) for x in fields(config))


def _accepted(config, kind: type, name: str, chunk_size: int | None = None):
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__} for {name}, got {config!r}")
    if chunk_size is not None and chunk_size != config.chunk_size:
        raise ValueError(f"chunk_size must be config.chunk_size = {config.chunk_size}, got {chunk_size}")
    if reason := invalid(config):
        raise ValueError(reason)
    return config


def _fitting(config, K: int, V: int, dtype: str, target: Target, keeps: bool = False):
    if reason := unfit(config, K, V, dtype, target, keeps):
        raise ValueError(reason)
    return config
