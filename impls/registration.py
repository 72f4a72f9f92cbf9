"""Register an implementation as torch custom ops: an opaque forward, an opaque hand-written backward, shapes for both.

Autograd does not work inside a custom op, and written inside `register_autograd` the backward would be traced and
opcheck would report other gradients: so the backward is an op of its own.
"""

import functools
import threading
from collections.abc import Callable, Sequence

import torch

from impls.activations import compute_dtype

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors6 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def state_shape(q, v, cu_seqlens) -> tuple[int, int, int, int]:
    """Return [N, HV, K, V], the shape of the states of these inputs."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return N, v.shape[2], q.shape[3], v.shape[3]


def _kept_states(q, v, cu_seqlens, interval: int):
    """Return the shape [B, NT, HV, K, V] of the intermediate states; with packing NT depends on values."""
    N, HV, K, V = state_shape(q, v, cu_seqlens)
    if cu_seqlens is None:
        return N, (q.shape[1] + interval - 1) // interval, HV, K, V
    return 1, torch.library.get_ctx().new_dynamic_size(), HV, K, V


class _FullProducts:
    """Multiply float32 in float32 while any thread is inside, whatever `torch.set_float32_matmul_precision` says.

    It would round the operands of the products inside to bfloat16 (or tf32), which the contracts do not say. The
    setting is the process's, so the last thread to leave restores it: when each restored its own, 27 of 1,788 runs of
    two threads changed bits.
    """

    def __init__(self, matmul):
        self.matmul, self.lock, self.inside, self.asked = matmul, threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.matmul.fp32_precision not in ("ieee", "none"):
                self.asked, self.matmul.fp32_precision = self.matmul.fp32_precision, "ieee"

    def __exit__(self, *error) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.asked is not None:
                self.matmul.fp32_precision = "none"  # inherited, if that is where it came from
                if self.matmul.fp32_precision != self.asked:
                    self.matmul.fp32_precision = self.asked
                self.asked = None


_ON_CPU, _ON_CUDA = _FullProducts(torch.backends.mkldnn.matmul), _FullProducts(torch.backends.cuda.matmul)


def in_full_precision(function: Callable) -> Callable:
    """Run a function of (q, ...) with full products and without autocast, on q's device."""

    def run(q, *rest):
        device = q.device.type
        with _ON_CUDA if device == "cuda" else _ON_CPU:
            if not torch.is_autocast_enabled(device):  # to turn it off where it is off costs 3 us
                return function(q, *rest)
            with torch.autocast(device_type=device, enabled=False):
                return function(q, *rest)

    return run


def register(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register `kda_forge::<name>` and `kda_forge::<name>_backward`, and return the first.

    forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch) returns
    o [B, T, HV, V] in v's dtype, the final state [N, HV, K, V] in float32 (float64 for float64 inputs) and the
    states [B, NT, HV, K, V] that enter every `state_interval` tokens, in v's dtype; what was not asked for
    (output_final_state=False, state_interval=0) comes empty. backward(q, k, v, g, beta, initial_state, cu_seqlens,
    scale, do, dS, launch) returns the gradients of q, k, v, g, beta, and of the initial state (empty where there is
    none). launch holds the numbers of the configuration: the backward is given those that the forward ran with.
    """
    forward, backward = in_full_precision(forward), in_full_precision(backward)

    @torch.library.custom_op(f"kda_forge::{name}", mutates_args=())
    def op(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        scale: float,
        output_final_state: bool,
        state_interval: int,
        launch: Sequence[int],
    ) -> Tensors3:
        return forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch)

    @torch.library.custom_op(f"kda_forge::{name}_backward", mutates_args=())
    def backward_op(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        scale: float,
        do: torch.Tensor | None,
        dS: torch.Tensor | None,
        launch: Sequence[int],
    ) -> Tensors6:
        return backward(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS, launch)

    op.register_fake(_fake_forward)
    op.register_autograd(_differentiate_with(backward_op), setup_context=_save)
    backward_op.register_fake(_fake_backward)
    backward_op.register_autograd(_refuse)
    return op


def _fake_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
    state = state_shape(q, v, cu_seqlens) if output_final_state else (0,)
    kept = _kept_states(q, v, cu_seqlens, state_interval) if state_interval else (0,)
    return v.new_empty(v.shape), v.new_empty(state, dtype=compute_dtype(v)), v.new_empty(kept)


def _fake_backward(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS, launch):
    dS0 = v.new_empty((0,)) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return (*(x.new_empty(x.shape) for x in (q, k, v, g, beta)), dS0)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, _, launch = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.has_final_state, ctx.launch = scale, output_final_state, launch


def _differentiate_with(backward_op: Callable) -> Callable:
    def backward(ctx, do, dS, dh):
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
        *gradients, dS0 = backward_op(*saved, ctx.scale, do, dS if ctx.has_final_state else None, ctx.launch)
        dS0 = None if saved[5] is None else dS0
        return (*gradients, dS0, None, None, None, None, None)

    return backward


def _refuse(ctx, *gradients):
    raise NotImplementedError(
        "kda_forge ops are differentiable once: double backward is not supported; compute the first gradients without "
        "create_graph=True, or write the recurrence token by token in torch, which autograd differentiates again"
    )


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
"""The types of arguments that have no behaviour of their own."""


def unobserved(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Tell whether nobody would see a call of an op without gradients but us, so that its function may be called.

    Not so where torch compiles, traces, transforms or profiles in this thread, for tensors of other classes, and for
    views that negate what lies in memory. Tangents of forward mode are carried along without gradients, too.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch.autograd._profiler_enabled()
        and all(type(x) in PLAIN and (x is None or not x.is_neg()) for x in tensors)
    )


library = torch.library.Library("kda_forge", "FRAGMENT")
_RAW_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, float scale, float? lower_bound, bool l2norm, str gate, str sigmoid, "
    "bool state_v_first"
)
_ASKED = "bool output_final_state, SymInt state_interval, SymInt[] launch"
_RAW = f"({_RAW_INPUTS}, {_ASKED}) -> (Tensor, Tensor, Tensor)"
_RAW_SAVING = f"({_RAW_INPUTS}, {_ASKED}) -> (Tensor, Tensor, Tensor, Tensor[])"
_GIVEN = "Tensor[] saved, Tensor? do, Tensor? dS, bool[] wanted"
_RAW_BACKWARD = f"({_RAW_INPUTS}, {_GIVEN}) -> ({', '.join(['Tensor'] * 8)})"


def register_raw(name: str, forward: Callable, kept_dtype: Callable = compute_dtype) -> Callable:
    """Register `kda_forge::<name>`, an op that activates inside and has no backward, and return it.

    forward(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound, l2norm,
    gate, sigmoid, state_v_first, output_final_state, state_interval, launch) takes the fields of `call.Call` and
    returns what `register` says of its forward, but with states [.., V, K] where state_v_first, and the intermediate
    ones in kept_dtype(v): in float32 those, and the inputs, are what a backward needs saved. Defined through a library
    and not through `torch.library.custom_op`, whose layer for autograd would be another 11 us of every decode step.
    """
    return _defined(name, _RAW, forward, functools.partial(_fake_raw, kept_dtype))


def register_raw_backward(name: str, backward: Callable) -> Callable:
    """Register `kda_forge::<name>`, the backward of ops of `register_raw_trained`, and return it.

    backward(q, k, .., state_v_first, saved, do, dS, wanted) takes the arguments of the forward up to the layout of
    states, what that saved (a list, maybe empty), the gradients of o and of the final state (None for zero), and
    whether those of q, k, v, g, beta, A_log, dt_bias and the initial state are wanted; it returns these eight in the
    shapes and dtypes of the inputs, empty where not wanted.
    """
    op = _defined(name, _RAW_BACKWARD, backward, _fake_raw_backward)
    torch.library.register_autograd(op, _refuse, lib=library)
    return op


def register_raw_trained(
    name: str, forward: Callable, backward_op: Callable, saved: Callable | None = None
) -> Callable:
    """Register `kda_forge::<name>` as `register_raw` does, but differentiable by an op of `register_raw_backward`.

    saved: returns for (q, v, cu_seqlens) the (shape, dtype) of what the forward saves for the backward. It then returns
    that as a list behind its three results.
    """

    def fake(*inputs):
        found = _fake_raw(compute_dtype, *inputs)
        q, v, cu_seqlens = inputs[0], inputs[2], inputs[8]
        return (*found, [v.new_empty(x, dtype=to) for x, to in saved(q, v, cu_seqlens)]) if saved else found

    op = _defined(name, _RAW_SAVING if saved else _RAW, forward, fake)
    torch.library.register_autograd(op, _differentiate_raw_with(backward_op), setup_context=_save_raw, lib=library)
    return op


def _defined(name: str, schema: str, function: Callable, fake: Callable) -> Callable:
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, in_full_precision(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kda_forge::{name}", fake, lib=library)
    return getattr(torch.ops.kda_forge, name).default


def _save_raw(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], *(output[3] if len(output) > 3 else ()))
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.has_final_state, ctx.count = inputs[10:16], inputs[16], len(inputs)


def _differentiate_raw_with(backward_op: Callable) -> Callable:
    def backward(ctx, do, dS, *others):
        wanted, dS = list(ctx.needs_input_grad[:8]), dS if ctx.has_final_state else None
        kept = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
        found = backward_op(*kept[:10], *ctx.numbers, list(kept[10:]), do, dS, wanted)
        gradients = [x if needed else None for x, needed in zip(found, wanted, strict=True)]
        return *gradients, *[None] * (ctx.count - len(gradients))

    return backward


def _fake_raw_backward(q, k, v, g, beta, A_log, dt_bias, initial_state, *rest):
    inputs, wanted = (q, k, v, g, beta, A_log, dt_bias, initial_state), rest[-1]
    return tuple(x.new_empty(x.shape) if asked else v.new_empty((0,)) for x, asked in zip(inputs, wanted, strict=True))


def _fake_raw(
    kept_dtype, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, scale, lower_bound,
    l2norm, gate, sigmoid, state_v_first, output_final_state, state_interval, launch,
):  # fmt: skip
    o, S, h = _fake_forward(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch
    )
    turned = ((*x.shape[:-2], x.shape[-1], x.shape[-2]) if state_v_first and x.ndim > 1 else x.shape for x in (S, h))
    return o, *(v.new_empty(x, dtype=to(v)) for x, to in zip(turned, (compute_dtype, kept_dtype), strict=True))
