"""Bound the threads that torch takes for one call."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Run what follows with so many of torch's threads at most, 0 for all of them, and give the rest back."""
    before = torch.get_num_threads()
    if not 0 < threads < before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
