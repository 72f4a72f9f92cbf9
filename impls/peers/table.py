"""The table of peers: what they are compared by, and which of them are here."""

from importlib.util import find_spec

from impls.peers.fla import FLA, FLA_RECURRENT, FLA_SAFE_GATE
from impls.peers.flash_kda import FLASH_KDA
from impls.peers.layers import FLA_LAYER, TRANSFORMERS_LAYER
from impls.peers.training import FLA_ROWS, TRANSFORMERS_ROWS
from impls.table import Impl

PEERS: dict[str, tuple[Impl, ...]] = {
    "fla": (FLA, FLA_SAFE_GATE, FLA_RECURRENT, FLA_LAYER, *FLA_ROWS),
    "flash_kda": (FLASH_KDA,),
    "transformers": (TRANSFORMERS_LAYER, *TRANSFORMERS_ROWS),
}
"""Rows by the package that they need. They stay out of `impls.table`: no public op ever chooses one."""


def installed() -> tuple[Impl, ...]:
    """Return the rows whose package is there. None is imported: one that is there and broken must show as such."""
    return tuple(row for package, rows in PEERS.items() if find_spec(package) is not None for row in rows)
