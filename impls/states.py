"""Bring states in, out, and out again on the way: the initial, the final and the intermediate states of a batch."""

import torch
import torch.nn.functional as F

from impls.activations import compute_dtype
from impls.pages import room
from impls.registration import state_shape
from impls.sequences import Runs, padded


class States:
    """Hold the states of all runs while they are worked on, some runs and heads at a time.

    The initial state is copied, never aliased; not yet where filled is False, for those who then `open` all states or
    `fill_some`.
    Intermediate states are those that enter tokens 0, interval, 2 * interval, ... of each run; none are kept where
    interval is 0.
    """

    def __init__(self, initial_state, q, v, cu_seqlens, runs: Runs, interval: int, filled: bool = True):
        shape = state_shape(q, v, cu_seqlens)
        self.initial, self.final = initial_state, room(shape, compute_dtype(v), v.device)
        if filled:
            self.fill()
        self.interval, self.kept, self.first_row = interval, v.new_empty(0), {}
        if interval:
            total = 0
            for place, length in sorted(zip(runs.order, runs.lengths, strict=True)):
                self.first_row[place] = total
                total += -(-length // interval)
            NT = total if cu_seqlens is not None else -(-v.shape[1] // interval)
            self.kept = v.new_empty((v.shape[0], NT, *shape[1:]))

    @property
    def empty(self) -> bool:
        """Tell whether zeros enter, and nobody looks at them: who writes the first state need not have read one."""
        return self.initial is None and not self.interval

    def fill(self) -> None:
        """Copy the initial state, zeros where there is none, to where the final state will be."""
        if self.initial is None:
            self.final.zero_()
        else:
            self.final.copy_(self.initial)

    def fill_some(self, runs: Runs, heads: slice) -> None:
        """Do the same for some runs and heads, shortly before they are worked on: 1 MiB that then is in the caches."""
        for place in runs.order:
            S = self.final[place, heads]
            S.zero_() if self.initial is None else S.copy_(self.initial[place, heads])

    def open(self, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states that enter all runs and the room for those that leave, [N * HV, K', V'] in runs' order.

        Both are one where states are padded, permuted, kept or zero, and where a run has no token to write it. Else
        the first is the initial state, of any dtype and strides, to be read only, and the second the final state.
        """
        N, HV, K, V = self.final.shape
        plain = padded(K) == K and padded(V) == V and runs.order == tuple(range(N))
        if plain and self.initial is not None and not self.interval and runs.running(0) == N:
            return self.initial.flatten(0, 1), self.final.flatten(0, 1)
        self.fill()
        S = self.final.flatten(0, 1) if plain else self.take(runs, slice(0, HV)).flatten(0, 1)
        return S, S

    def close(self, S: torch.Tensor, runs: Runs) -> None:
        """Store the states that leave the runs, unless they are where they belong: the end of what `open` began."""
        N, HV = self.final.shape[:2]
        if S.data_ptr() != self.final.data_ptr():
            self.put(S.unflatten(0, (N, HV)), runs, slice(0, HV))

    def borrow(self, runs: Runs, heads: slice, lanes: int) -> torch.Tensor:
        """Return the states [lanes, K', V'] of some runs and heads to be worked on: their own memory, or a copy.

        A copy where channels or lanes are null, or do not lie one after the other.
        """
        K, V = self.final.shape[-2:]
        S, n = self.final[runs.order[0] :, heads], len(runs.order)
        in_order = runs.order == tuple(range(runs.order[0], runs.order[0] + n)) and (n == 1 or S.is_contiguous())
        if in_order and padded(K) == K and padded(V) == V and lanes == n * S.shape[1]:
            return S[:n].flatten(0, 1)
        S = self.take(runs, heads).flatten(0, 1)
        return F.pad(S, (0, 0, 0, 0, 0, lanes - len(S)))

    def give_back(self, S: torch.Tensor, runs: Runs, heads: slice) -> None:
        """Store the states that leave some runs, unless they are where they belong: the end of `borrow`."""
        n, count = len(runs.order), heads.stop - heads.start
        if S.data_ptr() != self.final[runs.order[0], heads].data_ptr():
            self.put(S[: n * count].unflatten(0, (n, count)), runs, heads)

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
        """Keep the states S [lanes, K', V'] that enter token `first` of the runs, if that begins an interval."""
        if self.interval and first % self.interval == 0:
            K, V = self.final.shape[-2:]
            n, count = runs.running(first), heads.stop - heads.start
            places = [self.first_row[place] + first // self.interval for place in runs.order[:n]]
            S = S[: n * count].unflatten(0, (n, count))
            self.kept.flatten(0, 1)[places, heads] = S[..., :K, :V].to(self.kept.dtype)
