"""Run transformers' Kimi Linear for a timing, with our ops or as it is, each in a process of its own, asked by line."""

import functools
import statistics
import sys
from collections.abc import Callable

import torch
from model_entrants import ids_of, seconds
from processes import apart

THEIRS, OURS, ABSORBED = "transformers", "ours", "ours, absorbed"
LAYERS = ["linear_attention"] * 3 + ["full_attention"]
HEADS = {"linear_head_dim": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
"""The released model's."""
EIGHTH = {
    "hidden_size": 288, "intermediate_size": 1152, "moe_intermediate_size": 128, "kv_lora_rank": 64,
    "linear_num_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
"""Widths and numbers of heads, an eighth of the released model's."""
TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
WHOLE = {"kv_lora_rank": 512, "num_attention_heads": 32, "num_key_value_heads": 32}
"""MLA with the heads and the latents of the released model; STATES has all of its heads of KDA."""
HYBRID, STATES, MLA = "hybrid", "states", "latents"
MODELS = {
    HYBRID: EIGHTH | {"num_hidden_layers": 4, "layer_types": LAYERS},
    STATES: EIGHTH | {"num_hidden_layers": 4, "layer_types": LAYERS, "linear_num_heads": 32},
    MLA: EIGHTH | WHOLE | {"num_hidden_layers": 2, "layer_types": LAYERS[2:]},
}
PROMPT = 1024


def model_of(name: str):
    """Return a random model with the released heads, in float32, with the library's torch functions."""
    sys.modules.update({"fla": None, "causal_conv1d": None})
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig(**HEADS | TOKENS | EXPERTS | MODELS[name])).eval()


def context(model, T: int):
    """Return a cache of T tokens: a prompt's, then random latents in place of T - PROMPT more."""
    cache = model(ids_of(PROMPT), use_cache=True, logits_to_keep=1).past_key_values
    generator = torch.Generator().manual_seed(0)
    for i, kind in enumerate(model.config.layer_types):
        if kind == "full_attention":
            sizes = model.config.kv_lora_rank, model.config.qk_rope_head_dim
            cache.update(*(torch.randn(1, 1, T - PROMPT, size, generator=generator) for size in sizes), i)
    return cache


def step_behind(model, T: int) -> Callable[[], object]:
    """Return a call that decodes one more token behind T, and again."""
    cache = context(model, T)
    return lambda: model(ids_of(1), past_key_values=cache, use_cache=True)


def peak_beyond(call: Callable) -> float:
    """Return by how many MiB the memory of the process grows at most while a call runs."""
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak is what is used now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    with open("/proc/self/status") as lines:
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def serve(entrant: str, name: str) -> None:
    """Answer lines, until there are no more.

    "prefill T": seconds of one. "decode T CALLS": the median of so many steps behind T tokens, in seconds. "memory T":
    MiB that a prefill takes at its peak beyond what the process had.
    """
    torch.set_grad_enabled(False)
    if entrant != THEIRS:
        from kimi_linear import hf

        hf.enable(absorbed_mla=entrant == ABSORBED)
    model = model_of(name)
    behind = functools.cache(functools.partial(step_behind, model))
    prefill = functools.partial(model, use_cache=True, logits_to_keep=1)
    prefill(ids_of(PROMPT))
    print("ready", flush=True)
    for line in sys.stdin:
        kind, *values = line.split()
        match kind, list(map(int, values)):
            case "prefill", [T]:
                found = seconds(lambda T=T: prefill(ids_of(T)))
            case "memory", [T]:
                found = peak_beyond(lambda T=T: prefill(ids_of(T)))
            case "decode", [T, calls]:
                behind(T)()
                found = statistics.median(seconds(behind(T)) for _ in range(calls))
        print(found, flush=True)


serving = functools.partial(apart, "import sys; from hf_entrants import serve; serve(*sys.argv[1:])")
"""Serves an entrant and a name of MODELS in a process of its own."""
