"""Bring states in, out, and out again on the way: the initial, the final and the intermediate states of a batch."""

import torch
import torch.nn.functional as F

from impls.activations import compute_dtype
from impls.registration import state_shape
from impls.sequences import Runs, padded


class States:
    """Hold the states of all runs while they are worked on, some runs and heads at a time.

    The initial state is copied, never aliased. Intermediate states are those that enter tokens 0, interval,
    2 * interval, ... of each run; none are kept where interval is 0.
    """

    def __init__(self, initial_state, q, v, cu_seqlens, runs: Runs, interval: int):
        shape, dtype = state_shape(q, v, cu_seqlens), compute_dtype(v)
        if initial_state is None:
            self.final = v.new_zeros(shape, dtype=dtype)
        else:
            self.final = initial_state.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.interval, self.kept, self.first_row = interval, v.new_empty(0), {}
        if interval:
            total = 0
            for place, length in sorted(zip(runs.order, runs.lengths, strict=True)):
                self.first_row[place] = total
                total += -(-length // interval)
            NT = total if cu_seqlens is not None else -(-v.shape[1] // interval)
            self.kept = v.new_empty((v.shape[0], NT, *shape[1:]))

    def take(self, runs: Runs, heads: slice) -> torch.Tensor:
        """Return a copy of the states of some runs and heads, with null channels: [n, heads, K', V']."""
        S = self.final[list(runs.order), heads]
        K, V = S.shape[-2:]
        return F.pad(S, (0, padded(V) - V, 0, padded(K) - K)).contiguous()

    def put(self, S: torch.Tensor, runs: Runs, heads: slice) -> None:
        """Store the states that leave the runs: the inverse of `take`."""
        K, V = self.final.shape[-2:]
        self.final[list(runs.order), heads] = S[..., :K, :V]

    def keep(self, S: torch.Tensor, runs: Runs, first: int, heads: slice) -> None:
        """Keep the states S [n, heads, K', V'] that enter token `first` of n runs, if that begins an interval."""
        if self.interval and first % self.interval == 0:
            K, V = self.final.shape[-2:]
            places = [self.first_row[place] + first // self.interval for place in runs.order[: len(S)]]
            self.kept.flatten(0, 1)[places, heads] = S[..., :K, :V].to(self.kept.dtype)
