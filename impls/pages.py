"""Give states and outputs their memory: in huge pages, and out of what one that was dropped leaves behind.

Memory that malloc maps anew traps at the first touch of each 4 KiB, and it maps anew whatever exceeds a threshold of
128 KiB that adapts, up to 32 MiB. A copy into fresh memory took 11 ms instead of 1.3 ms for 33.5 MB, 0.65 ms instead of
0.03 ms for 2 MiB; in huge pages, which the kernel only has to clear, 2.2 ms and 0.11 ms; in memory that was used before
no more than into any other. A decode step writes one state and drops another, a layer one state and one output.
"""

import contextlib
import ctypes
import functools
import math
import mmap

import torch

MAPPED_BYTES = 2**22
"""Smaller tensors are left to malloc, which keeps what is freed: a decode step that reads 2 MiB of states and writes as
many took 180 us with the room for them from there, and 210 from here."""
FAULTING_BYTES = 2**20
"""From here on it costs more to touch fresh memory than to ask for it."""
SPARE_BYTES = 2**30
"""What is kept at most; larger memory is given back to the system at once. The outputs of 65,536 tokens are 512 MiB:
with 256 MiB such a call took 17 to 37 times as long as one of 4,096 tokens, with 1 GiB 15 to 17 times."""

_spare: dict[int, mmap.mmap] = {}
"""Mappings that no tensor uses, one of a size, the latest last. Taken and left in single steps of the dictionary, so
that threads need no lock: a tensor may end in any of them, and in the middle of either function."""


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep what a block of tokens frees for the next one, from now on.

    glibc gives the top of its heap back beyond twice the largest block that it mapped and freed so far (32 MiB at
    most): with blocks of 1 MiB every one of 32 calls faulted 265 pages in again, 1.7 ms instead of 0.6. Uncompiled,
    T=1024 with 16 heads took 43 to 54 ms in a process that had freed nothing large, and 35 to 39 behind this.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a contiguous tensor whose values are undefined, like torch.empty; its memory is its own while it lives.

    From MAPPED_BYTES on its storage cannot be resized: `resize_` to more elements, and `out=` of a larger shape, are
    refused.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < MAPPED_BYTES or (memory := _mapped(size)) is None:
        if device.type == "cpu" and size >= FAULTING_BYTES:
            keep_freed_memory()
        return torch.empty(shape, dtype=dtype, device=device)
    owner = _owner(size).from_buffer(memory)
    owner.memory = memory
    storage = torch.frombuffer(owner, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # a view of it could not be modified under autograd


def like(x: torch.Tensor) -> torch.Tensor:
    """Return the `room` for as much as x, which is contiguous and on a CPU, in its shape and dtype."""
    small = x.nbytes < MAPPED_BYTES  # malloc's, in 4 us instead of 13 with the caches full of states
    return torch.empty_like(x) if small else room(x.shape, x.dtype, x.device)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Return x [.., K, V] as [.., V, K] in a `room`; what was not asked for, and is empty with one axis, as it is.

    A decode step of sixteen sequences, 33.5 MB of states, took 37 to 39 ms with torch's memory, and takes 22.
    """
    return room(x.mT.shape, x.dtype, x.device).copy_(x.mT) if x.ndim > 1 else x


@functools.lru_cache(maxsize=64)
def _owner(size: int) -> type:
    """Return the type of what a tensor's storage holds until its end: a window on memory, which then is left.

    A mapping itself has no finalizer; weakref.finalize takes twice as long, 8 us of a call.
    """
    return type("Owner", (ctypes.c_char * size,), {"__del__": lambda self: _leave(self.memory)})


def _mapped(size: int) -> mmap.mmap | None:
    """Return the spare memory of this size, else new memory; None where the system has none to give."""
    if (spare := _spare.pop(size, None)) is not None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return spare
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None  # torch then says so in its own words
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _leave(memory: mmap.mmap) -> None:
    """Keep memory that its last tensor has left as the latest spare, and drop the oldest ones beyond SPARE_BYTES."""
    if len(memory) > SPARE_BYTES:
        return
    _spare.pop(len(memory), None)
    _spare[len(memory)] = memory
    for size in tuple(_spare):
        if sum(tuple(_spare)) <= SPARE_BYTES:
            return
        _spare.pop(size, None)
