"""The processors that kernels are compiled for: named ones with their limits, and the one that a tensor lives on."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Target:
    """Describe one kind of processor: what the compiler is told, and what limits a launch."""

    name: str
    backend: str
    """'cuda', 'hip', or 'interpret' for Triton's interpreter."""
    arch: int | str
    warp_size: int
    shared_memory: int
    """Bytes that one program may use."""
    processors: int
    """Streaming multiprocessors or compute units; 1 for the interpreter."""

    @property
    def nvidia(self) -> bool:
        """Tell whether NVIDIA's instructions may be written by hand."""
        return self.backend == "cuda"

    @property
    def tf32(self) -> bool:
        """Tell whether products of tf32, and of three tf32, may be asked for; the interpreter is asked as NVIDIA is."""
        return self.backend != "hip"


# Shared memory: CUDA C++ Programming Guide, table of technical specifications (maximum per block, opt-in), and the
# 64 KiB of local data share of CDNA 3. Processors: A100 108, H100 and H200 132, B200 148, MI300X 304.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108),
        Target("sm_86", "cuda", 86, 32, 99 * 1024, 84),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 128),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, 188),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304),
        Target("interpret", "interpret", 0, 32, 2**40, 1),
    )
}


def named(name: str) -> Target:
    """Return the target of that name; KeyError with the known names where there is none."""
    if name not in TARGETS:
        raise KeyError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def of(device: torch.device) -> Target:
    """Return what kind of processor a device is; the CPU is the interpreter's."""
    return TARGETS["interpret"] if device.type == "cpu" else _probed(device.index)


@lru_cache
def _probed(index: int | None) -> Target:
    found = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        return Target(arch, "hip", arch, found.warp_size, found.shared_memory_per_block, found.multi_processor_count)
    arch, shared = found.major * 10 + found.minor, found.shared_memory_per_block_optin
    return Target(f"sm_{arch}", "cuda", arch, 32, shared, found.multi_processor_count)
