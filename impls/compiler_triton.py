"""Compile the launches of a plan ahead of time, with no GPU, and say what the compiler made of them."""

import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from impls import chunk_triton, chunk_triton_backward, dplr_triton, recurrent_triton
from impls.assembly import Code, Counts, counts, gcn, sass
from impls.configs import ChunkTritonConfig, DplrTritonConfig, RecurrentTritonConfig
from impls.estimate import Latency, latency
from impls.plan import WANTED, Launch, Plan, Problem, Wanted
from impls.targets import Target

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
FLOAT32_BUFFERS = (
    "last", "left", "entering", "initial", "final", "kept", "A_log", "dt_bias", "state", "norm_weight", "dS", "dS0",
    "dA_log", "ddt_bias",
)  # fmt: skip
INDEX_BUFFERS = {"cu_seqlens": "*i64", **dict.fromkeys(("indices", "accepted", "position", "ring_indices"), "*i32")}
SCALARS = {
    **dict.fromkeys(("T", "N", "segment", "interval", "kept_rows", "slots", "rings", "R", "first_program"), "i32"),
    **dict.fromkeys(("scale", "lower_bound", "epsilon"), "fp32"),
}
PLANNED = {
    ChunkTritonConfig: chunk_triton,
    RecurrentTritonConfig: recurrent_triton,
    DplrTritonConfig: dplr_triton,
}
PROCESSES = 2
"""Compiles at the same time."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a processor, and what instructions it is made of."""

    registers: int
    """Of a thread; on AMD both kinds of vector registers together."""
    stack: int
    """Bytes of memory per thread for what found no register."""
    shared_memory: int
    """Bytes of one program."""
    warps: int
    code: Counts
    """All instructions of one warp."""
    loop: Counts
    """Those of the longest loop alone: one chunk of the walk, one token of the recurrence."""
    latency: Latency
    seconds: float
    """What the compiler took; near 0 where Triton found its result in its cache."""

    @property
    def spilled(self) -> bool:
        """Tell whether registers went to memory."""
        return self.stack > 0 or self.code.local > 0


class Interpreting(RuntimeError):
    """Triton's interpreter runs in this process: nothing can be compiled."""


def check_compiling() -> None:
    """Raise Interpreting where kernels were imported for the interpreter."""
    if not isinstance(chunk_triton.intra, triton.JITFunction):
        raise Interpreting(
            "kernels cannot be compiled: TRITON_INTERPRET was set when Triton was imported; unset it and start again"
        )


def signature(launch: Launch, problem: Problem) -> dict[str, str]:
    """Return Triton's type of every argument of a launch: float32 for states and parameters, else the inputs' dtype."""
    known = {**SCALARS, **{name: _pointer(name, launch, problem) for name in launch.buffers}}
    for name in launch.constants:
        known.pop(name, None)
    return {name: known.get(name, "constexpr") for name in launch.kernel.arg_names}


def _pointer(name: str, launch: Launch, problem: Problem) -> str:
    usual = "float32" if name in FLOAT32_BUFFERS else problem.dtype
    return INDEX_BUFFERS.get(name) or POINTERS[launch.dtypes.get(name, usual)]


def compiled(launch: Launch, problem: Problem, target: Target) -> Resources:
    """Compile one launch for a target, as it would be on tensors aligned to 16 bytes: what the compiler made of it.

    Raises Interpreting in a process of Triton's interpreter, and what Triton raises for a kernel it cannot compile.
    """
    check_compiling()
    types = signature(launch, problem)
    constants = {name: launch.constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=aligned)
    started = time.perf_counter()
    kernel = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=launch.options
    )
    seconds = time.perf_counter() - started
    registers, stack, code = _nvidia(kernel.asm["cubin"]) if target.nvidia else _amd(kernel.asm["amdgcn"])
    return Resources(
        registers=registers,
        stack=stack,
        shared_memory=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        code=counts(code.instructions, target.nvidia),
        loop=counts(code.loop, target.nvidia),
        latency=latency(code, target),
        seconds=seconds,
    )


def _nvidia(cubin: bytes) -> tuple[int, int, Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
        text = _output(TOOLS / "nvdisasm", "-hex", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), sass(text)


def _amd(assembly: str) -> tuple[int, int, Code]:
    """Read the metadata behind the code. A stack that nothing is stored to is a slot kept for scalar registers."""
    field = {name: int(x) for name, x in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
    code = gcn(assembly)
    touched = field["vgpr_spill_count"] > 0 or counts(code.instructions, False).local > 0
    return field["vgpr_count"], field["private_segment_fixed_size"] if touched else 0, code


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def ptxas_version() -> str:
    """Return the version of the assembler that Triton brings along."""
    return re.search(r"V(\d+\.\d+\.\d+)", _output(TOOLS / "ptxas", "--version"))[1]


@dataclass(frozen=True)
class Job:
    """One launch to compile, told by what it is planned from: kernels do not travel between processes."""

    problem: Problem
    config: ChunkTritonConfig | RecurrentTritonConfig | DplrTritonConfig | None
    """None for the backward of chunk_triton, with all gradients wanted. With one, `replay` is that of a forward that
    saves."""
    target: Target
    kernel: str
    """The name of the launch; the first one of that name is compiled."""

    @property
    def plan(self) -> Plan:
        """Return the plan of the configuration's implementation."""
        if self.config is None:
            wanted = Wanted(**dict.fromkeys(WANTED, True), do=True, dS=True)
            return chunk_triton_backward.plan(self.problem, wanted, self.target)
        if self.kernel == "replay":
            return chunk_triton_backward.saving_plan(self.problem, self.config, self.target)
        return PLANNED[type(self.config)].plan(self.problem, self.config, self.target)

    @property
    def launch(self) -> Launch:
        """Return the launch."""
        return next(launch for launch in self.plan.launches if launch.name == self.kernel)

    def resources(self) -> Resources:
        """Compile the launch."""
        return compiled(self.launch, self.problem, self.target)


def outcome(job: Job) -> Resources | str:
    """Return what the compiler made of a job, or why it failed."""
    try:
        return job.resources()
    except Exception as error:  # whatever a compiler raises is a result of the search, not its end
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def outcomes(jobs: list[Job], processes: int = PROCESSES) -> list[Resources | str]:
    """Compile jobs in processes of their own, in order; a result each, or why there is none.

    Spawned, not forked: the caller may hold threads and a GPU.
    """
    check_compiling()
    if len(jobs) < 2:
        return [outcome(job) for job in jobs]
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn"), initializer=_alone) as pool:
        return list(pool.map(outcome, jobs))


def _alone() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
