"""Take one decode step on a pool of states: one to eight tokens of every sequence, where the states lie.

    x_t = silu(sum_w weight_w x_{t-W+1+w})                      short convolution of q, k and v, where asked for
    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,    o_t = scale * S_t^T q_t
    y_t = o_t / rms(o_t) * weight * sigmoid(gate_t)             gated norm of the output, where asked for

A sequence reads the state of one slot and leaves its states in that slot, or in a slot for each token, from which the
next step goes on behind as many tokens as were accepted. Convolutions read rings of inputs addressed by a sequence's
position: nothing is shifted, and to take tokens back is to name an earlier position.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from impls import decode_checks as checks
from impls.call import Call, checked
from impls.checks import check_inputs
from impls.overlap import check_memory


@dataclass(frozen=True, eq=False)
class ShortConvolution:
    """Hold causal depthwise convolutions with SiLU of q, k and v, and what they remember.

    A ring [S, R, D] keeps the raw input of position p of a slot's sequence in row p mod R; R >= W - 1 + T, so that a
    step never writes a row that it reads. Channels are dense; slots and rows lie as the strides say, so that all three
    may be columns of one tensor, and lie in the pages that hold the states. A sequence's ring is that of its slot;
    where each token has a slot, that of the first, whichever the step starts from: as long as a sequence lives its
    first slot must stay the same, or its ring be named.
    """

    q_weight: torch.Tensor
    """[H * K, W], W from 2 to 4; the last column is the newest token's."""
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    """[HV * V, W]."""
    q_ring: torch.Tensor
    """[S, R, H * K], in q's dtype or float32; the step writes T rows."""
    k_ring: torch.Tensor
    v_ring: torch.Tensor
    """[S, R, HV * V]."""
    position: torch.Tensor | None = None
    """[N] int32 or int64, from 0 on: tokens that each sequence had before this step. None where rows 0 to W - 2 of each
    ring hold its last inputs, the oldest first: as for position W - 1."""
    conv_state_indices: torch.Tensor | None = None
    """[N] int32 or int64: the ring of each sequence, -1 for padding, of as many rings as there are; None as above."""


@dataclass(frozen=True, eq=False)
class GatedNorm:
    """Hold the norm of the output over the V channels of a head, and its gate."""

    weight: torch.Tensor
    """[V]."""
    gate: torch.Tensor
    """[N, T, HV, V], before its activation."""
    epsilon: float = 1e-5
    activation: str = "sigmoid"
    """'sigmoid' or 'silu'."""


@dataclass(frozen=True, eq=False)
class Step:
    """Hold a call of `decode_kda`, checked and resolved."""

    call: Call
    state: torch.Tensor
    final_state: torch.Tensor
    """Where states are written: `state` itself, or the other pool."""
    indices: torch.Tensor | None
    accepted: torch.Tensor | None
    convolution: ShortConvolution | None
    norm: GatedNorm | None
    out: torch.Tensor

    @property
    def per_token(self) -> bool:
        """Tell whether every token has a slot of its own."""
        return self.indices is not None and self.indices.ndim == 2


def _triton() -> Callable:
    from impls.decode_triton import decode_triton

    return decode_triton


def _torch() -> Callable:
    from impls.decode_torch import decode_torch

    return decode_torch


WRITTEN = ("out", "final_state", "state", "q_ring", "k_ring", "v_ring")


def _check_tensors(q, k, v, g, beta, step: Step, out: torch.Tensor | None) -> None:
    """Refuse tensors that autograd would differentiate by, and what is written and shares memory with anything."""
    known = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": step.call.A_log, "dt_bias": step.call.dt_bias,
             "state": step.state, "ssm_state_indices": step.indices, "num_accepted_tokens": step.accepted}  # fmt: skip
    for part in (step.convolution, step.norm):
        known |= {name: x for name, x in (vars(part) if part else {}).items() if isinstance(x, torch.Tensor)}
    checks.check_inference(known.values())
    itself = step.final_state.data_ptr() == step.state.data_ptr() and step.final_state.stride() == step.state.stride()
    check_memory(known | {"out": out, "final_state": None if itself else step.final_state}, WRITTEN)


STEPS = {"decode_triton": _triton, "decode_torch": _torch}
"""Name -> what imports it: Triton for a GPU (and its interpreter), torch for a CPU."""


def decode_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    convolution: ShortConvolution | None = None,
    norm: GatedNorm | None = None,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
    config: object | None = None,
    **keywords,
) -> torch.Tensor:
    """Take a step of T tokens for N sequences; returns o [N, T, HV, V] in q's dtype. The pool changes in place.

    Args:
        q, k: [N, T, H, K], T from 1 to 8. v: [N, T, HV, V]. g: [N, T, HV, K]. beta: [N, T, HV].
        state: the pool [S, HV, K, V], or [S, HV, V, K] with state_v_first, float32 or bfloat16, each slot contiguous,
            the next one as far behind as the stride says: pages may hold other things as well, which stay as they are.
            Work is in float32; a bfloat16 pool rounds what is stored.
        ssm_state_indices: the slot of each sequence [N], or of each of its tokens [N, T], int32 or int64; None for slot
            n of sequence n. Sequences whose slot, that from which they start or that of their ring, is -1 are padding:
            nothing of theirs is read or written, their o is 0. A later token whose slot is -1 leaves no state. No slot
            may be named twice.
        num_accepted_tokens: [N], from 1 to T, with indices [N, T]: the step starts from the state that the token of
            that number left; None for the first slot.
        final_state: another pool of this shape and dtype, written in the place of `state`, which is then left alone;
            it may be `state` itself. What is written, rings as well, shares no memory with anything else.
        convolution, norm: what else is fused into the step.
        out: where o is written, contiguous.
        implementation: decode_triton or decode_torch; None for what fits q's device.
        config: a RecurrentTritonConfig for decode_triton, with a norm its value tile is all of V, or for decode_torch a
            RecurrentTorchConfig; None for the default, and in torch for what is tuned for recurrent_torch.
        keywords: scale, A_log, dt_bias, lower_bound, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first: as for `impls.fused_recurrent_kda`.

    Raises TypeError and ValueError with what was expected and what came. Values of indices are checked on a CPU; on a
    GPU decode_triton waits for nothing: a slot that does not exist is treated as padding, a number of tokens and a
    position are clamped.
    """
    check_inputs(q, k, v, g, beta)
    call = checked(q, k, v, g, beta, chunk_size=1, **checks.known(keywords))
    checks.check_step(q, v, state, final_state, call.state_v_first)
    checks.check_slots(q, state, ssm_state_indices, num_accepted_tokens)
    checks.check_convolution(q, v, state, ssm_state_indices, num_accepted_tokens, convolution)
    checks.check_norm(q, v, norm)
    checks.check_out(v, out)
    step = Step(
        call=call,
        state=state,
        final_state=state if final_state is None else final_state,
        indices=ssm_state_indices,
        accepted=num_accepted_tokens,
        convolution=convolution,
        norm=norm,
        out=torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out,
    )
    _check_tensors(q, k, v, g, beta, step, out)
    name = implementation or ("decode_torch" if q.device.type == "cpu" else "decode_triton")
    if name not in STEPS:
        raise KeyError(f"unknown implementation {name!r}; known: {', '.join(STEPS)}")
    return STEPS[name]()(q, k, v, g, beta, step, config)
