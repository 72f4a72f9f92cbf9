"""flash-linear-attention's chunk_kda (package fla-core) as rows, with and without its safe_gate, and its decode step.

safe_gate computes the blocks on the diagonal with tensor cores and needs a bounded gate; without it they are computed
token by token. Published comparisons left it off although their gates were bounded, so both are rows.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial

from impls.contracts import PrecisionContract
from impls.table import Impl

BEHIND_KEYWORDS = ("A_log", "dt_bias", "chunk_size")
"""What chunk_kda takes through **kwargs, which also swallows every misspelt name in silence."""


def contract(dtype_name: str) -> PrecisionContract:
    """Return what FLA 0.6.0 rounds: products of float32 are tf32, intermediates are kept in the inputs' dtype."""
    operand = "tf32" if dtype_name == "float32" else dtype_name
    return PrecisionContract(operand, "float32", "float32", "tf32", dtype_name, output=dtype_name)


def load(safe_gate: bool) -> Callable:
    """Import chunk_kda and return it as a row's function, with `safe_gate` set.

    Switches FLA's hand-over to FlashKDA off for this process: where both are installed FLA would run FlashKDA under
    its own name, and a comparison of the two would compare FlashKDA with itself. Raises ImportError without fla-core.
    """
    os.environ["FLA_FLASH_KDA"] = "0"
    from fla.ops.kda import chunk_kda

    named = frozenset(inspect.signature(inspect.unwrap(chunk_kda)).parameters) - {"kwargs"}
    return partial(_call, chunk_kda, named.union(BEHIND_KEYWORDS), safe_gate)


def load_recurrent() -> Callable:
    """Import fused_recurrent_kda and return it as a row's function. Raises ImportError without fla-core."""
    from fla.ops.kda import fused_recurrent_kda

    named = frozenset(inspect.signature(inspect.unwrap(fused_recurrent_kda)).parameters) - {"kwargs"}
    return partial(_call, fused_recurrent_kda, named, None)


def _call(function, known, safe_gate, q, k, v, g, beta, *, config=None, **keywords):
    if config is not None:
        raise ValueError(f"config must be None: FLA tunes itself, got {config!r}")
    if unknown := keywords.keys() - known:
        raise TypeError(f"FLA's {function.__name__} takes no {', '.join(sorted(unknown))}")
    gate = {} if safe_gate is None else {"safe_gate": safe_gate}
    return function(q, k, v, g, beta, **(keywords | gate))


def _row(name: str, summary: str, load: Callable[[], Callable], form: str = "chunk") -> Impl:
    return Impl(
        name=name,
        summary=summary,
        form=form,
        load=load,
        contract=contract,
        devices=("cuda",),
        dtypes=("float32", "bfloat16", "float16"),
        backward=form == "chunk",
        chunk_sizes=(32, 64) if form == "chunk" else None,
    )


FLA = _row("fla", "FLA's chunk_kda: any gate, diagonal blocks token by token", partial(load, False))
FLA_SAFE_GATE = _row(
    "fla_safe_gate", "FLA's chunk_kda with safe_gate: lower_bound in [-5, 0) only", partial(load, True)
)
FLA_RECURRENT = _row("fla_recurrent", "FLA's fused_recurrent_kda: the decode step", load_recurrent, "recurrent")
