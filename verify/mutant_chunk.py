"""The judge's own chunkwise KDA in plain differentiable torch: right, slow, and made of parts that can be replaced.

Inside a chunk of C tokens, with the decays D_ij = exp(g_{j+1} + ... + g_i) [C, C, K] written out (no exponent is
positive):

    A_ij = <q_i, D_ij k_j>  (j <= i)         L_ij = beta_i <k_i, D_ij k_j>  (j < i)
    delta = (I + L)^-1 beta (v - (d k)^T S)  with d_i = exp(g_1 + ... + g_i)
    o = scale ((d q)^T S + A delta)          S <- d_C S + (D_C k)^T delta

Each method is a switch point: `instead_of` plants a wrong one there, and makes a mutant of it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch


class Chunkwise:
    """A callable with FLA's signature, computing in float32 (float64 for float64 inputs); it keeps nothing."""

    def __call__(
        self,
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        lower_bound=None,
        A_log=None,
        dt_bias=None,
        state_v_first=False,
        cu_seqlens=None,
        chunk_size=16,
    ):
        """Return (o [B, T, HV, V] in v's dtype, final state [N, HV, K, V] or None)."""
        dtype, scale = v.dtype, self.scale(scale, q.shape[-1])
        q, k, v, g, beta = (self.load(name, x) for name, x in zip("qkvgb", (q, k, v, g, beta), strict=True))
        if use_qk_l2norm_in_kernel:
            q, k = self.normalise(q), self.normalise(k)
        if use_gate_in_kernel:
            g = self.gate(g, A_log, dt_bias, lower_bound)
        if use_beta_sigmoid_in_kernel:
            beta = self.strength(beta, allow_neg_eigval)
        q, k = (self.group(x, v.shape[1]) for x in (q * scale, k))
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        S = self.starting_states(initial_state, k, v, 1 if bounds is None else len(bounds) - 1, state_v_first)
        o, S = self.sequences((q, k, v, g, beta[..., None]), S, bounds, chunk_size)
        S = self.final(S.mT if state_v_first else S, initial_state) if self.wanted(output_final_state) else None
        return o.transpose(1, 2).to(dtype), S

    def scale(self, scale: float | None, K: int) -> float:
        """Resolve the factor of the queries."""
        return K**-0.5 if scale is None else scale

    def load(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Read an argument [B, T, heads, ...] as contiguous [B, heads, T, ...] in the dtype of the computation."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).contiguous()

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """Divide rows by sqrt(sum x^2 + 1e-6)."""
        return x / torch.sqrt(torch.sum(x * x, dim=-1, keepdim=True) + 1e-6)

    def gate(self, g, A_log, dt_bias, lower_bound) -> torch.Tensor:
        """Activate raw gates [B, HV, T, K]; A_log [HV], dt_bias [HV * K]."""
        x = g if dt_bias is None else g + dt_bias.view(g.shape[1], 1, g.shape[3])
        rate = 1.0 if A_log is None else torch.exp(A_log).view(-1, 1, 1)
        if lower_bound is not None:
            return lower_bound * sigmoid(rate * x)
        return -rate * softplus(x)

    def strength(self, beta: torch.Tensor, allow_neg_eigval: bool) -> torch.Tensor:
        """Activate raw beta."""
        return sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)

    def group(self, x: torch.Tensor, HV: int) -> torch.Tensor:
        """Repeat query/key heads [B, H, T, K] so that value head h reads head h // (HV / H)."""
        return x.repeat_interleave(HV // x.shape[1], dim=1)

    def starting_states(self, initial_state, k, v, count: int, state_v_first: bool) -> torch.Tensor:
        """Return the states [N, HV, K, V] before the first token, a sum over no tokens where none are given."""
        if initial_state is None:
            nothing = k[..., :0, :].mT @ v[..., :0, :]
            return nothing.repeat(count, 1, 1, 1)
        return initial_state.mT if state_v_first else initial_state

    def sequences(self, tokens, S, bounds: list[int] | None, C: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run equal sequences together (bounds None), or packed ones after each other. Tokens are [B, HV, T, ...]."""
        if bounds is None:
            return self.run(tokens, S, C)
        runs = [
            self.run([x[:, :, start:stop] for x in tokens], S[n : n + 1], C)
            for n, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
        return torch.cat([o for o, _ in runs], dim=2), torch.cat([last for _, last in runs])

    def run(self, tokens, S, C: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Walk the chunks of one sequence, the last one ragged; returns o [B, HV, T, V] and a new state."""
        o, S = [tokens[2][:, :, :0]], S.clone()
        for start in range(0, tokens[0].shape[2], C):
            rows, S = self.chunk(*(x[:, :, start : start + C] for x in tokens), S)
            o.append(rows)
        return torch.cat(o, dim=2), S

    def chunk(self, q, k, v, g, beta, S) -> tuple[torch.Tensor, torch.Tensor]:
        """Advance S [B, HV, K, V] by one chunk and return its outputs; queries come scaled, beta as [B, HV, C, 1]."""
        between, since = self.between(g), self.since_start(g)
        A, L = self.attention(q, k, between), self.erased(k, beta, between)
        delta = self.solve(L, self.residual(beta, v, k * since, S))
        o = self.read(q * since, S, A, delta)
        return o, self.carry(since[..., -1, :, None], S) + self.write(k * between[..., -1, :, :], delta)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum along the third axis from the left, inclusively, in float64: exp(G) is off by |G| roundings of G."""
        return torch.cumsum(x, dim=2, dtype=torch.float64)

    def segments(self, g: torch.Tensor) -> torch.Tensor:
        """Sum g over the tokens j+1 .. i [B, HV, C, C, K], with 0 for i <= j. No differences: -inf is legal."""
        return self.sums(torch.where(triangle(g, -1)[..., None], g[..., None, :], 0.0))

    def between(self, g: torch.Tensor) -> torch.Tensor:
        """Return the decays from token j to token i [B, HV, C, C, K], zero for j > i."""
        return torch.where(triangle(g, 0)[..., None], torch.exp(self.segments(g)).to(g.dtype), 0.0)

    def since_start(self, g: torch.Tensor) -> torch.Tensor:
        """Return the decays from the start of the chunk to each token [B, HV, C, K]."""
        return torch.exp(self.sums(g)).to(g.dtype)

    def scores(self, x: torch.Tensor, k: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
        """Return <x_i, D_ij k_j> [B, HV, C, C]; D is zero for j > i."""
        return torch.sum(x[..., :, None, :] * (between * k[..., None, :, :]), dim=-1)

    def attention(self, q, k, between) -> torch.Tensor:
        """Return what each query reads of each write inside the chunk, its own token's included."""
        return self.scores(q, k, between)

    def erased(self, k, beta, between) -> torch.Tensor:
        """Return the strictly lower triangular matrix L [B, HV, C, C]."""
        return beta * torch.tril(self.scores(k, k, between), -1)

    def residual(self, beta, v, k, S) -> torch.Tensor:
        """Return beta (v - k^T S): what the chunk's tokens find missing in the state that enters it."""
        return beta * (v - product(k, S))

    def solve(self, L: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Solve (I + L) x = right."""
        rows = [right[..., :1, :]]
        for i in range(1, right.shape[-2]):
            rows.append(right[..., i : i + 1, :] - product(L[..., i : i + 1, :i], torch.cat(rows, dim=-2)))
        return torch.cat(rows, dim=-2)

    def read(self, q, S, A, delta) -> torch.Tensor:
        """Return the outputs: the state that entered the chunk, and its writes."""
        return product(q, S) + product(A, delta)

    def carry(self, decay: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """Decay the state [B, HV, K, V] over the whole chunk; decay [B, HV, K, 1]."""
        return decay * S

    def write(self, k: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Sum the chunk's writes; keys come decayed to its end."""
        return product(k.mT, delta)

    def wanted(self, output_final_state: bool) -> bool:
        """Tell whether the final state is handed out."""
        return output_final_state

    def final(self, S: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
        """Hand out the final state, in the caller's layout."""
        return S


def triangle(g: torch.Tensor, diagonal: int) -> torch.Tensor:
    """Return the mask j <= i + diagonal [C, C] for gates [..., C, K]."""
    C = g.shape[-2]
    return torch.ones(C, C, dtype=torch.bool, device=g.device).tril(diagonal)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices [..., m, n] and [..., n, p] element by element.

    BLAS rounds by the alignment of each matrix in memory, so that equal heads in other places give other last bits.
    """
    return torch.sum(a[..., :, :, None] * b[..., None, :, :], dim=-2)


def _shrunk(x: torch.Tensor) -> torch.Tensor:
    """Return exp(-|x|), with a derivative also at 0.

    torch's own sigmoid and softplus round the last few elements of a buffer otherwise than the rest.
    """
    return torch.exp(torch.where(x < 0, x, -x))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-x)) without overflow."""
    e = _shrunk(x)
    return torch.where(x < 0, e, 1.0) / (1 + e)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp x) without overflow."""
    return torch.where(x < 0, 0.0, x) + torch.log1p(_shrunk(x))


clean = Chunkwise()


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation with FLA's signature, and the real bug that it imitates."""

    name: str
    imitates: str
    function: Callable


planted: list[Mutant] = []
"""Every mutant made by `instead_of`, in the order of their definitions."""


def instead_of(part: str) -> Callable:
    """Make a mutant out of the decorated function: it bears its name, and replaces a method of Chunkwise."""
    assert hasattr(Chunkwise, part), part

    def plant(replacement: Callable) -> Callable:
        kind = type(replacement.__name__, (Chunkwise,), {part: replacement})
        planted.append(Mutant(replacement.__name__, inspect.getdoc(replacement), kind()))
        return replacement

    return plant


def regraded(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return x itself, with its gradient changed on the way back."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(change)
    return x
