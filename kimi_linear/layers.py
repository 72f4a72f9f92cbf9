"""The layers: norms, KDA, MLA without positions, experts, and the block around them.

All work on tokens [n, D] of several sequences, packed one after the other, or in a decoding step one of each. What they
keep between calls comes in and goes out as an argument; no layer has state of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from impls import chunk_kda, decode_layer, fused_recurrent_kda
from kimi_linear.attention import attend_absorbed, attend_expanded
from kimi_linear.config import KDA, KimiConfig
from kimi_linear.convolution import convolve, convolve_step
from kimi_linear.layout import kda_projections, mla_projections
from kimi_linear.moe import MLP, Experts
from kimi_linear.parameters import Projection, gated_norm, rms_norm, weight
from kimi_linear.share import WHOLE, Share


def in_one_call(x: torch.Tensor) -> bool:
    """Tell whether a decoding step takes convolutions, op and norm in one call: on a GPU two launches, not about 15.

    On a CPU the parts by themselves are quicker for few sequences: with 32 heads of 128 x 128, on one thread, 0.37 ms
    instead of 0.70 for one, 7.4 instead of 7.8 for eight, 27 instead of 31 for 32. A step knows no float64.
    """
    return x.is_cuda and x.dtype != torch.float64


class KDALayer(nn.Module):
    """Kimi Delta Attention between its projections: short convolutions, gates, the op, the gated norm."""

    def __init__(self, config: KimiConfig):
        super().__init__()
        D, K, P = config.hidden_size, config.kda_head_dim, config.kda_dim
        self.heads, self.head_dim, self.eps = config.kda_heads, K, config.rms_norm_eps
        self.lower_bound, self.per_head = config.lower_bound, config.gate == "head"
        self.rows = [3 * P, *list(kda_projections(config).values())[3:]]
        self.in_proj, self.out_proj = weight(sum(self.rows), D), Projection(P, D)
        self.conv = weight(3 * P, config.conv_size)
        self.A_log, self.dt_bias, self.o_norm = weight(self.heads), weight(config.forget_dim), weight(K)
        self.f_b = None if config.full_rank_forget or self.per_head else weight(P, K)
        self.g_b = None if config.full_rank_gate else weight(P, K)

    def prefill(self, x: torch.Tensor, bounds: Sequence[int], inputs: torch.Tensor, S: torch.Tensor):
        """Return y [n, D], and the inputs and states that later tokens need.

        x [n, D] holds N sequences from bounds[i] to bounds[i + 1]; inputs [N, W - 1, 3 H K] are those of the
        convolutions before them, S [N, H, K, K] the states.
        """
        qkv, f, gate, beta = self.read(x)
        qkv, inputs = convolve(qkv, self.conv, inputs, bounds)
        packing = torch.tensor(bounds)
        packing = {"cu_seqlens": packing.to(x.device), "cu_seqlens_cpu": packing}
        o, S = self.run(chunk_kda, qkv[None], f[None], beta[None], S, **packing)
        return self.out(o[0], gate), inputs, S

    def step(self, x: torch.Tensor, inputs: torch.Tensor, S: torch.Tensor):
        """Do the same for one token of each sequence: x [N, D]."""
        qkv, f, gate, beta = self.read(x)
        if in_one_call(x):
            g, dt_bias = self._gates(f[:, None])
            o, inputs, S = decode_layer(
                qkv, g[:, 0], beta, self._output_gate(gate).view(len(x), self.heads, -1), inputs, S, weight=self.conv,
                norm_weight=self.o_norm, A_log=self.A_log, dt_bias=dt_bias, lower_bound=self.lower_bound,
                epsilon=self.eps,
            )  # fmt: skip
            return self.out_proj(o.flatten(1)), inputs, S
        qkv, inputs = convolve_step(qkv, self.conv, inputs)
        o, S = self.run(fused_recurrent_kda, qkv[:, None], f[:, None], beta[:, None], S)
        return self.out(o[:, 0], gate), inputs, S

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the layer makes of x [n, D]: the convolutions' inputs, forget gates, output gates, beta."""
        return F.linear(x, self.in_proj).split(self.rows, -1)

    def run(self, op, qkv: torch.Tensor, f: torch.Tensor, beta: torch.Tensor, S: torch.Tensor, **packing):
        """Run the op on activations [B, T, ..]: the gate's second matrix, then everything inside the op."""
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.heads, self.head_dim).unbind(2)
        g, dt_bias = self._gates(f)
        return op(
            q, k, v, g, beta, A_log=self.A_log, dt_bias=dt_bias, lower_bound=self.lower_bound, initial_state=S,
            output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, **packing,
        )  # fmt: skip

    def _gates(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the raw gates g [B, T, H, K] of f [B, T, ..], and their bias [H * K]."""
        f = f if self.f_b is None else F.linear(f, self.f_b)
        g, dt_bias = f.unflatten(-1, (self.heads, -1)), self.dt_bias
        if self.per_head:
            g, dt_bias = g.expand(-1, -1, -1, self.head_dim), dt_bias.repeat_interleave(self.head_dim)
        return g, dt_bias

    def _output_gate(self, gate: torch.Tensor) -> torch.Tensor:
        return gate if self.g_b is None else F.linear(gate, self.g_b)

    def out(self, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return y [n, D] of the op's outputs o [n, H, V] and what `read` made of the output gate."""
        gate = self._output_gate(gate).view(o.shape)
        return self.out_proj(gated_norm(o, gate, self.o_norm, self.eps).flatten(1))


class MLALayer(nn.Module):
    """Multi-head latent attention without positions: the cache holds one latent per token, common to all heads."""

    def __init__(self, config: KimiConfig):
        super().__init__()
        D, H, self.rank, self.eps = config.hidden_size, config.heads, config.kv_lora_rank, config.latent_norm_eps
        self.heads, self.nope, self.scale = H, config.qk_nope_head_dim, config.qk_head_dim**-0.5
        self.rows = list(mla_projections(config).values())
        self.in_proj, self.out_proj = weight(sum(self.rows), D), Projection(H * config.v_head_dim, D)
        self.latent_norm, Q = weight(self.rank), config.q_lora_rank
        self.q_norm, self.q_b = (None, None) if Q is None else (weight(Q), weight(H * config.qk_head_dim, Q))
        self.kv_b = weight(H * (self.nope + config.v_head_dim), self.rank)

    def prefill(self, x: torch.Tensor, bounds: Sequence[int], latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return y [n, D]; latents[i] [past + own, R] is the cache of sequence i, whose own rows are written."""
        q, own = self._queries_and_latents(x)
        o = x.new_empty(len(x), self.out_proj.in_features)
        for latent, first, last in zip(latents, bounds, bounds[1:], strict=False):
            latent[len(latent) - (last - first) :] = own[first:last]
            o[first:last] = attend_expanded(q[first:last], latent, self._up(), self.rank, self.scale)
        return self.out_proj(o)

    def step(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return y [B, D] for one token of each sequence, written to latents [B, S, R] at positions [B].

        mask [B, 1, S] is 0 where a token is seen and -inf elsewhere.
        """
        q, own = self._queries_and_latents(x)
        latents[torch.arange(len(x), device=x.device), positions] = own
        return self.out_proj(attend_absorbed(q, latents, mask, self._up(), self.rank, self.scale))

    def _queries_and_latents(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q [n, H, nope + shared] and what the cache holds of each token [n, R]: normed latent, shared key."""
        q, own = F.linear(x, self.in_proj).split(self.rows, -1)
        if self.q_b is not None:
            q = F.linear(rms_norm(q, self.q_norm, self.eps), self.q_b)
        latent = rms_norm(own[:, : self.rank], self.latent_norm, self.eps)
        return q.view(len(x), self.heads, -1), torch.cat((latent, own[:, self.rank :]), -1)

    def _up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices [H, nope or v, rank] that make keys and values of a latent."""
        kv_b = self.kv_b.view(self.heads, -1, self.rank)
        return kv_b[:, : self.nope], kv_b[:, self.nope :]


class Block(nn.Module):
    """x += mixer(norm x); x += ffn(norm x)."""

    def __init__(self, config: KimiConfig, index: int, share: Share = WHOLE):
        super().__init__()
        own = share.of(config)
        self.kind, self.eps, D = config.layers[index], config.rms_norm_eps, config.hidden_size
        self.mixer_norm, self.ffn_norm = weight(D), weight(D)
        self.mixer = KDALayer(own) if self.kind == KDA else MLALayer(own)
        self.ffn = MLP(D, own.intermediate_size) if index < config.dense_layers else Experts(config, share)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the mixer reads."""
        return rms_norm(x, self.mixer_norm, self.eps)

    def add(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Return the block's output for its input x and what the mixer made of it."""
        x = x + mixed
        return x + self.ffn(rms_norm(x, self.ffn_norm, self.eps))
