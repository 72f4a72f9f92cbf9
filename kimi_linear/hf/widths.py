"""Give torch's attention on a CPU values as wide as keys, where transformers' MLA has them narrower.

Only for equal widths torch has a fused kernel there; for MLA's 192 and 128 it makes all scores of a prompt, [H, T, T]:
half of the time of a prefill of 2,048 tokens whose KDA is ours, and nearly all of its memory. The library lets the
module of a model override a function of attention in an interface of its own; this is that, for "sdpa".
"""

from collections.abc import Callable, MutableMapping

import torch.nn.functional as F

NAME = "sdpa"


def evened(interface: MutableMapping) -> MutableMapping:
    """Return an interface like transformers' own, whose "sdpa" pads values on a CPU."""
    own = type(interface)()
    own[NAME] = padded(interface[NAME])
    return own


def padded(attend: Callable) -> Callable:
    """Return transformers' function of attention with values padded to the width of the keys where that pays.

    query, key [B, H, T, K], value [B, H, S, V]; returns (o [B, T, H, V], None). As it was: steps, other devices, values
    that are no narrower, and paged caches, which the function fills itself.
    """

    def attend_evenly(module, query, key, value, attention_mask, **keywords):
        K, V = key.shape[-1], value.shape[-1]
        if V >= K or query.shape[2] == 1 or query.device.type != "cpu" or keywords.get("cache") is not None:
            return attend(module, query, key, value, attention_mask, **keywords)
        o, weights = attend(module, query, key, F.pad(value, (0, K - V)), attention_mask, **keywords)
        return o[..., :V], weights

    return attend_evenly
