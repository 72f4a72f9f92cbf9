"""Implementations of Kimi Delta Attention: the public ops, and the table of what can be chosen by name."""

from impls.configs import (
    ChunkTorchConfig,
    ChunkTritonConfig,
    DplrTorchConfig,
    DplrTritonConfig,
    RecurrentTorchConfig,
    RecurrentTritonConfig,
)
from impls.contracts import PrecisionContract, unit_roundoff
from impls.decode import GatedNorm, ShortConvolution, decode_kda
from impls.decode_layer import decode_layer
from impls.dplr_ops import dplr
from impls.ops import chunk_kda, fused_recurrent_kda, kda
from impls.table import IMPLEMENTATIONS, Impl, chosen, find

__all__ = [
    "IMPLEMENTATIONS",
    "ChunkTorchConfig",
    "ChunkTritonConfig",
    "DplrTorchConfig",
    "DplrTritonConfig",
    "GatedNorm",
    "Impl",
    "PrecisionContract",
    "RecurrentTorchConfig",
    "RecurrentTritonConfig",
    "ShortConvolution",
    "chosen",
    "chunk_kda",
    "decode_kda",
    "decode_layer",
    "dplr",
    "find",
    "fused_recurrent_kda",
    "kda",
    "unit_roundoff",
]
