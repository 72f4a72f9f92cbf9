"""The mixers that are compared: one layer, six recurrences in it. They differ in nothing else.

    mixer      state                                                       from the input           run by
    kda        S = (I - beta k k^T) Diag(exp g) S + beta k v^T             a decay per channel      impls.chunk_kda
    gdn        S = (I - beta k k^T) exp(g) S + beta k v^T                  a decay per head         impls.chunk_kda
    deltanet   S = (I - beta k k^T) S + beta k v^T                         no decay                 impls.chunk_kda
    mamba2     S = exp(g) S + d k v^T, g = -exp(A_log) d                   a step d per head        impls.dplr
    dplr       S = (I - r c c^T) Diag(exp g) S + beta k v^T                an erase key of its own  impls.dplr
    softmax    o = softmax(q K^T / sqrt(K)) V                              nothing                  torch

KDA and GDN are the layer of `kimi_linear` with its parameters: what is trained here fills a `KDALayer`. Mamba2 has its
own update rule, where one step d decides of decay and writing, on keys and queries that are not normalised, within this
layer (convolutions, gated norm). General DPLR with a = r c and b = c exp g: c is free of k, and no state grows, because
the norm of its transition is at most 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from impls import chunk_kda, dplr
from impls.activations import l2norm, log_decay, write_strength
from kimi_linear.parameters import at_least_float32

EPS = 1e-5
"""Of all norms, as released."""
OUTPUT_GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "none": None}
DECAYS = (1e-3, 1e-1)
"""Between these lies softplus(dt_bias), evenly on a logarithmic scale, and exp(A_log) between 1 and 16: `_spread`."""


SPREAD = 0.02
"""Of matrices, `initializer_range` of the released model. With 1 / sqrt(fan_in) KDA needed more steps in pilot runs."""


class MixerError(ValueError):
    """A mixer that there is not."""


@dataclass(frozen=True)
class Kind:
    """What a mixer reads from its input beside q, k and v."""

    run: Callable[["Mixer", torch.Tensor, torch.Tensor, torch.Tensor, "Rest"], torch.Tensor]
    """(mixer, q, k, v [B, T, H, K], the rest) -> o [B, T, H, K]."""
    decay: str = "none"
    """One per 'channel', one per 'head', or 'none'."""
    writes: bool = True
    """Whether there is a write strength beta."""
    erases: bool = False
    """Whether there is an erase key c, with a strength r, that is not k."""


@dataclass(frozen=True)
class Rest:
    """What a mixer reads beside q, k and v, not yet activated: None where its kind has none of it."""

    f: torch.Tensor | None
    """Decay [B, T, H, K]."""
    beta: torch.Tensor | None
    """[B, T, H]."""
    c: torch.Tensor | None
    """[B, T, H, K]."""
    r: torch.Tensor | None
    """[B, T, H]."""


def _kda(mixer: "Mixer", q, k, v, rest: Rest) -> torch.Tensor:
    inside = {name: True for name in ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")}
    return chunk_kda(q, k, v, rest.f, rest.beta, A_log=mixer.A_log, dt_bias=mixer.biases(), **inside)[0]


def _deltanet(mixer: "Mixer", q, k, v, rest: Rest) -> torch.Tensor:
    inside = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    return chunk_kda(q, k, v, torch.zeros_like(k), rest.beta, **inside)[0]


def _mamba2(mixer: "Mixer", q, k, v, rest: Rest) -> torch.Tensor:
    dtype = at_least_float32(k).dtype
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    g = log_decay(rest.f, mixer.A_log, mixer.biases(), None, dtype)
    step, nothing = -g[..., :1] / mixer.A_log.exp()[:, None], torch.zeros_like(k)
    return dplr(q, k, step * values, nothing, nothing, g)[0].to(v.dtype)


def _dplr(mixer: "Mixer", q, k, v, rest: Rest) -> torch.Tensor:
    dtype = at_least_float32(k).dtype
    q, k, c, values = l2norm(q, dtype), l2norm(k, dtype), l2norm(rest.c, dtype), v.to(dtype)
    g = log_decay(rest.f, mixer.A_log, mixer.biases(), None, dtype)
    write, erase = (write_strength(x, False, dtype)[..., None] for x in (rest.beta, rest.r))
    return dplr(q, k, write * values, erase * c, c * torch.exp(g), g)[0].to(v.dtype)


def _softmax(mixer: "Mixer", q, k, v, rest: Rest) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


MIXERS: dict[str, Kind] = {
    "kda": Kind(_kda, decay="channel"),
    "gdn": Kind(_kda, decay="head"),
    "deltanet": Kind(_deltanet),
    "mamba2": Kind(_mamba2, decay="head", writes=False),
    "dplr": Kind(_dplr, decay="channel", erases=True),
    "softmax": Kind(_softmax, writes=False),
}


@dataclass(frozen=True)
class MixerConfig:
    """Say which mixer, with the ablations of the paper's Table 1: no convolution, no output gate, a SiLU gate."""

    kind: str
    heads: int
    head_dim: int
    hidden: int
    conv: int = 4
    """Tokens that the short convolution reads; 0 for none."""
    output_gate: str = "sigmoid"
    """'sigmoid', 'silu' or 'none'."""

    def __post_init__(self):
        if self.kind not in MIXERS:
            raise MixerError(f"mixer must be one of {', '.join(MIXERS)}, got {self.kind!r}")
        if self.output_gate not in OUTPUT_GATES:
            raise MixerError(f"output gate must be one of {', '.join(OUTPUT_GATES)}, got {self.output_gate!r}")
        if min(self.heads, self.head_dim, self.hidden) < 1 or self.conv < 0:
            raise MixerError(f"heads, head dim and hidden size must be at least 1, and conv at least 0, got {self}")

    @property
    def rows(self) -> dict[str, int]:
        """Return what is read from the input, in the order of the released layer's matrix, with its rows."""
        kind, P, H, K = MIXERS[self.kind], self.heads * self.head_dim, self.heads, self.head_dim
        wanted = {
            "qkv": 3 * P,
            "f": {"channel": K, "head": H, "none": 0}[kind.decay],
            "gate": K if self.output_gate != "none" else 0,
            "beta": H if kind.writes else 0,
            "c": P if kind.erases else 0,
            "r": H if kind.erases else 0,
        }
        return {name: rows for name, rows in wanted.items() if rows}


class Mixer(nn.Module):
    """Mix tokens x [B, T, D]: projections, short convolutions with SiLU, the recurrence, the gated norm."""

    def __init__(self, config: MixerConfig, generator: torch.Generator):
        """Draw the parameters; their names and shapes are those of `kimi_linear.layers.KDALayer`, for kda and gdn."""
        super().__init__()
        self.config, self.kind = config, MIXERS[config.kind]
        P, K, D = config.heads * config.head_dim, config.head_dim, config.hidden
        self.in_proj, self.out_proj = drawn(generator, sum(config.rows.values()), D), drawn(generator, D, P)
        convolved = 4 * P if self.kind.erases else 3 * P
        self.conv = _taps(convolved, config.conv, generator) if config.conv else None
        self.o_norm = nn.Parameter(torch.ones(K))
        self.g_b = drawn(generator, P, K) if "gate" in config.rows else None
        self.f_b = drawn(generator, P, K) if self.kind.decay == "channel" else None
        if self.kind.decay != "none":
            self.A_log = nn.Parameter((1 + 15 * _spread(config.heads, generator)).log_())
            self.dt_bias = nn.Parameter(_bias(P if self.kind.decay == "channel" else config.heads, generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [B, T, D]."""
        q, k, v, rest, gate = self.inputs(x)
        with torch.autocast(x.device.type, enabled=False):  # it would narrow products inside, against their contracts
            o = self.kind.run(self, q, k, v, rest)
        return self._out(o, gate)

    def inputs(self, x: torch.Tensor):
        """Return q, k, v [B, T, H, K], the rest, and the raw output gate [B, T, K] or None."""
        B, T, _ = x.shape
        rows = self.config.rows
        read = dict(zip(rows, F.linear(x, self.in_proj).split(list(rows.values()), -1), strict=True))
        streams = torch.cat((read["qkv"], read["c"]), -1) if self.kind.erases else read["qkv"]
        streams = F.silu(streams if self.conv is None else convolve(streams, self.conv))
        q, k, v, *c = streams.view(B, T, -1, self.config.heads, self.config.head_dim).unbind(2)
        rest = Rest(self._decay(read.get("f")), read.get("beta"), c[0] if c else None, read.get("r"))
        return q, k, v, rest, read.get("gate")

    def _decay(self, f: torch.Tensor | None) -> torch.Tensor | None:
        """Return the raw decays [B, T, H, K]; those of a head are one number, spread over its channels."""
        if f is None:
            return None
        B, T, _ = f.shape
        f = f if self.f_b is None else F.linear(f, self.f_b)
        return f.view(B, T, self.config.heads, -1).expand(-1, -1, -1, self.config.head_dim)

    def biases(self) -> torch.Tensor:
        """Return dt_bias [H K]."""
        return self.dt_bias if self.f_b is not None else self.dt_bias.repeat_interleave(self.config.head_dim)

    def _out(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        normed = F.rms_norm(at_least_float32(o), self.o_norm.shape, self.o_norm, EPS)
        if gate is not None:
            gate = F.linear(gate, self.g_b).view(o.shape)
            normed = normed * OUTPUT_GATES[self.config.output_gate](at_least_float32(gate))
        return F.linear(normed.to(o.dtype).flatten(2), self.out_proj)


def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return y_t = sum_j w_j x_{t - W + 1 + j}, channel by channel, nothing before the first token: x [B, T, C].

    As W products: a grouped convolution's backward takes 3 times as long on a CPU.
    """
    W, T, w = w.shape[1], x.shape[1], w.to(x.dtype)
    padded = F.pad(x, (0, 0, W - 1, 0))
    y = padded[:, W - 1 :] * w[:, W - 1]
    for j in range(W - 1):
        y = y + padded[:, j : j + T] * w[:, j]
    return y


def drawn(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """Return a matrix [out, in] with the standard deviation that the released model begins with."""
    return nn.Parameter(torch.empty(shape).normal_(0, SPREAD, generator=generator))


def _spread(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return the middles of `count` equal parts of 0 to 1, in random order.

    Drawn independently, the decays of two heads decided what was compared: of three seeds one gave all heads of Mamba2
    a memory of 34 tokens or more, and 99% of palindromes of 64 tokens; the others some of 2 to 7, and 89% and 92%.
    """
    return (torch.randperm(count, generator=generator) + 0.5) / count


def _bias(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return dt_bias whose softplus lies between DECAYS."""
    low, high = (math.log(x) for x in DECAYS)
    rate = (low + (high - low) * _spread(count, generator)).exp()
    return rate + torch.log(-torch.expm1(-rate))


def _taps(channels: int, width: int, generator: torch.Generator) -> nn.Parameter:
    """Return the taps of convolutions [channels, width] that keep the size of their input."""
    return nn.Parameter(torch.empty(channels, width).normal_(0, width**-0.5, generator=generator))
