"""Measure what the machine can do: the rate of products in cache, and the bandwidth of a copy."""

import time

import torch

from autotune.timing import Spread
from impls.compiler_cpu import TILES, compiled

PRODUCT = (16, 64, 128)
"""[16, 64, 128] @ [16, 128, 128]: the largest product of the op, 1.6 MiB together."""
COPIED_BYTES = 2**28


def measured(rounds: int = 30) -> dict[str, float]:
    """Return FLOP/s of products in cache, by the library and by Inductor's template, and bytes/s of a copy."""
    B, M, K = PRODUCT
    a, b = torch.randn(B, M, K), torch.randn(B, K, K)
    template = compiled(lambda a, b: (torch.bmm(a, b),), (a, b), TILES)
    x = torch.empty(COPIED_BYTES // 4).uniform_()
    y = torch.empty_like(x)
    flops = 2 * B * M * K * K
    return {
        "library_flops_per_second": flops / _median(lambda: torch.bmm(a, b), rounds),
        "template_flops_per_second": flops / _median(lambda: template(a, b), rounds),
        "copy_bytes_per_second": 2 * COPIED_BYTES / _median(lambda: y.copy_(x), 7),
    }


def _median(call, rounds: int) -> float:
    call()
    return Spread.of([seconds(call) for _ in range(rounds)]).median


def seconds(call) -> float:
    """Time one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def in_a_row(call, calls: int) -> float:
    """Time one of several calls, after one that wakes the threads and fetches what another process drove out.

    A decode step alone takes 1 ms instead of 0.14, 1,024 tokens 33 ms instead of 20.
    """
    call()
    return seconds(lambda: repeated(call, calls)) / calls


def repeated(call, times: int) -> None:
    """Call again and again."""
    for _ in range(times):
        call()
