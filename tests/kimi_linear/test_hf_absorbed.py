"""Steps of transformers' MLA over the latents: the same logits and tokens, and no key of the past is made."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
torch = pytest.importorskip("torch")
import hf_models  # noqa: E402
from hf_models import ids_of  # noqa: E402

from kimi_linear import hf  # noqa: E402

RELATIVE = 1e-5
pytestmark = pytest.mark.usefixtures("enabled_by_none")
VARIANTS = {
    "sdpa": {},
    "eager": {"attn_implementation": "eager"},
    "queries through a latent": {"q_lora_rank": 24},
    "no shared part": {"qk_rope_head_dim": 0},
    "values of another width": {"v_head_dim": 24},
}


@pytest.fixture
def model(modules):
    def model(attn_implementation="sdpa", **changes):
        model = hf_models.random("kimi_linear", modules["kimi_linear"], **changes)
        model.set_attn_implementation(attn_implementation)
        return model

    return model


@pytest.fixture
def expanded(modules, monkeypatch):
    """Return the numbers of tokens that were expanded, call by call."""
    lengths, mla = [], modules["kimi_linear"].KimiLinearAttention
    expand = mla.expand_kv

    def counted(self, latents, keys):
        lengths.append(latents.shape[2])
        return expand(self, latents, keys)

    monkeypatch.setattr(mla, "expand_kv", counted)
    return lengths


def padded():
    ids = ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids * mask, mask


def stepped(model, steps=3, **keywords):
    """Return logits [2, .., vocab] of a padded prompt and of tokens after it, one by one, and the last output."""
    ids, mask = padded()
    more = ids_of(2, steps, seed=1)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True, **keywords)
        found = [out.logits]
        for t in range(steps):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
            past = out.past_key_values
            out = model(more[:, t : t + 1], attention_mask=mask, past_key_values=past, **keywords)
            found.append(out.logits)
    return torch.cat(found, 1), out


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_expand_nothing_and_have_the_same_logits(model, expanded, differs, variant):
    theirs = model(**VARIANTS[variant])
    expected, _ = stepped(theirs)
    with hf.enable():
        expected_too, _ = stepped(theirs)
    expanded.clear()
    with hf.enable(absorbed_mla=True):
        found, _ = stepped(theirs)
    assert expanded == [20]  # the prompt, in the one layer of MLA
    _, mask = padded()
    seen = torch.cat((mask, torch.ones(2, 3)), 1).bool()
    assert differs(found[seen], expected[seen]) < RELATIVE
    assert differs(found[seen], expected_too[seen]) < RELATIVE


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_returns_the_same_tokens(model, expanded, cache):
    theirs, (ids, mask), found = model(), padded(), []
    for absorbed in (False, True):
        with hf.enable(absorbed_mla=absorbed):
            expanded.clear()
            asked = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "disable_compile": True}
            found.append(theirs.generate(ids, attention_mask=mask, cache_implementation=cache, **asked).tolist())
            assert len(expanded) == (1 if absorbed else 10)
    assert found[1] == found[0]


def test_the_weights_of_eager_attention_are_returned(model, differs):
    theirs = model("eager")
    _, expected = stepped(theirs, output_attentions=True)
    with hf.enable(absorbed_mla=True):
        _, found = stepped(theirs, output_attentions=True)
    assert found.attentions[-1].shape == (2, 4, 1, 23)
    assert differs(found.attentions[-1], expected.attentions[-1]) < RELATIVE


def test_a_step_in_bfloat16_is_as_near_to_float32_as_the_expanded_one(model, differs):
    exact, _ = stepped(model())
    narrow, found = model().to(torch.bfloat16), []
    for absorbed in (False, True):
        with hf.enable(absorbed_mla=absorbed):
            found.append(differs(stepped(narrow)[0][:, -3:], exact[:, -3:]))
    assert found[1] < 1.2 * found[0]


def test_a_compiled_step_has_the_same_logits(model, differs):
    theirs = model(num_hidden_layers=1, layer_types=["full_attention"], mlp_layer_types=["dense"])
    with hf.enable(absorbed_mla=True):
        expected, _ = stepped(theirs, steps=1)
        compiled = torch.compile(theirs, backend="aot_eager")
        assert differs(stepped(compiled, steps=1)[0], expected) < RELATIVE


class Adapted(torch.nn.Linear):
    """A linear layer that does something else with its weight, as adapters do."""

    def forward(self, x):
        return 2 * super().forward(x)


def adapt(mla):
    mla.kv_b_proj.__class__ = Adapted


def drop(mla):
    mla.train().attention_dropout = 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapt, "kv_b_proj is a Adapted: its weights cannot be moved to the other side"),
        (drop, "the layer is training with dropout"),
    ],
)
def test_what_cannot_be_absorbed_goes_on_as_it_was_and_says_why(model, expanded, differs, change, reason):
    theirs = model()
    change(theirs.model.layers[4].self_attn)
    torch.manual_seed(0)
    expected, _ = stepped(theirs)
    expanded.clear()
    with hf.enable(absorbed_mla=True):
        torch.manual_seed(0)
        found, _ = stepped(theirs)
        [told] = [
            run.source for run in hf.describe(theirs) if run.layer.endswith("4.self_attn") and run.phase == "decode"
        ]
    assert expanded == [20, 21, 22, 23] and told == reason
    assert differs(found[:, -3:], expected[:, -3:]) < RELATIVE


def test_describe_tells_which_layers_absorb(model):
    theirs = model()
    with hf.enable(absorbed_mla=True):
        assert [run.implementation for run in hf.describe(theirs)][-2:] == ["transformers", "absorbed"]
    with hf.enable():
        assert hf.describe(theirs)[-1].source == "absorbed_mla is not enabled"
