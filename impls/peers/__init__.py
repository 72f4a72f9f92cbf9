"""Other people's implementations as rows like ours, each usable where its package is installed."""

from impls.peers.table import PEERS, installed

__all__ = ["PEERS", "installed"]
