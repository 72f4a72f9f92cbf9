"""The definition and transformers' Kimi Linear, written apart, have the same logits from the same checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kda_spec import Settings, forward, settings_of

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
torch = pytest.importorskip("torch")

RELATIVE = 1e-5
"""Of |logits|: transformers computes in float32. Seen: 2.0e-6 at most."""

VARIANTS = {
    "released": {},
    "groups of experts": {"num_expert_group": 4, "topk_group": 2},
    "raw scores as weights": {"moe_renormalize": False, "num_shared_experts": 2},
    "queries through a latent": {"q_lora_rank": 7},
    "experts in every layer": {"first_k_dense_replace": 0},
    "MLA alone": {"linear_attn_config": {"kda_layers": [], "full_attn_layers": [1, 2, 3, 4, 5]}},
}


@pytest.fixture
def both(tiny, theirs, tmp_path):
    """Return the definition's logits, and transformers' logits and its cache, of a text and a tiny variant."""
    from safetensors.numpy import save_file

    def load(variant: str):
        change = VARIANTS[variant]
        linear = tiny.config["linear_attn_config"] | change.get("linear_attn_config", {})
        config = tiny.config | change | {"linear_attn_config": linear}
        settings = settings_of(config)
        tensors = tiny.tensors(settings)
        save_file(
            {name: x.astype(np.float32) for name, x in tensors.items()},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        config |= {"model_type": "kimi_linear", "architectures": ["KimiLinearForCausalLM"]}
        config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model, report = theirs.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        return lambda ids, change=lambda x: x: forward(ids, tensors, change(settings)), model.eval()

    return load


def ids_of(B: int, T: int) -> np.ndarray:
    return np.random.default_rng(11).integers(61, size=(B, T))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_prompt_are_those_of_transformers(variant, both, cases):
    ours, model = both(variant)
    ids = ids_of(2, 70)  # more than one of its chunks of 64
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    assert cases.relative(logits, ours(ids).logits) < RELATIVE


def test_logits_of_decoded_tokens_are_those_of_transformers(both, cases):
    ours, model = both("released")
    ids, prompt = ids_of(1, 75), 11
    expected = ours(ids).logits
    with torch.no_grad():
        out = model(torch.as_tensor(ids[:, :prompt]), use_cache=True)
        parts = [out.logits]
        for t in range(prompt, 75):
            out = model(torch.as_tensor(ids[:, t : t + 1]), past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert cases.relative(torch.cat(parts, dim=1).numpy(), expected) < RELATIVE


def with_layer(settings: Settings, layer: str, **change) -> Settings:
    return replace(settings, **{layer: replace(getattr(settings, layer), **change)})


TRAPS = {
    "kv_a_layernorm with the eps of the other norms": lambda s: with_layer(s, "mla", latent_eps=1e-5),
    "weights with the bias that is for the choice": lambda s: with_layer(s, "moe", biased_weights=True),
    "beta doubled": lambda s: with_layer(s, "kda", allow_neg_eigval=True),
    "a lower bound": lambda s: with_layer(s, "kda", lower_bound=-5.0),
    "eps of the norms": lambda s: replace(with_layer(s, "kda", eps=1e-6), eps=1e-6),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_model_that_differs_in_one_setting_is_told_apart(trap, both, cases):
    ours, model = both("released")
    ids = ids_of(1, 9)
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    assert cases.relative(logits, ours(ids, TRAPS[trap]).logits) > RELATIVE
    assert cases.relative(logits, ours(ids).logits) < RELATIVE
