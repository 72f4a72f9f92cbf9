"""Draw decode steps on a pool, and what the definition makes of them, for the tests of the step."""

from dataclasses import dataclass

import numpy as np
import torch

import kda_spec
from impls.decode import STEPS, GatedNorm, ShortConvolution, decode_kda
from kda_spec import gates
from kda_spec.layers import rms_norm, short_convolution, sigmoid, silu
from kda_spec.types import Inputs

FLOAT32 = 4.8e-7
"""Twice the worst relative error of a whole tensor of the recurrent kernels in tests/impls/test_triton_reference.py."""
RAW = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}
NAMES = list(STEPS)


@dataclass
class Pool:
    """A drawn step: raw inputs, the pool, and what else is fused."""

    inputs: list[torch.Tensor]
    state: torch.Tensor
    indices: torch.Tensor
    keywords: dict
    convolution: ShortConvolution | None = None
    norm: GatedNorm | None = None

    def step(self, name: str, **others) -> torch.Tensor:
        asked = {"ssm_state_indices": self.indices, "convolution": self.convolution, "norm": self.norm}
        return decode_kda(*self.inputs, self.state, implementation=name, **(self.keywords | asked | others))


def drawn(T=1, N=3, H=1, HV=2, K=6, V=5, S=7, W=0, norm=None, dtype=torch.float32, pool=torch.float32, v_first=False):
    """Draw a step of N sequences in slots 5, 2, 4, ... of a pool."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = [normal(N, T, H, K), normal(N, T, H, K), normal(N, T, HV, V), normal(N, T, HV, K) - 1, normal(N, T, HV)]
    state = normal(S, HV, V, K) if v_first else normal(S, HV, K, V)
    indices = torch.tensor([5, 2, 4, 0, 6])[:N]
    keywords = RAW | {"A_log": torch.linspace(-1, 1, HV), "dt_bias": normal(HV * K), "state_v_first": v_first}
    made = Pool([x.to(dtype) for x in inputs], state.to(pool), indices, keywords)
    if W:
        sizes, R = (H * K, H * K, HV * V), W - 1 + T + 2
        weights, rings = [normal(D, W) for D in sizes], [normal(S, R, D).to(dtype) for D in sizes]
        made.convolution = ShortConvolution(*weights, *rings, torch.tensor([9, 1, 0, 4, 2])[:N])
    if norm:
        made.norm = GatedNorm(normal(V), normal(N, T, HV, V).to(dtype), activation=norm)
    return made


def array(x) -> np.ndarray:
    return x.double().numpy()


def tail_of(ring: torch.Tensor, position: int, W: int) -> np.ndarray:
    """Return the last W - 1 raw inputs [W - 1, D] before a position, oldest first; zeros before the first token."""
    before = range(position - W + 1, position)
    return np.stack([array(ring[p % len(ring)]) if p >= 0 else np.zeros(ring.shape[1]) for p in before])


def expected(made: Pool, n: int, start: torch.Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return o [T, HV, V] of sequence n by the definition, and its state [HV, K, V] behind each token."""
    q, k, v, g, beta = (array(x[n : n + 1]) for x in made.inputs)
    if made.convolution:
        q, k, v = (_convolved(made, n, name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    A_log, dt_bias = array(made.keywords["A_log"]), array(made.keywords["dt_bias"]).reshape(g.shape[2:])
    x = gates.l2norm(q), gates.l2norm(k), v, gates.softplus_gate(g, A_log, dt_bias), gates.beta_sigmoid(beta)
    S, o, states = array(start)[None], [], []
    S = S.swapaxes(2, 3) if made.keywords["state_v_first"] else S
    for t in range(q.shape[1]):
        found = kda_spec.recurrent(Inputs(*(y[:, t : t + 1] for y in x), initial_state=S))
        S = found.final_state
        o.append(found.o[0, 0])
        states.append(S[0])
    return _normed(made, n, np.stack(o)), states


def _convolved(made: Pool, n: int, name: str, x: np.ndarray) -> np.ndarray:
    by, slot = made.convolution, int(made.indices.reshape(len(made.indices), -1)[n, 0])
    weight = array(getattr(by, f"{name}_weight"))
    tail = tail_of(getattr(by, f"{name}_ring")[slot], int(by.position[n]), weight.shape[1])
    return silu(short_convolution(x.reshape(1, x.shape[1], -1), weight[:, None], tail[None])[0]).reshape(x.shape)


def _normed(made: Pool, n: int, o: np.ndarray) -> np.ndarray:
    if made.norm is None:
        return o
    gate = {"sigmoid": sigmoid, "silu": silu}[made.norm.activation](array(made.norm.gate[n]))
    return rms_norm(o, array(made.norm.weight), made.norm.epsilon) * gate


def assert_close(x: torch.Tensor, exact: np.ndarray, bound: float) -> None:
    assert tuple(x.shape) == exact.shape
    assert np.linalg.norm(array(x) - exact) <= bound * np.linalg.norm(exact)
