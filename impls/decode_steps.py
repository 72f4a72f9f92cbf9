"""Run the recurrence as decode steps of up to eight tokens on a pool of states, so that the step is judged as any op.

    python -m verify impls.decode_steps:by_torch
    python -m verify impls.decode_steps:by_triton --device interpret        or cuda:0

Sequences lie in the slots of a pool in reverse order, with a slot of NaN between them, and sequences that have ended
are padding: what a step reads or writes beside its own slots shows in the outputs of others. One step from states that
are given goes from that pool into another, which is how `python -m autotune bench` times it.
"""

from collections.abc import Callable
from functools import partial

import torch

from impls.checks import bounds_of
from impls.contracts import at_least_float32
from impls.decode import decode_kda
from impls.decode_checks import LONGEST
from impls.pages import room
from impls.table import Impl


def in_steps(
    implementation: str, q, k, v, g, beta, *, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, config=None, **keywords,
):  # fmt: skip
    """Return (o [B, T, HV, V], final state or None); arguments as `impls.fused_recurrent_kda`, config of the step."""
    B, T, HV, V = v.shape
    keywords |= {"implementation": implementation, "config": config, "state_v_first": state_v_first}
    if cu_seqlens is None and 0 < T <= LONGEST and initial_state is not None:
        final = room(tuple(initial_state.shape), torch.float32, q.device)
        o = decode_kda(q, k, v, g, beta, initial_state.float().contiguous(), final_state=final, **keywords)
        return o, final if output_final_state else None
    bounds = bounds_of(cu_seqlens, T) or [T * b for b in range(B + 1)]
    spans = list(zip(bounds, bounds[1:], strict=False))
    tokens = [x.reshape(B * T, *x.shape[2:]) for x in (q, k, v, g, beta)]
    N, shape = len(spans), (V, q.shape[3]) if state_v_first else (q.shape[3], V)
    pool = torch.full((2 * N + 1, HV, *shape), torch.nan, device=q.device)
    slots = torch.arange(2 * N - 1, -1, -2, dtype=torch.int32, device=q.device)
    pool[slots.long()] = 0.0 if initial_state is None else initial_state.float()
    o = v.new_zeros((B * T, HV, V))
    longest = max((last - first for first, last in spans), default=0)
    for t in range(0, longest, LONGEST):
        _step(tokens, o, spans, t, pool, slots, keywords)
    return o.view(v.shape), pool[slots.long()] if output_final_state else None


def _step(tokens, o, spans, t: int, pool, slots, keywords: dict) -> None:
    """Take the tokens from t on of all sequences that have them, those that have equally many together."""
    left = {n: min(LONGEST, last - first - t) for n, (first, last) in enumerate(spans)}
    for size in sorted({x for x in left.values() if x > 0}):
        rows = [first + t if left[n] == size else 0 for n, (first, _) in enumerate(spans)]
        at = torch.tensor(rows, device=o.device)[:, None] + torch.arange(size, device=o.device)
        used = torch.tensor([left[n] == size for n in range(len(spans))], device=o.device)
        indices = torch.where(used, slots, -1)
        found = decode_kda(*(x[at] for x in tokens), pool, ssm_state_indices=indices, **keywords)
        o[at[used]] = found[used]


by_triton, by_torch = partial(in_steps, "decode_triton"), partial(in_steps, "decode_torch")


def _row(name: str, step: Callable, device: str) -> Impl:
    return Impl(
        name=f"impls.decode_steps:{name}",
        summary="one decode step, from a pool of states into another; on a GPU not measured",
        form="recurrent",
        load=lambda: step,
        contract=partial(at_least_float32, bitwise=frozenset()),
        devices=(device,),
        dtypes=("float32", "bfloat16", "float16"),
        backward=False,
        chunk_sizes=None,
        config=None,
    )


ROWS = (_row("by_triton", by_triton, "cuda"), _row("by_torch", by_torch, "cpu"))
"""As rows beside `impls.table`, under the names that the judge knows: no public op chooses them."""
