"""The same checkpoint in transformers' Kimi Linear: equal logits over a prompt and 64 decoded tokens, equal choices."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from kimi_linear import KimiLinear, preset, write_random  # noqa: E402

RELATIVE = 1e-5
"""Of |logits|, both in float32. Seen: 5e-6 at most."""
PROMPT, DECODED = 70, 64  # more than one of its chunks of 64

TINY = preset("tiny")
VARIANTS = {
    "hybrid": TINY,
    "mla": preset("tiny", baseline="mla"),
    "groups": replace(TINY, expert_groups=4, top_groups=2),
    "every layer with experts": replace(TINY, dense_layers=0, shared_experts=2),
    "queries through a latent": replace(TINY, q_lora_rank=24),
    "scores as weights": replace(TINY, renormalize=False),
}
TRAPS = {
    "eps of the latent's norm": {"latent_norm_eps": 1e-5},
    "weights with the router's bias": {"biased_router_weights": True},
    "a lower bound": {"lower_bound": -5.0},
}


def both(theirs, config, folder):
    """Write a random checkpoint, with latents so small that the eps of their norm counts, and read it twice."""
    for path in write_random(config, folder, seed=5, dtype=torch.float32):
        tensors = load_file(path)
        for name, x in tensors.items():
            if "kv_a_proj_with_mqa" in name:
                x *= 0.05
        save_file(tensors, path, metadata={"format": "pt"})
    model, report = theirs.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return KimiLinear.from_pretrained(folder), model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(theirs, tmp_path, ids, differs, variant):
    ours, model = both(theirs, VARIANTS[variant], tmp_path)
    ids, cache = ids(2, PROMPT), ours.cache(2, PROMPT + DECODED)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        assert differs(torch.stack(ours.prefill(ids, cache, logits="all")), out.logits) < RELATIVE
        for _ in range(DECODED):
            chosen = out.logits[:, -1].argmax(-1)
            out = model(chosen[:, None], past_key_values=out.past_key_values, use_cache=True)
            assert differs(ours.decode(chosen, cache), out.logits[:, -1]) < RELATIVE


def test_what_transformers_saves_is_read(theirs, tmp_path, ids, differs):
    from transformers import KimiLinearConfig

    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=64, vocab_size=512, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2,
        linear_num_heads=2, linear_head_dim=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        intermediate_size=96, moe_intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    model = theirs(config).eval()
    model.save_pretrained(tmp_path)
    ours = KimiLinear.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids(2, PROMPT)).logits
    assert differs(torch.stack(ours.prefill(ids(2, PROMPT), ours.cache(2, PROMPT), logits="all")), expected) < RELATIVE


def test_greedy_ids_are_those_of_transformers(theirs, tmp_path, ids):
    ours, model = both(theirs, TINY, tmp_path)
    ids = ids(2, PROMPT)
    whole = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=DECODED,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours.generate(ids, max_new_tokens=DECODED, stop=()) == whole[:, PROMPT:].tolist()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_model_that_differs_in_one_setting_is_told_apart(theirs, tmp_path, ids, differs, trap):
    _, model = both(theirs, TINY, tmp_path)
    other = KimiLinear.from_pretrained(tmp_path, config=replace(TINY, **TRAPS[trap]))
    with torch.no_grad():
        expected = model(ids(1, 9)).logits[0]
    assert differs(other.prefill(ids(1, 9), other.cache(1, 9), logits="all")[0], expected) > 10 * RELATIVE
