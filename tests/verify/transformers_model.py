"""transformers' Kimi Linear as a model under judgement: each text for itself, in a cache of its own."""

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

from verify.models.targets import Trace

MODULE = "transformers.models.kimi_linear.modeling_kimi_linear"


def model_class():
    """Import transformers' model with its own functions: an installed FLA's Triton kernels need a GPU."""
    kept = {name: sys.modules.pop(name) for name in ("fla", "causal_conv1d", MODULE) if name in sys.modules}
    sys.modules |= {"fla": None, "causal_conv1d": None}
    try:
        return importlib.import_module(MODULE).KimiLinearForCausalLM
    finally:
        del sys.modules["fla"], sys.modules["causal_conv1d"]
        sys.modules |= kept


CLASS = model_class()


class Traced:
    """KimiLinearForCausalLM, its layers hooked."""

    refuses = (
        "lower_bound", "per_head", "full_rank_gate", "full_rank_forget", "plain_eps", "biased_weights",
        "no shared expert", "layers from 0", "truncate", "KDA alone",
    )  # fmt: skip

    def __init__(self, folder: Path):
        self.model = CLASS.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def start(self, texts: int, capacity: int, boundary: int) -> list:
        from transformers import DynamicCache

        return [DynamicCache(config=self.model.config) for _ in range(texts)]

    def prefill(self, texts, cache) -> list[Trace]:
        return [self._run(text, own) for text, own in zip(texts, cache, strict=True)]

    def decode(self, ids, cache) -> list[Trace]:
        return self.prefill(np.asarray(ids)[:, None], cache)

    def fork(self, cache) -> list:
        return copy.deepcopy(cache)

    def _run(self, text, cache) -> Trace:
        stream = []
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: stream.append((inputs, output)))
            for layer in self.model.model.layers
        ]
        try:
            with torch.no_grad():
                out = self.model(torch.as_tensor(text)[None], past_key_values=cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        hidden = [stream[0][0][0], *(output for _, output in stream)]
        return Trace(torch.cat(hidden).double().numpy(), out.logits[0].double().numpy())
