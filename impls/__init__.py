"""Implementations of Kimi Delta Attention: the public ops, and the table of what can be chosen by name."""

from impls.contracts import PrecisionContract, unit_roundoff
from impls.ops import fused_recurrent_kda
from impls.table import IMPLEMENTATIONS, Impl, find

__all__ = [
    "IMPLEMENTATIONS",
    "Impl",
    "PrecisionContract",
    "find",
    "fused_recurrent_kda",
    "unit_roundoff",
]
