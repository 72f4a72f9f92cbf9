"""What nothing can beat on a device: its measured copy bandwidth and matrix rate, and the floor of a case in them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from autotune.cases import WIDTH, Case
from autotune.timing import LAUNCHED, Spread, Stopwatch
from kda_spec import costs

CHUNK_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Probe:
    """How the ceilings of a kind of device are measured: bytes copied, size and dtypes of the product, rounds."""

    copied_bytes: int
    size: int
    dtypes: tuple[str, ...]
    rounds: int


PROBES = {
    "cuda": Probe(copied_bytes=1 << 30, size=8192, dtypes=("bfloat16",), rounds=20),
    "cpu": Probe(copied_bytes=1 << 28, size=1024, dtypes=("float32", "bfloat16"), rounds=7),
}
WARM_CALLS = 3


def ceilings(device: str, watch: Stopwatch, probe: Probe | None = None) -> dict:
    """Measure copy bandwidth and matrix rates on random data (zeros run faster than data does); JSON values.

    Bandwidth counts bytes read plus bytes written.
    """
    probe = probe or PROBES[device.split(":")[0]]
    generator = torch.Generator(device).manual_seed(0)
    return {
        "copy": _copy(device, probe, watch, generator),
        "matmul": {dtype: _product(device, dtype, probe, watch, generator) for dtype in probe.dtypes},
    }


def _copy(device: str, probe: Probe, watch: Stopwatch, generator: torch.Generator) -> dict:
    source = torch.empty(probe.copied_bytes // 4, device=device).uniform_(generator=generator)
    target = torch.empty_like(source)
    taken = _timed(lambda: target.copy_(source), watch, probe.rounds)
    moved = 2 * probe.copied_bytes
    return {"bytes": moved, "ms": taken.to_json(), "bytes_per_second": moved / taken.median * 1e3}


def _product(device: str, dtype: str, probe: Probe, watch: Stopwatch, generator: torch.Generator) -> dict:
    shape = (probe.size, probe.size)
    a, b = (torch.randn(shape, device=device, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    taken = _timed(lambda: a @ b, watch, probe.rounds)
    flops = 2 * probe.size**3
    return {"size": probe.size, "ms": taken.to_json(), "flops_per_second": flops / taken.median * 1e3}


def _timed(call: Callable[[], object], watch: Stopwatch, rounds: int) -> Spread:
    for _ in range(WARM_CALLS):
        call()
    watch.settle()
    return Spread.of([watch.milliseconds(call, LAUNCHED) for _ in range(rounds)])


def floor(case: Case, dtype: str, measured: dict) -> dict:
    """Return the least milliseconds a case can take, and the two terms of which that is the larger; JSON values.

    bytes: inputs read once, outputs written once, raw gates in `dtype`, over the copy bandwidth. flops: those inside
    matrix products of the tree-chunk form at its cheapest chunk length, over the matrix rate in `dtype`. For one token
    a sequence only bytes count, a state read and a state written: nothing there is a matrix product. A layer's step
    has its convolutions' weights and inputs as well, those that it leaves, and the norm's gate and weight. A training
    step has both passes: every product of the forward has a gradient by either factor.
    """
    states = {"initial_state": case.initial, "final_state": not case.training}
    moved = costs.minimal_bytes(case.sizes, dtype, gate_dtype=dtype, **states)
    if case.training:
        moved += costs.minimal_backward_bytes(case.sizes, dtype, gate_dtype=dtype, **states)
    if case.layer:
        D = case.H * (2 * case.K + case.V)
        inputs = D * (case.B * 2 * (WIDTH - 1) + WIDTH)
        moved += (inputs + case.B * case.H * case.V + case.V) * getattr(torch, dtype).itemsize
    products = (costs.tree_chunk_flops(case.sizes, C, case.lengths).matmul for C in CHUNK_SIZES)
    flops = 0 if case.T == 1 else min(products) * (3 if case.training else 1)
    bytes_ms = moved / measured["copy"]["bytes_per_second"] * 1e3
    flops_ms = flops / measured["matmul"][dtype]["flops_per_second"] * 1e3
    return {
        "bytes": moved,
        "flops": flops,
        "bytes_ms": bytes_ms,
        "flops_ms": flops_ms,
        "ms": max(bytes_ms, flops_ms),
    }
