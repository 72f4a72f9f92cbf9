"""A training step of the op, forward and backward, as rows that are timed beside each other.

All take (q, k, v, g, beta, *, A_log, dt_bias, do, **keywords): raw inputs as `impls.chunk_kda` takes them, and the
gradient of o. They return o and the gradients of q, k, v, g, beta, A_log and dt_bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from impls.contracts import at_least_float32
from impls.table import Impl, find

RESULTS = ("o", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias")


@dataclass(frozen=True)
class TrainingImpl(Impl):
    """Describe an implementation of the whole step."""

    judged: str | None = None
    """The name by which python -m verify knows it."""

    def call(self, **arguments) -> tuple[torch.Tensor, ...]:
        """Run it: what it calls checks what it is given."""
        return self.load()(**arguments)


def step_of(function: Callable) -> Callable:
    """Return the training step of a function of `impls.chunk_kda`'s arguments."""

    def step(q, k, v, g, beta, *, A_log, dt_bias, do, **keywords) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g, beta, A_log, dt_bias)]
        with torch.enable_grad():
            o, _ = function(*leaves[:5], A_log=leaves[5], dt_bias=leaves[6], **keywords)
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    return step


def row(
    name: str, summary: str, load: Callable[[], Callable], devices: tuple[str, ...], judged: str | None = None
) -> TrainingImpl:
    """Return the row of a training step; load imports the function whose step it is."""
    return TrainingImpl(
        name=name,
        summary=summary,
        form="training",
        load=partial(_loaded, load),
        contract=partial(at_least_float32, bitwise=frozenset()),
        devices=devices,
        dtypes=("float32", "bfloat16", "float16"),
        backward=True,
        chunk_sizes=None,
        judged=judged,
    )


def _loaded(load: Callable[[], Callable]) -> Callable:
    return step_of(load())


def _ours(name: str, **keywords) -> Callable:
    return partial(find(name).call, **keywords)


ROWS = (
    row("train_torch", "chunk_torch, forward and backward", partial(_ours, "chunk_torch"), ("cpu",), "chunk_torch"),
    row("train_triton", "chunk_triton, forward and backward: seven launches", partial(_ours, "chunk_triton"), ("cuda",),
        "chunk_triton"),
    row("train_triton_saving", "the same with disable_recompute: five launches",
        partial(_ours, "chunk_triton", disable_recompute=True), ("cuda",), "chunk_triton"),
)  # fmt: skip
"""As rows beside `impls.table`: no public op chooses them."""
