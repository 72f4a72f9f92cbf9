"""Make memory that nobody wrote hold NaN, so that a result that depends on it shows.

`poisoned_allocations` fills what Python code allocates; every call of a target runs under it. `poisoned_memory` goes
below that: it reaches allocations of compiled code, of C++ extensions and of a Triton launcher, and what another
module imported under a name of its own. torch.utils.deterministic.fill_uninitialized_memory would reach most of them,
but only together with torch.use_deterministic_algorithms, which makes torch run other kernels than it ships.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator

import torch

from impls import pages

M_PERTURB = -6
"""glibc's mallopt parameter: malloc fills what it hands out with 0xFF ^ value, cut to a byte."""
ALL_ONES = 0x100
"""The value for bytes of 0xFF, which are NaN in every floating-point format: it counts as set, and changes no bit."""


GUARD = 64
"""Elements on both sides of a guarded buffer: 256 bytes in float32, the alignment that allocators give."""
PLACES = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill with NaN, while this is active, what Python code allocates without a value (torch.empty and its kin)."""
    with contextlib.ExitStack() as stack:
        for owner, name in PLACES:
            stack.enter_context(_instead(owner, name, _poisoning(getattr(owner, name))))
        yield


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[torch.Tensor]]:
    """Do the same, with a band of bytes 0xFF before and behind every buffer; yields the blocks that hold them.

    `trespassed` counts what was written into the bands. A buffer that is asked for in a special way (pinned, out=) has
    none.
    """
    blocks: list[torch.Tensor] = []
    replaced = [(owner, name, _guarding(getattr(owner, name), torch.empty, blocks)) for owner, name in PLACES]
    with contextlib.ExitStack() as stack:
        for place in replaced:
            stack.enter_context(_instead(*place))
        yield blocks


def trespassed(blocks: list[torch.Tensor]) -> int:
    """Count the bytes of the bands around guarded buffers that do not hold 0xFF any more."""
    bands = (band for x in blocks for band in (x[:GUARD], x[-GUARD:]))
    return sum(int((band.view(torch.uint8) != 0xFF).sum()) for band in bands)


def _guarding(allocate: Callable, empty: Callable, blocks: list[torch.Tensor]) -> Callable:
    poisoning = _poisoning(allocate)

    def guarded(*args, **kwargs):
        x = poisoning(*args, **kwargs)
        plain = x.layout is torch.strided and x.device.type != "meta" and not {"out", "pin_memory"} & kwargs.keys()
        if not plain or x.is_complex():
            return x
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        with torch.no_grad():
            block = empty(span + 2 * GUARD, dtype=x.dtype, device=x.device)
            block.view(torch.uint8).fill_(0xFF)
            blocks.append(block)
            inside = torch.as_strided(block, x.shape, x.stride(), GUARD)
        return inside.requires_grad_(x.requires_grad) if x.requires_grad else inside

    return guarded


def _poisoning(allocate: Callable) -> Callable:
    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.is_floating_point() and x.device.type != "meta":
            with torch.no_grad():
                x.fill_(float("nan"))
        return x

    return poisoned


@contextlib.contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """Hand out memory of NaN, while this is active, whoever asks: malloc, our pages, and the cache of a CUDA device.

    Where the C library is not glibc, or another malloc stands in for it, its memory stays as it is. Blocks of up to
    1 KiB are filled for certain only in a worker, whose environment says so (`children.environment`).
    """
    if device.startswith("cuda"):
        _poison_cached_blocks(device)
    with _instead(pages, "_mapped", _all_ones(pages._mapped)):
        _set_malloc(ALL_ONES)
        try:
            yield
        finally:
            _set_malloc(0)


@contextlib.contextmanager
def _instead(owner: object, name: str, replacement: Callable) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _set_malloc(value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # no mallopt: not glibc
        ctypes.CDLL(None).mallopt(M_PERTURB, value)


def _all_ones(mapped: Callable[[int], mmap.mmap | None]) -> Callable[[int], mmap.mmap | None]:
    """Fill what our own allocator of large tensors hands out: it is neither torch's nor malloc's."""

    def filled(size: int) -> mmap.mmap | None:
        if (memory := mapped(size)) is not None:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0xFF, size)
        return memory

    return filled


def _poison_cached_blocks(device: str) -> None:
    """Write over what torch's allocator holds free on a CUDA device: the next allocations come out of it."""
    torch.cuda.synchronize(device)
    index, stream = torch.device(device).index or 0, torch.cuda.current_stream(device).cuda_stream
    sizes = free_blocks(torch.cuda.memory_snapshot(), index, stream)
    held = [torch.empty(size, dtype=torch.uint8, device=device).fill_(0xFF) for size in sizes]
    torch.cuda.synchronize(device)
    del held


def free_blocks(segments: list[dict], index: int, stream: int) -> list[int]:
    """Return the sizes of free blocks of a device and stream, the largest first, out of `torch.cuda.memory_snapshot`.

    Private pools, which belong to CUDA graphs, are left alone.
    """
    wanted = (index, stream, (0, 0))
    own = [x for x in segments if (x["device"], x["stream"], tuple(x["segment_pool_id"])) == wanted]
    return sorted((b["size"] for x in own for b in x["blocks"] if b["state"] == "inactive"), reverse=True)
