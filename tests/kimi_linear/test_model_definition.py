"""The model in float64 is the definition, for every kind of layer, with every trap set either way."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kda_spec import forward, settings_of, tensor_shapes
from kimi_linear import KimiLinear, preset, write_random
from kimi_linear.layout import stored

TINY = replace(preset("tiny"), hidden_size=32, vocab_size=60, kda_head_dim=8, intermediate_size=40, kv_lora_rank=6)
VARIANTS = {
    "hybrid": TINY,
    "mla": replace(TINY, layers=("mla", "mla")),
    "a decay per head": replace(TINY, gate="head"),
    "K3": replace(TINY, lower_bound=-5.0, full_rank_gate=True),
    "Ling-3.0": replace(TINY, lower_bound=-5.0, full_rank_gate=True, full_rank_forget=True),
    "GLM-5.3": replace(TINY, lower_bound=-5.0, first_layer=0),
    "groups": replace(TINY, expert_groups=4, top_groups=2, renormalize=False),
    "shared experts": replace(TINY, shared_experts=2, dense_layers=2),
    "no shared experts": replace(TINY, shared_experts=0, dense_layers=0, conv_size=2),
    "queries through a latent": replace(TINY, q_lora_rank=7, latent_norm_eps=1e-4),
    "eps of engines": replace(TINY, latent_norm_eps=1e-5),
    "the remote code's router": replace(TINY, biased_router_weights=True),
}
SAME = 1e-12
"""Both compute in float64, from A_log and dt_bias in float32."""


def definition(folder, ids: torch.Tensor) -> torch.Tensor:
    """Return the definition's logits [B, T, vocab] of a checkpoint."""
    settings = settings_of(json.loads((folder / "config.json").read_text()))
    tensors = {name: x.double().numpy() for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    return torch.from_numpy(forward(ids.numpy(), tensors, settings).logits)


def logits(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the model's logits [B, T, vocab] of a prompt and of decoded tokens."""
    cache = model.cache(len(ids), ids.shape[1])
    read = torch.stack(model.prefill(ids[:, :prompt], cache, logits="all"))
    steps = [model.decode(ids[:, t], cache) for t in range(prompt, ids.shape[1])]
    return torch.cat((read, torch.stack(steps, 1)), 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_definitions(tmp_path, ids, differs, name):
    write_random(VARIANTS[name], tmp_path, seed=2, dtype=torch.float64)
    ids = ids(2, 24) % 60
    assert differs(logits(KimiLinear.from_pretrained(tmp_path), ids, 17), definition(tmp_path, ids)) < SAME


@pytest.mark.parametrize("changes", [{"latent_norm_eps": 1e-5}, {"biased_router_weights": True}, {"lower_bound": -5.0}])
def test_a_trap_set_the_other_way_is_another_model(tmp_path, ids, differs, changes):
    write_random(TINY, tmp_path, seed=2, dtype=torch.float64)
    ids, model = ids(1, 9) % 60, KimiLinear.from_pretrained(tmp_path, config=replace(TINY, **changes))
    assert differs(logits(model, ids, 8), definition(tmp_path, ids)) > 1e-7


@pytest.mark.parametrize("name", VARIANTS)
def test_the_checkpoint_is_the_definitions(name):
    config = VARIANTS[name]
    assert {each.name: each.shape for each in stored(config)} == tensor_shapes(settings_of(config.to_json()))
