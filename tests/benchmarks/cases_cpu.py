"""List what is timed on a CPU: shapes, the peer to compare with, and the ratio asked for."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from kda_spec.types import Sizes

MIXED = (1, 200, 37, 64, 150, 3, 90, 17, 128, 199, 55, 31, 8, 111, 76, 180)
"""Lengths of sixteen packed sequences, 1,350 tokens together."""


@dataclass(frozen=True)
class Case:
    """One call with K = V = 128; q and k are normed inside where `normed`, and states go in where `state`."""

    name: str
    B: int
    T: int
    H: int
    peer: str
    asked: float
    """How many times faster than the peer issue 4 asks to be."""
    others: tuple[str, ...] = ()
    """Further peers that are timed beside it, where they take seconds and no minutes."""
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None
    normed: bool = False
    state: bool = False
    rounds: int = 7
    calls: int = 1
    """Calls in a row that one sample is the mean of."""

    @property
    def sizes(self) -> Sizes:
        """Return the sizes in the terms of the definition."""
        N = self.B if self.lengths is None else len(self.lengths)
        return Sizes(B=self.B, T=self.T, H=self.H, HV=self.H, K=128, V=128, N=N)

    @property
    def bounds(self) -> list[int] | None:
        """Return the positions where packed sequences begin and end."""
        return None if self.lengths is None else [0, *accumulate(self.lengths)]


CHUNK, RECURRENT = "transformers chunk", "transformers recurrent"
NAIVE = ("fla naive chunk", "fla naive recurrent")
CASES = (
    Case("t1024-h16", 1, 1024, 16, CHUNK, 60, (RECURRENT, *NAIVE), normed=True, state=True, rounds=5),
    Case("t4096-h16", 1, 4096, 16, RECURRENT, 7, NAIVE),
    Case("t4096-h16-bf16", 1, 4096, 16, RECURRENT, 10, dtype="bfloat16"),
    Case("mixed-h32", 1, sum(MIXED), 32, RECURRENT, 7, lengths=MIXED, normed=True),
    Case("decode-b1-h32", 1, 1, 32, RECURRENT, 4, NAIVE[1:], normed=True, state=True, rounds=30, calls=40),
    Case("decode-b16-h32", 16, 1, 32, RECURRENT, 8, NAIVE[1:], normed=True, state=True, rounds=10, calls=10),
)
TRAINING = (
    Case("train-t512-h8", 1, 512, 8, RECURRENT, 15, (CHUNK,), rounds=3),
    Case("train-t4096-h16", 1, 4096, 16, CHUNK, 0, rounds=3),
)
"""Forward and backward, the quicker peer first; token by token transformers would keep 4,096 states of 1 MiB, several
times over."""


def draw(case: Case) -> tuple[list[torch.Tensor], dict]:
    """Return q, k, v, g, beta and the keywords: unit keys and gates around -0.8, where not `normed`."""
    B, T, H = case.B, case.T, case.H
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(B, T, H, 128, generator=generator) for _ in range(4))
    if not case.normed:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    dtype = getattr(torch, case.dtype)
    beta = torch.rand(B, T, H, generator=generator)
    tokens = [x.to(dtype) for x in (q, k, v)] + [torch.nn.functional.logsigmoid(g), beta]
    keywords = {"use_qk_l2norm_in_kernel": case.normed}
    if case.state:
        keywords["initial_state"] = torch.randn(B, H, 128, 128, generator=generator)
    return tokens, keywords
