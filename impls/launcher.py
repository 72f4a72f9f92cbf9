"""Run a plan on tensors: check the packing, allocate outputs and workspace, launch the kernels in order."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from impls.checks import DTYPE_NAMES, bounds_of
from impls.plan import Plan, Problem, Wanted
from impls.table import INTERPRET_HINT, interpreting


def forward_of(
    plan_of: Callable[[Problem, torch.device, int, tuple[int, ...]], Plan], saved: Sequence[str] = ()
) -> Callable[..., tuple]:
    """Return the forward of an op for `registration.register_raw` that runs plan_of(problem, device, interval, launch).

    interval: tokens between the states that are kept, 0 where none are. saved: buffers of the workspace that it returns
    in a list behind its three results, for `registration.register_raw_trained`.
    """

    def forward(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, l2norm,
        gate, sigmoid, state_v_first, output_final_state, state_interval, launch,
    ):  # fmt: skip
        problem = _problem(q, v, A_log, dt_bias, initial_state, cu_seqlens, l2norm, gate, sigmoid, state_v_first)
        problem = replace(problem, final=output_final_state, keeps=state_interval > 0)
        check_interpreter(q)
        _check_values(q, cu_seqlens, cu_seqlens_cpu)
        plan = plan_of(problem, q.device, state_interval, tuple(launch))
        buffers = contiguous(q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial=initial_state,
                              cu_seqlens=cu_seqlens)  # fmt: skip
        outputs = _outputs(problem, v, state_interval, cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
        # the rows of the states that are kept were counted by the packing on the host: no kernel writes beyond them
        rows = outputs["kept"].shape[0] * outputs["kept"].shape[1] if problem.keeps else 0
        numbers = {"interval": state_interval, "kept_rows": rows, "scale": scale, "lower_bound": lower_bound or 0.0}
        left = run_plan(plan, buffers | outputs, {"T": problem.T, "N": problem.N, **numbers}, v)
        results = outputs["o"], outputs["final"], outputs["kept"]
        return (*results, [left[name] for name in saved]) if saved else results

    return forward


def backward_of(
    plan_of: Callable[[Problem, Wanted, torch.device, bool], Plan], names: Sequence[str]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the backward of an op for `registration.register_raw_trained`.

    It runs plan_of(problem, wanted, device, saved), where saved tells whether the forward saved the buffers of these
    names.
    """

    def backward(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, l2norm,
        gate, sigmoid, state_v_first, saved, do, dS, wanted,
    ):  # fmt: skip
        problem = _problem(q, v, A_log, dt_bias, initial_state, cu_seqlens, l2norm, gate, sigmoid, state_v_first)
        asked = Wanted(*wanted, do=do is not None, dS=dS is not None)
        check_interpreter(q)
        _check_values(q, cu_seqlens, cu_seqlens_cpu)
        buffers = contiguous(q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial=initial_state,
                              cu_seqlens=cu_seqlens, do=do, dS=dS)  # fmt: skip
        likes = (q, k, v, g, beta, A_log, dt_bias, initial_state)
        found = {
            name: like.new_empty(like.shape) if needed else v.new_empty(0)
            for (name, needed), like in zip(asked.gradients.items(), likes, strict=True)
        }
        numbers = {"scale": scale, "lower_bound": lower_bound or 0.0}
        plan = plan_of(problem, asked, q.device, len(saved) > 0)
        buffers |= dict(zip(names, saved, strict=False))
        run_plan(plan, buffers | found, {"T": problem.T, "N": problem.N, **numbers}, v)
        return tuple(found.values())

    return backward


def _problem(q, v, A_log, dt_bias, initial_state, cu_seqlens, l2norm, gate, sigmoid, state_v_first) -> Problem:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    packed = cu_seqlens is not None
    return Problem(
        B=B, T=T, N=cu_seqlens.shape[0] - 1 if packed else B, H=H, HV=HV, K=K, V=V, dtype=DTYPE_NAMES[q.dtype],
        packed=packed, l2norm=l2norm, gate=gate, sigmoid=sigmoid, A_log=A_log is not None,
        dt_bias=dt_bias is not None, initial=initial_state is not None, v_first=state_v_first,
    )  # fmt: skip


def contiguous(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return those that there are, by name, contiguous."""
    return {name: x.contiguous() for name, x in tensors.items() if x is not None}


def run_plan(
    plan: Plan, buffers: dict[str, torch.Tensor], scalars: dict[str, int | float], like: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Allocate the workspace on the device of `like`, launch the kernels in order, and return the workspace."""
    workspace = {
        name: like.new_empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in plan.workspace.items()
    }
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        for step in plan.launches:
            step.run(buffers | workspace, scalars | plan.scalars)
    return workspace


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
