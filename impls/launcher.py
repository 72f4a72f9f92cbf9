"""Run a plan on tensors: check the packing, allocate outputs and workspace, launch the kernels in order."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from impls.checks import DTYPE_NAMES, bounds_of
from impls.plan import Plan, Problem
from impls.table import INTERPRET_HINT, interpreting

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward_of(plan_of: Callable[[Problem, torch.device, int, tuple[int, ...]], Plan]) -> Callable[..., Tensors3]:
    """Return the forward of an op for `registration.register_raw` that runs plan_of(problem, device, interval, launch).

    interval: tokens between the states that are kept, 0 where none are.
    """

    def forward(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, l2norm,
        gate, sigmoid, state_v_first, output_final_state, state_interval, launch,
    ):  # fmt: skip
        (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
        packed = cu_seqlens is not None
        problem = Problem(
            B=B, T=T, N=cu_seqlens.shape[0] - 1 if packed else B, H=H, HV=HV, K=K, V=V, dtype=DTYPE_NAMES[q.dtype],
            packed=packed, l2norm=l2norm, gate=gate, sigmoid=sigmoid, A_log=A_log is not None,
            dt_bias=dt_bias is not None, initial=initial_state is not None, final=output_final_state,
            keeps=state_interval > 0, v_first=state_v_first,
        )  # fmt: skip
        check_interpreter(q)
        _check_values(q, cu_seqlens, cu_seqlens_cpu)
        plan = plan_of(problem, q.device, state_interval, tuple(launch))
        given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias,
                 "initial": initial_state, "cu_seqlens": cu_seqlens}  # fmt: skip
        buffers = {name: x.contiguous() for name, x in given.items() if x is not None}
        outputs = _outputs(problem, v, state_interval, cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
        workspace = {
            name: v.new_empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in plan.workspace.items()
        }
        # the rows of the states that are kept were counted by the packing on the host: no kernel writes beyond them
        rows = outputs["kept"].shape[0] * outputs["kept"].shape[1] if problem.keeps else 0
        numbers = {"interval": state_interval, "kept_rows": rows, "scale": scale, "lower_bound": lower_bound or 0.0}
        scalars = {"T": T, "N": problem.N, **numbers, **plan.scalars}
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            for step in plan.launches:
                step.run(buffers | outputs | workspace, scalars)
        return outputs["o"], outputs["final"], outputs["kept"]

    return forward


def check_interpreter(q: torch.Tensor) -> None:
    """Refuse tensors on a CPU without the interpreter, and bfloat16 in one that multiplies its bit patterns.

    Its results were 10 orders of magnitude off.
    """
    if q.device.type != "cpu":
        return
    if not interpreting():
        raise ValueError(f"q must be on a GPU for a Triton kernel, got cpu{INTERPRET_HINT}")
    if q.dtype != torch.bfloat16:
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_mended_bfloat16"):
        raise ValueError(
            "q must be float32 or float16 in Triton's own interpreter, whose bfloat16 is wrong, got bfloat16; "
            "verify.interpreter.repair() mends it"
        )


def _check_values(q: torch.Tensor, cu_seqlens, cu_seqlens_cpu) -> None:
    """Check cu_seqlens where that waits for no device; elsewhere the kernels clamp."""
    on_host = cu_seqlens if q.device.type == "cpu" else cu_seqlens_cpu
    bounds_of(on_host, q.shape[1])


def _outputs(problem: Problem, v: torch.Tensor, interval: int, packing) -> dict[str, torch.Tensor]:
    p = problem
    state = (p.HV, p.V, p.K) if p.v_first else (p.HV, p.K, p.V)
    kept = (0,)
    if p.keeps:
        bounds = bounds_of(packing, p.T) or [0, p.T]  # read anyway, so checked: the rows are counted by it
        NT = sum(-(-(last - first) // interval) for first, last in zip(bounds, bounds[1:], strict=False))
        kept = (p.B, NT, *state)
    return {
        "o": v.new_empty(v.shape),
        "final": v.new_empty((p.N, *state) if p.final else (0,), dtype=torch.float32),
        "kept": v.new_empty(kept, dtype=torch.float32),
    }
