"""Kernels with the signature of FLA's chunk_kda in plain torch: a right one, and copies with one known fault each.

The judge gets them by name (`broken_kernels:undecayed`), as it gets anybody's. Each fault says where it begins, so that
the smallest recipe that shows it is known.
"""

import ctypes
import os
import subprocess

import torch

LEFT_BEHIND = "987.654"
"""Seconds that the process of `aborts` would sleep: what it can be recognised by."""

_met: set[bytes] = set()


def float64_copy(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """Run KDA token by token in float64, and round the outputs once."""
    B, T, _, K = q.shape
    HV, V, dtype = v.shape[2], v.shape[3], q.dtype
    q, k = (x.double().repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))
    v, g, beta = v.double(), g.double(), beta.double()
    spans = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    scale = K**-0.5 if scale is None else scale
    o, states = [[] for _ in range(B)], []
    for n, (b, start, stop) in enumerate(spans):
        S = q.new_zeros(HV, K, V) if initial_state is None else initial_state[n].double()
        for t in range(start, stop):
            S = torch.exp(g[b, t])[..., None] * S
            u = v[b, t] - torch.einsum("hk,hkv->hv", k[b, t], S)
            S = S + torch.einsum("hk,hv->hkv", k[b, t] * beta[b, t, :, None], u)
            o[b].append(scale * torch.einsum("hk,hkv->hv", q[b, t], S))
        states.append(S)
    rows = torch.stack([torch.stack(x) for x in o]) if T else v
    state = torch.stack(states).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return rows.to(dtype), state if output_final_state else None


def undecayed(q, k, v, g, beta, **keywords):
    """The state is not decayed: wrong wherever a gate forgets what was there before, from two tokens or a state on."""
    return float64_copy(q, k, v, torch.zeros_like(g), beta, **keywords)


def wrong_from_sixth(q, k, v, g, beta, **keywords):
    """Outputs are wrong by a quarter from the sixth token on."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return torch.cat([o[:, :5], 1.25 * o[:, 5:]], dim=1), S


def wrong_second_column(q, k, v, g, beta, **keywords):
    """The second value column of the final state is lost: o is right."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return o, None if S is None else torch.cat([S[..., :1], 0 * S[..., 1:2], S[..., 2:]], dim=-1)


def future_leak(q, k, v, g, beta, **keywords):
    """Outputs move by a tenth of the next token's queries."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    leak = 0.1 * q[..., :1].repeat_interleave(v.shape[2] // q.shape[2], dim=2)
    return torch.cat([o[:, :-1] + leak[:, 1:], o[:, -1:]], dim=1), S


def raises_on_three_tokens(q, k, v, g, beta, **keywords):
    """A length that the launcher does not expect."""
    if q.shape[1] == 3:
        raise ValueError("no grid for 3 tokens")
    return float64_copy(q, k, v, g, beta, **keywords)


def loses_a_row_of_three(q, k, v, g, beta, **keywords):
    """Of a multiple of three tokens the last has no output."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return o[:, : -1 if q.shape[1] % 3 == 0 else None], S


def aborts(q, k, v, g, beta, **keywords):
    """The process dies, as after an illegal memory access, and leaves a process of its own behind."""
    subprocess.Popen(["sleep", LEFT_BEHIND])
    os.abort()


def nan_at_minus_infinity(q, k, v, g, beta, **keywords):
    """0 * inf where a gate is minus infinity."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return o + 0 * torch.sum(g, dim=-1, keepdim=True).to(o.dtype), S


def wrong_once(q, k, v, g, beta, **keywords):
    """The first call with any q is wrong, later ones are right: memory that nobody wrote."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    key = q.detach().double().numpy().tobytes()
    if key not in _met:
        _met.add(key)
        o = o + 1
    return o, S


def deaf_to_scale(q, k, v, g, beta, scale=None, **keywords):
    """The keyword scale is taken and ignored."""
    return float64_copy(q, k, v, g, beta, **keywords)


def returns_o_only(q, k, v, g, beta, **keywords):
    """The final state is forgotten."""
    return float64_copy(q, k, v, g, beta, **keywords)[0]


def state_forgotten(q, k, v, g, beta, **keywords):
    """The final state is None, whoever asks for it."""
    return float64_copy(q, k, v, g, beta, **keywords)[0], None


def in_float32(q, k, v, g, beta, **keywords):
    """float64 inputs are computed in float32, as many kernels do."""
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return o.float().to(o.dtype), None if S is None else S.float().to(S.dtype)


def raises_always(q, k, v, g, beta, **keywords):
    """No device that it was built for."""
    raise RuntimeError('no kernel """ image\nimport os')


def bfloat16_only(q, k, v, g, beta, **keywords):
    """Other dtypes are refused."""
    assert q.dtype == torch.bfloat16
    return float64_copy(q, k, v, g, beta, **keywords)


not_callable = 3


def only_compiled(q, k, v, g, beta, **keywords):
    """Refuses to run where Triton would interpret."""
    if "TRITON_INTERPRET" in os.environ:
        raise RuntimeError("interpreted")
    return float64_copy(q, k, v, g, beta, **keywords)


def _unlike_chunk_kda(queries, keys):
    """Nothing that could be called with five tensors."""


def hangs(q, k, v, g, beta, **keywords):
    """Never ends from three tokens on."""
    import threading

    if q.shape[1] > 2:
        threading.Event().wait()
    return float64_copy(q, k, v, g, beta, **keywords)


def exits(q, k, v, g, beta, **keywords):
    """The process ends over sequences of four, five and six tokens."""
    if q.shape[1] in (4, 5, 6):
        os._exit(3)
    return float64_copy(q, k, v, g, beta, **keywords)


def faults_on_three_tokens(q, k, v, g, beta, **keywords):
    """Outputs are wrong from the third token on; of three tokens a page is read that is not there."""
    if q.shape[1] == 3:
        ctypes.string_at(0)
    o, S = float64_copy(q, k, v, g, beta, **keywords)
    return torch.cat([o[:, :2], 1.25 * o[:, 2:]], dim=1), S
