"""Set the threads that torch takes for one call."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exactly(threads: int) -> Iterator[None]:
    """Run what follows with so many of torch's threads, and give back what there was."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_most(threads: int) -> contextlib.AbstractContextManager[None]:
    """Run what follows with so many of torch's threads at most, 0 for all of them, and give the rest back."""
    before = torch.get_num_threads()
    return exactly(min(threads, before) if threads > 0 else before)
