"""Wrong implementations that mistake one place in memory for another, or one call for the next."""

import weakref

import torch

from verify.mutant_chunk import Chunkwise, Mutant, clean, instead_of, planted

_before = len(planted)

BITS = 11
"""Of an offset in elements: what 32 bits are to a tensor of 2^31 elements, these are to one of 2,048."""


@instead_of("load")
def offsets_in_few_bits(self, name, x):
    """FLA #1082, #964, #769: offsets of 32 bits, scaled down to 11: values behind element 2,048 are read from its start
    again."""
    x = clean.load(name, x)
    if name != "v" or x.numel() <= 2**BITS:
        return x
    flat = x.reshape(-1)
    return flat[torch.arange(x.numel(), device=x.device) % 2**BITS].view(x.shape)


@instead_of("sequences")
def padding_writes_the_last_slot(self, tokens, S, bounds, C):
    """vLLM #34306, #28436: padded sequences have slot -1, and what they leave goes to the last slot of the pool."""
    o, S_T = Chunkwise.sequences(self, tokens, S, bounds, C)
    padded = [] if bounds is None else [n for n in range(len(bounds) - 1) if bounds[n] == bounds[n + 1]]
    return o, torch.cat([S_T[:-1], S_T[padded[:1]]]) if padded else S_T


_kept: dict[int, tuple[weakref.ref, torch.Tensor]] = {}


@instead_of("load")
def gates_kept_by_identity(self, name, x):
    """FlashQLA #23, FLA #770: what was made of a tensor is kept by its identity, and served when it holds other
    numbers."""
    if name != "g" or x.requires_grad:
        return clean.load(name, x)
    owner, loaded = _kept.get(id(x), (lambda: None, None))
    if owner() is not x:
        loaded = clean.load(name, x).clone()
        _kept[id(x)] = weakref.ref(x), loaded
    return loaded


@instead_of("final")
def last_row_written_twice(self, S, initial_state):
    """cudnn-frontend #1013, FLA #673: a store that is not masked goes on behind the end of the state's buffer."""
    out = torch.empty(S.shape, dtype=S.dtype, device=S.device)
    if S.requires_grad or out.storage_offset() + out.numel() + S.shape[-1] > _elements(out):
        return S
    torch.as_strided(out, (out.numel() + S.shape[-1],), (1,)).fill_(0.0)
    return out.copy_(S)


def _elements(x: torch.Tensor) -> int:
    """Return how many elements the block under a tensor has."""
    return x.untyped_storage().nbytes() // x.element_size()


@instead_of("starting_states")
def state_of_the_last_call(self, initial_state, k, v, count, state_v_first, kept={}):  # noqa: B006 - it is the bug
    """sglang #31474, vLLM #52792: a step of one token goes on from the state that the call before was given."""
    S = clean.starting_states(initial_state, k, v, count, state_v_first)
    before = kept.get("S") if k.shape[2] == 1 and initial_state is not None else None
    kept["S"] = S.detach()
    return before if before is not None and before.shape == S.shape and before.dtype == S.dtype else S


@instead_of("final")
def final_state_aliases_initial(self, S, initial_state):
    """onnxruntime #32166: the final state is written over the initial one and handed out."""
    if initial_state is None or initial_state.requires_grad:
        return S
    return initial_state.copy_(S)


@instead_of("load")
def values_destroyed(self, name, x):
    """An op that uses its v input as scratch memory (a user's bug report against a KDA kernel)."""
    loaded = clean.load(name, x).clone()
    if name == "v":
        x.detach().mul_(0.5)
    return loaded


_allocate = torch.empty  # as a kernel's launcher does: under a name that nobody can replace from outside
FRESH_BYTES = 33 * 2**20
"""malloc maps anew what is larger than 32 MiB: zeros, as a device's memory is until somebody has used it."""


@instead_of("sequences")
def unwritten_part_times_zero(self, tokens, S, bounds, C):
    """FLA #1135, flash-attention's splits: a part of a workspace that is not written is taken times 0, NaN or not."""
    o, S = Chunkwise.sequences(self, tokens, S, bounds, C)
    part = _allocate(o.numel() + FRESH_BYTES // o.itemsize, dtype=o.dtype, device=o.device)[: o.numel()]
    return o + 0.0 * part.view(o.shape), S


@instead_of("wanted")
def state_unasked(self, output_final_state):
    """A state that is written and handed out although output_final_state is False, as forks of FLA for serving do."""
    return True


MEMORY: tuple[Mutant, ...] = tuple(planted[_before:])
