"""Random tiny models of transformers' three families with KDA, and their modules with the library's torch functions."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

FAMILIES = ("kimi_linear", "glm5_next", "bailing_hybrid")
TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, **TOKENS}
LATENTS = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}


_imported: dict[str, ModuleType] = {}


def name_of(family: str) -> str:
    """Return the name of a family's module."""
    return f"transformers.models.{family}.modeling_{family}"


@contextlib.contextmanager
def imported() -> Iterator[dict[str, ModuleType]]:
    """Put into sys.modules the three modules with the library's torch functions, whatever faster ones are installed.

    They are imported once in a process: torch.compile keeps the module that it met first under a name, and looks up
    what it guards there. Afterwards sys.modules holds what it held before.
    """
    faster = ("fla", "causal_conv1d")
    names = [*faster, *map(name_of, FAMILIES)]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules |= dict.fromkeys(faster)
    sys.modules |= _imported
    try:
        modules = {family: importlib.import_module(name_of(family)) for family in FAMILIES}
        _imported.update((module.__name__, module) for module in modules.values())
        yield modules
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules |= kept


def kimi_linear(module, **changes):
    """Return three layers of KDA, one of MLA and one of KDA again; dense, then experts."""
    sizes = {
        **SIZES, **LATENTS, **EXPERTS, "num_hidden_layers": 5, "linear_num_heads": 2, "linear_head_dim": 16,
        "qk_rope_head_dim": 8, "num_local_experts": 4, "initializer_range": 0.1,
    }  # fmt: skip
    return module.KimiLinearForCausalLM(module.KimiLinearConfig(**sizes | changes))


def glm5_next(module, **changes):
    """Return the whole model, its vision part as small as it gets; sparse MLA in the fourth layer."""
    text = {
        **SIZES, **LATENTS, **EXPERTS, "num_hidden_layers": 5, "linear_num_heads": 2, "linear_head_dim": 16,
        "q_lora_rank": 24, "n_routed_experts": 4, "index_topk": 32, "index_head_dim": 16, "index_n_heads": 2,
        "index_kpool": 4, "hc_mult": 2, "initializer_range": 0.1, **changes,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64, "image_size": 28,
        "projection_intermediate_size": 16,
    }  # fmt: skip
    ids = {name: 90 + i for i, name in enumerate(("image_token_id", "video_token_id", "image_start_token_id"))}
    ends = {"image_end_token_id": 93, "video_start_token_id": 94, "video_end_token_id": 95}
    config = module.Glm5NextConfig(text_config=text, vision_config=vision, **ids, **ends)
    return module.Glm5NextForConditionalGeneration(config)


def bailing_hybrid(module, **changes):
    """Return layers of KDA with a bounded gate, and MLA with positions in every third."""
    sizes = {
        **SIZES, **LATENTS, **EXPERTS, "num_hidden_layers": 4, "layer_group_size": 3, "qk_rope_head_dim": 8,
        "head_dim": 16, "num_local_experts": 4, "first_k_dense_replace": 1, "initializer_range": 0.1,
        "num_mtp_layers": 0,
    }  # fmt: skip
    return module.BailingHybridForCausalLM(module.BailingHybridConfig(**sizes | changes))


MAKE = {"kimi_linear": kimi_linear, "glm5_next": glm5_next, "bailing_hybrid": bailing_hybrid}


def random(family: str, module, seed: int = 0, **changes):
    """Return a random model of a family, in float32, to be evaluated."""
    torch.manual_seed(seed)
    return MAKE[family](module, **changes).eval()


def ids_of(B: int, T: int, seed: int = 0) -> torch.Tensor:
    """Return ids [B, T] that are no special ones."""
    return torch.randint(3, 90, (B, T), generator=torch.Generator().manual_seed(seed))
