"""Kimi Linear assembled from the implementations of this project: model, cache, configuration, checkpoint."""

from kimi_linear.cache import Cache, CacheError
from kimi_linear.checkpoint import Checkpoint, CheckpointError
from kimi_linear.config import ConfigError, KimiConfig
from kimi_linear.initial import write_random
from kimi_linear.model import KimiLinear
from kimi_linear.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Cache",
    "CacheError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "KimiConfig",
    "KimiLinear",
    "preset",
    "write_random",
]
