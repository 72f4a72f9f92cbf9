"""Take one decode step in torch: the states of the slots are gathered, worked on token by token, and put back."""

import torch
import torch.nn.functional as F

from impls.decode import GatedNorm, ShortConvolution, Step
from impls.recurrent_torch import op_raw


def decode_torch(q, k, v, g, beta, step: Step, config: None = None) -> torch.Tensor:
    """Take a step: see `impls.decode.decode_kda`. Waits for the device where there are slots to read."""
    if config is not None:
        raise ValueError(f"config must be None for decode_torch, which has none, got {config!r}")
    with torch.no_grad():
        rows, slots = _used(step, q.shape[0], q.device)
        step.out.zero_()
        if len(rows) == 0:
            return step.out
        inputs = [x if len(rows) == len(x) else x[rows] for x in (q, k, v, g, beta)]
        if step.convolution:
            inputs[:3] = _convolved(inputs[:3], step.convolution, rows, _rings(step, rows, slots))
        S, o = step.state[_starts(step, rows, slots)], []
        for t in range(q.shape[1]):
            found, S = _token([x[:, t : t + 1] for x in inputs], S, step)
            o.append(found)
            if step.per_token:
                _put(step, S, slots[:, t])
        if not step.per_token:
            _put(step, S, slots)
        o = torch.cat(o, 1)
        step.out[rows] = _normed(o, step.norm, rows).to(step.out.dtype) if step.norm else o.to(step.out.dtype)
    return step.out


def _used(step: Step, N: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences that are no padding, and their slots [n] or [n, T]."""
    if step.indices is None:
        rows = torch.arange(N, device=device)
        return rows, rows
    used = _there(step, _first(step))
    if step.convolution and step.per_token:
        used &= _there(step, step.indices[:, 0])
    rows = used.nonzero()[:, 0]
    return rows, step.indices[rows].long()


def _there(step: Step, slots: torch.Tensor) -> torch.Tensor:
    return (slots >= 0) & (slots < len(step.state))


def _first(step: Step) -> torch.Tensor:
    """Return the slot [N] that each sequence goes on from."""
    if not step.per_token:
        return step.indices
    at = torch.zeros_like(step.indices[:, 0]) if step.accepted is None else step.accepted - 1
    return step.indices.gather(1, at.long().clamp(0, step.indices.shape[1] - 1)[:, None])[:, 0]


def _starts(step: Step, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return slots if step.indices is None else _first(step)[rows].long()


def _rings(step: Step, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return slots[:, 0] if step.per_token else slots


def _put(step: Step, S: torch.Tensor, slots: torch.Tensor) -> None:
    """Store states in the slots that exist: a token may have none."""
    there = _there(step, slots)
    step.final_state[slots[there]] = S[there].to(step.final_state.dtype)


def _token(inputs: list[torch.Tensor], S: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one token in float32; returns o [n, 1, HV, V] and the states behind it."""
    call = step.call
    o, S, _ = op_raw(
        *(x.float() for x in inputs), call.A_log, call.dt_bias, S.float(), None, None, call.scale, call.lower_bound,
        call.l2norm, call.gate, call.sigmoid, call.state_v_first, True, 0, (-1,),
    )  # fmt: skip
    return o, S


def _convolved(x: list[torch.Tensor], by: ShortConvolution, rows: torch.Tensor, slots: torch.Tensor):
    """Return q, k, v [n, T, heads, channels] behind their convolutions, in float32; the rings take in the inputs."""
    T, R, W = x[0].shape[1], by.q_ring.shape[1], by.q_weight.shape[1]
    positions = by.position[rows].long().clamp(min=0)[:, None] + torch.arange(1 - W, T, device=slots.device)
    before, behind, found = positions[:, : W - 1], positions[:, W - 1 :], []
    for name, own in zip("qkv", x, strict=True):
        weight, ring = getattr(by, f"{name}_weight"), getattr(by, f"{name}_ring")
        flat = own.flatten(2)
        old = torch.where((before >= 0)[..., None], ring[slots[:, None], before % R].float(), 0.0)
        window = torch.cat((old, flat.float()), 1).mT
        made = F.silu(F.conv1d(window, weight.float()[:, None], groups=weight.shape[0])).mT
        ring[slots[:, None], behind % R] = flat.to(ring.dtype)
        found.append(made.reshape(own.shape))
    return found


def _normed(o: torch.Tensor, norm: GatedNorm, rows: torch.Tensor) -> torch.Tensor:
    gate = norm.gate[rows].float()
    gate = F.silu(gate) if norm.activation == "silu" else gate.sigmoid()
    return F.rms_norm(o, o.shape[-1:], norm.weight.float(), norm.epsilon) * gate
