"""Take one decode step in torch: sequence by sequence where its states lie, or in groups that are gathered.

A state in float32 is worked on in the memory of its slots: read once, written once. Others, and small ones, are copied
into a workspace that stays in the caches, worked on token by token, and put back.
"""

import torch
import torch.nn.functional as F

from impls.activations import l2norm_, log_decay, write_strength
from impls.choice import recurrent_torch_config, recurrent_torch_launch
from impls.configs import RecurrentTorchConfig
from impls.decode import GatedNorm, ShortConvolution, Step
from impls.decode_checks import slots_of_starts
from impls.recurrent_torch import GROUP_ELEMENTS, step_of
from impls.recurrent_torch import Step as Take
from impls.recurrent_torch import step as uncompiled
from impls.registration import in_full_precision
from impls.sequences import padded

ALONE_ELEMENTS = 2**16
"""From so many elements on a state is worked on where it lies, by itself: below, more calls cost more than copies."""
ALIGNMENT = 64
"""Bytes: products of rows that lie otherwise have other bits."""


@in_full_precision
def decode_torch(q, k, v, g, beta, step: Step, config: RecurrentTorchConfig | None = None) -> torch.Tensor:
    """Take a step: see `impls.decode.decode_kda`. Waits for the device where there are slots to read."""
    launch = recurrent_torch_launch(config, None, q.device.type)
    with torch.no_grad():
        compile = recurrent_torch_config(launch, q, v, None).compile
        rows, slots = _used(step, q.shape[0], q.device)
        whole = len(rows) == len(q)
        if not whole:
            step.out.zero_()
        if len(rows) == 0:
            return step.out
        inputs = [x if whole else x[rows] for x in (q, k, v, g, beta)]
        if step.convolution:
            rings = _rings(step)
            inputs[:3] = _convolved(inputs[:3], step.convolution, rows, rows if rings is None else rings[rows].long())
        starts = rows if step.indices is None else slots_of_starts(step.indices, step.accepted)[rows].long()
        o = _walked(inputs, step, starts, slots, compile)
        if step.norm:
            o = _normed(o, step.norm, step.norm.gate if whole else step.norm.gate[rows])
        if whole:
            step.out.copy_(o)
        else:
            step.out[rows] = o.to(step.out.dtype)
    return step.out


def _used(step: Step, N: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences that are no padding, and their slots [n] or [n, T]."""
    used = torch.ones(N, dtype=torch.bool, device=device)
    if step.indices is not None:
        used &= _there(slots_of_starts(step.indices, step.accepted), step.state)
    if step.convolution and (rings := _rings(step)) is not None:
        used &= _there(rings, step.convolution.q_ring)
    rows = used.nonzero()[:, 0]
    return rows, rows if step.indices is None else step.indices[rows].long()


def _there(slots: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return (slots >= 0) & (slots < len(pool))


def _rings(step: Step) -> torch.Tensor | None:
    """Return the ring [N] of each sequence, None for ring n of sequence n."""
    if step.convolution.conv_state_indices is not None:
        return step.convolution.conv_state_indices
    return step.indices[:, 0] if step.per_token else step.indices


def _convolved(x: list[torch.Tensor], by: ShortConvolution, rows: torch.Tensor, rings: torch.Tensor):
    """Return q, k, v [n, T, heads, channels] behind their convolutions, in float32; the rings take in the inputs."""
    T, R, W = x[0].shape[1], by.q_ring.shape[1], by.q_weight.shape[1]
    start = torch.full_like(rows, W - 1) if by.position is None else by.position[rows].long().clamp(min=0)
    positions = start[:, None] + torch.arange(1 - W, T, device=rows.device)
    at, lines, found = rings[:, None], positions % R, []
    absent = (positions < 0)[..., None] if bool((positions[:, 0] < 0).any()) else None
    for name, own in zip("qkv", x, strict=True):
        weight, ring = getattr(by, f"{name}_weight").float().T.contiguous(), getattr(by, f"{name}_ring")
        ring[at, lines[:, W - 1 :]] = own.flatten(2).to(ring.dtype)
        window = ring[at, lines].float()
        if absent is not None:
            window.masked_fill_(absent, 0.0)
        made = window[:, W - 1 :] * weight[W - 1]
        for w in range(W - 1):
            made.addcmul_(window[:, w : w + T], weight[w])
        found.append(F.silu(made, inplace=True).view(own.shape))
    return found


def _walked(inputs, step: Step, starts: torch.Tensor, slots: torch.Tensor, compile: bool) -> torch.Tensor:
    """Take the tokens of n sequences from the states in slots `starts`; return o [n, T, HV, V] in float32."""
    (n, T, HV, V), K, call = inputs[2].shape, inputs[0].shape[3], step.call
    shape = HV, padded(K), padded(V)
    lies = HV * K * V >= ALONE_ELEMENTS and all(_lies(x, step, shape) for x in (step.state, step.final_state))
    turned = lies and call.state_v_first
    S = torch.empty((0, HV, *shape[:0:-1]) if turned else (0, *shape), device=inputs[2].device)
    take = step_of(compile, S.mT if turned else S, call.scale, call.l2norm)
    rows, size = _by_token(inputs, step, take), max(1, GROUP_ELEMENTS // (HV * shape[1] * shape[2]))
    if lies:
        size, starts, slots = 1, starts.tolist(), slots.tolist()
    rows.append(torch.empty_like(rows[2]))
    for first in range(0, n, size):
        lanes = [x[:, first * HV : (first + size) * HV] for x in rows]
        if lies:
            _over_slots(step, starts[first], slots[first], lanes, take)
        else:
            _over_copies(step, starts[first : first + size], slots[first : first + size], lanes, take, shape)
    o = rows[-1] if take is not uncompiled else rows[-1].mul_(call.scale)
    return o.view(T, n, HV, -1)[..., :V].transpose(0, 1)


def _by_token(inputs, step: Step, take: Take) -> list[torch.Tensor]:
    """Return activated q, k, v, g, beta [T, n * HV, 1, channels] in float32, channels as many as the steps take."""
    call, (q, k, v, g, beta) = step.call, inputs
    if call.gate != "none":
        g = log_decay(g, call.A_log, call.dt_bias, call.lower_bound, torch.float32)
    if call.sigmoid != "none":
        beta = write_strength(beta, call.sigmoid == "twice", torch.float32)
    (n, T, HV), rows = v.shape[:3], []
    for x in (q, k, v, g):
        x = x if x.shape[2] == HV else x.repeat_interleave(HV // x.shape[2], 2)
        missing = padded(x.shape[3]) - x.shape[3]
        x = F.pad(x, (0, missing)) if missing else x
        rows.append(_copied(x.transpose(0, 1)).view(T, n * HV, 1, -1))
    rows.append(_copied(beta.transpose(0, 1)).view(T, n * HV, 1, 1))
    if take is uncompiled and call.l2norm:
        l2norm_(rows[0]), l2norm_(rows[1])
    return rows


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _lies(pool: torch.Tensor, step: Step, shape: tuple[int, int, int]) -> bool:
    """Tell whether steps can work on the states of a pool where they are."""
    (HV, K, V), v_first = shape, step.call.state_v_first
    dense = pool.dtype == torch.float32 and tuple(pool.shape[1:]) == ((HV, V, K) if v_first else shape)
    return dense and not any(x % ALIGNMENT for x in (pool.data_ptr(), pool.stride(0) * pool.element_size()))


def _over_slots(step: Step, start: int, slots: int | list[int], rows: list[torch.Tensor], take: Take) -> None:
    """Take one sequence over its tokens, from slot to slot; a token without one leaves its state beside the pool."""
    S0, pool = step.state[start], step.final_state
    if step.call.state_v_first:
        S0, pool = S0.mT, pool.mT
    for t, token in enumerate(zip(*rows, strict=True)):
        slot = slots[t] if step.per_token else slots
        S = pool[slot] if 0 <= slot < len(pool) else torch.empty_like(S0)
        take(S0, S, *token)
        S0 = S


def _over_copies(step: Step, starts, slots: torch.Tensor, rows: list[torch.Tensor], take: Take, shape) -> None:
    """Take sequences over their tokens in a copy of their states; shape: of a state, null channels and all."""
    S, last = step.state[starts].float(), len(rows[0]) - 1
    S = S.mT if step.call.state_v_first else S
    K, V = S.shape[2:]
    whole = F.pad(S, (0, shape[2] - V, 0, shape[1] - K)).contiguous()
    lanes = whole.flatten(0, 1)
    for t, token in enumerate(zip(*rows, strict=True)):
        take(lanes, lanes, *token)
        if step.per_token or t == last:
            to = slots[:, t] if step.per_token else slots
            there = _there(to, step.final_state)
            S = whole[there, :, :K, :V].to(step.final_state.dtype)
            step.final_state[to[there]] = S.mT if step.call.state_v_first else S


def _normed(o: torch.Tensor, norm: GatedNorm, gate: torch.Tensor) -> torch.Tensor:
    gate = gate.float()
    gate = F.silu(gate) if norm.activation == "silu" else gate.sigmoid()
    return F.rms_norm(o, o.shape[-1:], norm.weight.float(), norm.epsilon) * gate
