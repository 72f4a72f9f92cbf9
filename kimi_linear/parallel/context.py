"""Context parallelism of KDA: ranks hold consecutive parts of the tokens, and exchange what their parts do to a state.

A part of the sequence maps the state that enters it to the one that leaves it, and to its outputs, by affine maps:

    S_out = M S_in + b,   o_t = o0_t + R_t S_in        M = prod_t A_t,  A_t = (I - beta_t k_t k_t^T) Diag(exp g_t)

with b and o0 the state and the outputs from a zero state, and R_t = scale q_t^T A_t ... A_1 a row of K numbers. All of
them come out of one run of the op: K more value channels, whose values are zero and whose initial state is the
identity, leave M as their final state and R as their outputs. So every rank runs its own part at once, from
[0 | I]; the ranks gather all [b | M]; each folds those of the parts before its own, S <- M S + b, which is the
combination used inside the kernels for segments, and adds R S_in to its outputs. Nothing is run twice.

Beside one process that runs its part alone a rank computes K more value channels (for K = V the walk over the state
doubles, the chunks' own triangles do not), one product [T, K] x [K, V] per head, and a K x K x V product per part
before its own; it receives (ranks - 1) B HV K (K + V) numbers, 4 MiB in float32 from every rank for 32 heads of
128 x 128, whatever T is. Numbers round differently from one process; in 16 bits R rounds as an output does.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from impls import chunk_kda
from impls.checks import check_inputs, check_state
from kimi_linear.convolution import convolve
from kimi_linear.layers import KDALayer

WIDEST = 256
"""Value channels that the op takes at a time."""
OPTIONS = frozenset({
    "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "safe_gate",
    "lower_bound", "A_log", "dt_bias", "chunk_size",
})  # fmt: skip
"""Arguments of `chunk_kda` that are passed on: how to read the inputs."""


@torch.no_grad()
def kda_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    *,
    group: "dist.ProcessGroup | None" = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run KDA over sequences whose tokens lie on several ranks, one part after the other (this module says how).

    q, k [B, T, H, K], g [B, T, HV, K], v [B, T, HV, V] and beta [B, T, HV] hold this rank's tokens of B sequences: T
    may differ from rank to rank, and may be 0. initial_state [B, HV, K, V] enters the first rank's part and is the same
    on all ranks; zeros where None. options: those of `impls.chunk_kda` in `OPTIONS`, the same on all. Returns this
    rank's outputs [B, T, HV, V], and where it is asked for the state behind the last rank's tokens [B, HV, K, V], in
    float32 at least, with the same bits on every rank. For inference: no gradients. Every rank of the group must call
    it. Raises, before anything is sent, ValueError without a process group and for other options, else what `chunk_kda`
    raises.
    """
    _check(group, options)
    check_inputs(q, k, v, g, beta)
    check_state(initial_state, q, v, None, False)
    o, left, reads, M = _alone(q, k, v, g, beta, scale, options)
    entering, final = _folded(left, M, initial_state, group)
    o = (o.to(entering.dtype) + torch.einsum("bthk,bhkv->bthv", reads.to(entering.dtype), entering)).to(o.dtype)
    return o, final if output_final_state else None


def layer_over_ranks(
    layer: KDALayer,
    x: torch.Tensor,
    inputs: torch.Tensor,
    S: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a whole KDA layer over one sequence whose tokens lie on several ranks, as `KDALayer.prefill` would on one.

    x [T, D] holds this rank's tokens, perhaps none; inputs [1, W - 1, 3 H K] and S [1, H, K, K] are those before the
    first rank's. Every rank sends the last W - 1 inputs of its convolutions to all others: who follows parts shorter
    than that needs the inputs of several. Returns y [T, D], and the inputs and the state behind the last rank's
    tokens, on every rank.
    """
    _check(group, {})
    qkv, f, gate, beta = layer.read(x)
    before, after = _halo(qkv, inputs[0], group)
    qkv, _ = convolve(qkv, layer.conv, before[None], (0, len(x)))
    o, S = layer.run(partial(kda_over_ranks, group=group), qkv[None], f[None], beta[None], S)
    return layer.out(o[0], gate), after[None], S


def _check(group: "dist.ProcessGroup | None", options: dict) -> None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank(group) < 0:
        raise ValueError("torch.distributed must be initialised, and this rank part of the group")
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(f"tokens on several ranks take the options {', '.join(sorted(OPTIONS))}, got {unknown}")


def _alone(q, k, v, g, beta, scale: float | None, options: dict) -> tuple[torch.Tensor, ...]:
    """Return o0, b, R and M of this rank's part: outputs and state from zero, and from the identity without values."""
    (B, T, HV, V), K = v.shape, q.shape[-1]
    identity = torch.eye(K, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device).expand(B, HV, K, K)
    null, zero = v.new_zeros(B, T, HV, K), identity.new_zeros(B, HV, K, V)
    run = partial(chunk_kda, q, k, g=g, beta=beta, scale=scale, output_final_state=True, **options)
    if V + K > WIDEST:
        return *run(v=v, initial_state=zero), *run(v=null, initial_state=identity)
    o, S = run(v=torch.cat((v, null), -1), initial_state=torch.cat((zero, identity), -1))
    (o, R), (b, M) = (x.split((V, K), -1) for x in (o, S))
    return o, b, R, M


def _folded(b, M, initial_state, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state [B, HV, K, V] that enters this rank's part, and the one that leaves the last rank's."""
    S = torch.zeros_like(b) if initial_state is None else initial_state.to(b.dtype)
    entering = []
    for part in _gathered(torch.cat((b, M), -1), group):
        entering.append(S)
        own, transition = part.split((b.shape[-1], b.shape[-2]), -1)
        S = transition @ S + own
    return entering[dist.get_rank(group)], S


def _halo(x: torch.Tensor, before: torch.Tensor, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the W - 1 inputs before this rank's x [T, C], and before what comes behind the last rank's."""
    past = len(before)
    own = x[max(0, len(x) - past) :]
    count = _gathered(torch.tensor([len(own)], device=x.device), group)
    tails = _gathered(torch.cat((x.new_zeros(past - len(own), x.shape[1]), own)), group)
    befores = [before]
    for tail, n in zip(tails, count, strict=True):
        rows = torch.cat((befores[-1], tail[past - int(n) :]))
        befores.append(rows[len(rows) - past :])
    return befores[dist.get_rank(group)], befores[-1]


def _gathered(x: torch.Tensor, group) -> Sequence[torch.Tensor]:
    """Return every rank's x, of one shape."""
    told = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, x.contiguous(), group=group)
    return told
