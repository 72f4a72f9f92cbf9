"""A decoding step that takes a KDA layer in one call, as on a GPU, is the step that takes it in parts."""

from dataclasses import replace

import pytest
import torch

from impls import decode_layer
from impls.table import interpreting
from kimi_linear import layers, preset
from kimi_linear.initial import random_model

TINY = preset("tiny")
VARIANTS = {
    "hybrid": TINY,
    "gdn-hybrid": preset("tiny", baseline="gdn-hybrid"),
    "K3": replace(TINY, lower_bound=-5.0, full_rank_gate=True),
    "Ling-3.0": replace(TINY, lower_bound=-5.0, full_rank_gate=True, full_rank_forget=True),
}
DIFFERENCE = 1e-5
"""As between float32 and float64 of the whole model."""


@pytest.fixture
def in_one_call(monkeypatch):
    """Return a function: take layers by this implementation from now on, as if activations were on a GPU."""

    def switch(name: str) -> None:
        monkeypatch.setattr(layers, "in_one_call", lambda x: True)
        monkeypatch.setattr(
            layers, "decode_layer", lambda *given, **named: decode_layer(*given, implementation=name, **named)
        )

    return switch


def decoded(model, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    cache = model.cache(len(ids), ids.shape[1])
    model.prefill(ids[:, :5], cache)
    found = [model.decode(ids[:, t], cache) for t in range(5, ids.shape[1])]
    return torch.stack(found, 1), list(cache.live.tensors())


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_is_all_parts(variant, in_one_call, ids, differs):
    model = random_model(VARIANTS[variant], seed=3, dtype=torch.float32)
    expected, left = decoded(model, ids(2, 12))
    in_one_call("decode_torch")
    found, states = decoded(model, ids(2, 12))
    assert differs(found, expected) < DIFFERENCE
    for x, y in zip(states, left, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and differs(x, y) < DIFFERENCE
    again, same = decoded(model, ids(2, 12))
    assert torch.equal(again, found) and all(map(torch.equal, same, states))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_one_call_is_no_further_from_float64_than_parts(variant, in_one_call, differs):
    """By one layer: a whole model goes to other experts where a score is rounded otherwise."""
    config = VARIANTS[variant]
    exact, layer = (random_model(config, seed=3, dtype=x).layers[0].mixer for x in (torch.float64, torch.bfloat16))
    exact.load_state_dict({name: x.double() for name, x in layer.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    sizes = (8, config.hidden_size), (8, config.conv_size - 1, 3 * config.kda_dim)
    x, inputs = (torch.randn(*size, generator=generator).bfloat16() for size in sizes)
    S = torch.randn(8, config.kda_heads, config.kda_head_dim, config.kda_head_dim, generator=generator)
    expected, parts = exact.step(x.double(), inputs.double(), S.double()), layer.step(x, inputs, S)
    in_one_call("decode_torch")
    for found, usual, right in zip(layer.step(x, inputs, S), parts, expected, strict=True):
        assert found.dtype == usual.dtype
        assert differs(found, right) <= 1.02 * differs(usual, right)


@pytest.mark.skipif(not interpreting(), reason="on a CPU the kernel runs in Triton's interpreter")
def test_the_kernel_takes_a_layer_of_the_model(in_one_call, ids, differs):
    model = random_model(TINY, seed=3, dtype=torch.float32)
    expected, _ = decoded(model, ids(2, 7))
    in_one_call("decode_triton")
    assert differs(decoded(model, ids(2, 7))[0], expected) < DIFFERENCE


def test_a_step_that_is_interrupted_leaves_the_cache_as_it_was(in_one_call, ids, monkeypatch):
    """One call writes into nothing that the cache holds."""
    in_one_call("decode_torch")
    model = random_model(TINY, seed=3, dtype=torch.float32)
    cache = model.cache(2, 8)
    model.prefill(ids(2, 3), cache)
    before = [x.clone() for x in cache.live.tensors()]
    monkeypatch.setattr(model, "logits", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.decode([1, 2], cache)
    assert cache.lengths == (3, 3) and all(map(torch.equal, cache.live.tensors(), before))


@pytest.mark.slow
def test_the_step_compiles_whole(in_one_call, ids, differs):
    in_one_call("decode_torch")
    model = random_model(TINY, seed=3, dtype=torch.float32)
    expected, _ = decoded(model, ids(2, 7))
    model._step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    assert differs(decoded(model, ids(2, 7))[0], expected) < DIFFERENCE


def test_on_a_cpu_and_in_float64_parts_are_taken():
    assert not layers.in_one_call(torch.zeros(1))
    assert not layers.in_one_call(torch.zeros(1, dtype=torch.float64, device="meta"))
