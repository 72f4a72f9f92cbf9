"""Estimate how long a compiled kernel runs, without running it: to rank configurations where there is no processor.

Two figures are needed, since either alone misleads: what the units of a processor let through, and how long one warp
takes alone over the programs that are resident to hide that. A kernel of few instructions may hold so many registers
that nothing hides its latency.
"""

import re
from dataclasses import dataclass

from impls.assembly import Code, Counts, Instruction, kind_of, products
from impls.targets import Target

SASS_LATENCY = {"tensor": 18, "special": 23, "local": 40, "shared": 29, "global_": 500}
"""Cycles to the result of what signals its end; SASS_OTHER for the rest (conversions, shuffles). Rounded figures of
published microbenchmarks of Ampere and Hopper; global memory a little above the second cache."""
SASS_OTHER = 14
SASS_BARRIER = 20
SASS_TENSOR_MEMORY = 100
"""Cycles that a wait for a product in Blackwell's tensor memory takes: a guess, no published figure was at hand."""
GCN_ISSUE = 4
"""Cycles in which the 16 lanes of a unit take a wave of 64."""
GCN_LATENCY = {"shared": 64, "global_": 800, "local": 500}
GCN_BARRIER = 40


@dataclass(frozen=True)
class Latency:
    """Cycles that one warp takes when nothing else runs: for all of the code once, and once through the loop."""

    code: int
    loop: int


@dataclass(frozen=True)
class Rates:
    """What one processor does per cycle, and holds. Marketing figures over clock and count of processors."""

    megahertz: int
    issue: float
    """Instructions of a warp."""
    products: int
    """Multiply-adds of 16-bit operands by the instructions that a warp issues for itself."""
    special: float
    """Special functions of a warp."""
    bytes: float
    """From and to memory, at nine tenths of the peak."""
    registers: int
    """Of a thread's lane over all warps: registers times warps is at most this."""
    warps: int
    programs: int
    shared_memory: int


# Bandwidths: A100 80 GB 2.0 TB/s, H200 4.8, B200 8.0, MI300X 5.3. Hopper reaches 62% of its matrix rate by HMMA.
# A unit of 16 lanes on AMD has 512 vector registers per lane and holds 8 waves.
RATES = {
    "sm_80": Rates(1410, 4, 1024, 0.5, 11.8, 2048, 64, 32, 164 * 1024),
    "sm_90": Rates(1755, 4, 1270, 0.5, 18.6, 2048, 64, 32, 228 * 1024),
    "sm_100": Rates(1850, 4, 1270, 0.5, 26.3, 2048, 64, 32, 228 * 1024),
    "gfx942": Rates(2100, 1, 1024, 0.25, 7.5, 2048, 32, 16, 64 * 1024),
}
UNITS = 4
"""Parts of a processor with registers of their own, NVIDIA's and AMD's."""
RESERVED_SHARED_MEMORY = 1024
"""Bytes that CUDA keeps of the shared memory for each resident program."""


def latency(code: Code, target: Target) -> Latency:
    """Estimate both latencies, straight through the instructions in their order; the loop in its steady state."""
    alone = _sass_cycles if target.nvidia else _gcn_cycles
    return Latency(alone(code.instructions), alone(code.loop * 2) - alone(code.loop))


def resident(registers: int, shared_memory: int, warps: int, target: Target) -> int:
    """Return how many programs one processor holds at a time, at least 1."""
    rates, reserved = RATES[target.name], RESERVED_SHARED_MEMORY if target.nvidia else 0
    by_registers = UNITS * (rates.registers // UNITS // (max(registers, 8) + -registers % 8)) // warps
    by_memory = rates.shared_memory // max(shared_memory + reserved, 1)
    return max(1, min(by_registers, by_memory, rates.warps // warps, rates.programs))


def throughput(counts: Counts, warps: int, target: Target) -> float:
    """Return the cycles for which one program's instructions keep the busiest unit of a processor."""
    rates = RATES[target.name]
    return warps * max(
        counts.instructions / rates.issue,
        counts.products / rates.products,
        counts.special / rates.special,
        counts.wavefronts,
    )


@dataclass(frozen=True)
class Estimate:
    """How long one launch takes, in microseconds, by each bound; the largest one is the estimate."""

    throughput: float
    latency: float
    memory: float
    resident: int

    @property
    def microseconds(self) -> float:
        """Return the largest bound."""
        return max(self.throughput, self.latency, self.memory)


def estimated(resources, programs: int, steps: int, moved: int, target: Target) -> Estimate:
    """Estimate a launch of so many programs that move so many bytes.

    resources: `compiler_triton.Resources`. steps: how often each program runs its loop, 0 for one without a loop that
    matters. Where there are fewer programs than the processors hold, only those that are there hide latency.
    """
    rates, r = RATES[target.name], resources
    fits = resident(r.registers, r.shared_memory, r.warps, target)
    share = -(-programs // target.processors) if steps else programs / target.processors
    busy = throughput(r.loop, r.warps, target) * steps if steps else throughput(r.code, r.warps, target)
    alone = r.latency.loop * steps + (r.latency.code - r.latency.loop if steps else r.latency.code)
    rounds = -(-share // fits) if steps else share / fits
    return Estimate(
        throughput=share * busy / rates.megahertz,
        latency=rounds * alone / rates.megahertz,
        memory=moved / (rates.bytes * target.processors) / rates.megahertz,
        resident=fits,
    )


def _sass_cycles(code: tuple[Instruction, ...]) -> int:
    """Issue in order by the control words: stall counts, and waits for six scoreboards."""
    clock, ready = 0, [0] * 6
    for instruction in code:
        control = instruction.control
        stall, written, read, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        clock = max([clock, *(ready[i] for i in range(6) if waits >> i & 1)])
        kind = kind_of(instruction, True)
        if written < 6:
            awaits = instruction.opcode.startswith("SYNCS.PHASECHK")
            done = clock + (SASS_TENSOR_MEMORY if awaits else SASS_LATENCY.get(kind, SASS_OTHER))
            ready[written] = max(ready[written], done)
        if read < 6:
            ready[read] = max(ready[read], clock + SASS_OTHER)
        clock += max(stall, 1) + (SASS_BARRIER if kind == "barrier" else 0)
    return clock


def _gcn_cycles(code: tuple[Instruction, ...]) -> int:
    """Issue in order by s_waitcnt: so many accesses to memory, or to shared memory, may still be on their way."""
    clock, pending = 0, {"vmcnt": [], "lgkmcnt": []}
    for instruction in code:
        kind = kind_of(instruction, False)
        if instruction.opcode == "s_waitcnt":
            for counter, allowed in re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", instruction.operands):
                queue = pending[counter]
                waited = queue[: len(queue) - int(allowed)] if len(queue) > int(allowed) else []
                clock = max([clock, *waited])
                del queue[: len(waited)]
        elif kind in GCN_LATENCY:
            counter = "lgkmcnt" if kind == "shared" else "vmcnt"
            pending[counter].append(clock + GCN_LATENCY[kind])
        clock += GCN_ISSUE + (GCN_BARRIER if kind == "barrier" else products(instruction) // 256)
    return clock
