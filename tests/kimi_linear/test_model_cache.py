"""The cache: its size is the definition's, its copies are its own, and what interrupts a step leaves it whole."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kda_spec import costs
from kda_spec.types import Sizes
from kimi_linear import Cache, CacheError, preset
from kimi_linear.filled import filled
from kimi_linear.initial import random_model

BFLOAT16, SINGLE = torch.bfloat16, torch.float32


def tensors(cache: Cache) -> list[torch.Tensor]:
    return [*cache.live.tensors(), *cache.latents]


def equal(a: Cache, b: Cache) -> bool:
    """Tell whether two caches hold the same tokens' states and latents."""
    pairs = [*zip(a.live.tensors(), b.live.tensors(), strict=True)]
    for row, length in enumerate(a.lengths):
        pairs += [(x[row, :length], y[row, :length]) for x, y in zip(a.latents, b.latents, strict=True)]
    return a.lengths == b.lengths and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [BFLOAT16, SINGLE])
@pytest.mark.parametrize("name", ["kimi-linear-48b-a3b", "tiny", "small-1b"])
@pytest.mark.parametrize("baseline", ["hybrid", "mla"])
def test_bytes_are_those_of_the_definition(name, baseline, dtype):
    config = preset(name, baseline=baseline)
    B, tokens, kind = 3, 40, str(dtype).removeprefix("torch.")
    H, K = config.kda_heads, config.kda_head_dim
    sizes = Sizes(B=B, T=1, H=H, HV=H, K=K, V=K, N=B)
    per_kda = costs.state_bytes(sizes) + costs.convolution_cache_bytes(B, 3 * H * K, config.conv_size, kind)
    per_token = costs.latent_cache_bytes_per_token(config.kv_lora_rank, config.qk_rope_head_dim, kind)
    expected = config.count("kda") * per_kda + config.count("mla") * per_token * B * tokens
    assert Cache(config, B, tokens, dtype=dtype).bytes() == expected


def test_the_released_model_keeps_what_its_report_says():
    config = preset("kimi-linear-48b-a3b")
    at = [Cache(config, 1, tokens, dtype=BFLOAT16).bytes() for tokens in (1, 2)]
    assert at[1] - at[0] == 8064  # of 31,104 with MLA alone
    assert at[0] == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2) + 8064


def test_a_fork_goes_its_own_way(model, ids, differs):
    cache = model.cache(2, 30)
    model.prefill(ids(2, 10), cache)
    before, fork = cache.fork(), cache.fork([1, 1, 0])
    a = model.decode([3, 4, 5], fork)
    assert fork.lengths == (11, 11, 11) and equal(cache, before)
    assert not torch.equal(a[0], a[1])
    assert differs(model.decode([5, 3], cache), a[[2, 0]]) < 1e-6


def test_a_cache_of_inference_mode_goes_on_outside(model):
    with torch.inference_mode():
        cache = model.cache(2, 20)
        model.prefill([[1, 2, 3], [4]], cache)
        cache = cache.fork()
        inside = model.decode([5, 6], cache.fork())
    assert torch.equal(model.decode([5, 6], cache), inside)


@pytest.mark.parametrize("rows", [[], [2], [-1]])
def test_a_fork_takes_rows_that_are_there(model, rows):
    with pytest.raises(IndexError, match="rows must be one or more of 0 to 1"):
        model.cache(2, 4).fork(rows)


def test_a_cache_is_truncated_to_a_boundary(model, ids, differs):
    ids, cache = ids(2, 50), model.cache(2, 60, boundary=16)
    model.prefill(ids, cache)
    assert cache.boundaries == ((16, 32, 48),) * 2
    cache.truncate(32)
    assert cache.lengths == (32, 32) and cache.boundaries == ((16, 32),) * 2
    fresh = model.cache(2, 60, boundary=16)
    model.prefill(ids[:, :32], fresh)
    assert equal(cache, fresh)
    assert torch.equal(model.prefill(ids[:, 32:], cache), model.prefill(ids[:, 32:], fresh))


def test_boundaries_are_kept_while_decoding(model, ids):
    ids, cache = ids(1, 12), model.cache(1, 12, boundary=4)
    for t in range(12):
        model.prefill(ids[:, :1], cache) if t == 0 else model.decode(ids[:, t], cache)
    assert cache.boundaries == ((4, 8, 12),)
    cache.truncate(8)
    fresh = model.cache(1, 12, boundary=4)
    for t in range(8):
        model.prefill(ids[:, :1], fresh) if t == 0 else model.decode(ids[:, t], fresh)
    assert equal(cache, fresh)
    assert cache.kept_bytes() == 2 * sum(x.nbytes for x in cache.live.tensors())


def test_unequal_sequences_are_truncated_together():
    model = random_model(preset("tiny"), dtype=torch.float64)  # in float32 products of other sizes differ by 1e-5
    cache = model.cache(2, 40, boundary=8)
    model.prefill([list(range(9)), list(range(30))], cache)
    cache.truncate(8)
    alone = model.cache(1, 40, boundary=8)
    model.prefill([list(range(8))], alone)
    assert cache.lengths == (8, 8)
    assert all(
        torch.allclose(x[:1], y, rtol=1e-10) for x, y in zip(cache.live.tensors(), alone.live.tensors(), strict=True)
    )
    cache.truncate(0)
    assert cache.lengths == (0, 0) and not any(x.any() for x in cache.live.tensors())


def test_latents_alone_are_truncated_anywhere(ids):
    model = random_model(preset("tiny", baseline="mla"), dtype=torch.float64)
    cache, fresh = model.cache(2, 20), model.cache(2, 20)
    model.prefill(ids(2, 12), cache)
    cache.truncate(7)
    model.prefill(ids(2, 12)[:, :7], fresh)
    assert cache.lengths == (7, 7)
    assert torch.allclose(model.decode([1, 2], cache), model.decode([1, 2], fresh), rtol=1e-12)
    with pytest.raises(CacheError, match="not to 9"):
        cache.truncate(9)


@pytest.mark.parametrize(("length", "boundary"), [(7, 8), (24, 8), (-1, 8), (8, None), (11, None)])
def test_a_length_without_states_is_refused(model, length, boundary):
    cache = model.cache(1, 40, boundary=boundary)
    model.prefill([list(range(20))], cache)
    before = cache.fork()
    with pytest.raises(CacheError, match=f"can be truncated to 0, .*not to {length}"):
        cache.truncate(length)
    assert equal(cache, before)


@pytest.mark.parametrize("asked", [{"batch": 0}, {"capacity": 0}, {"boundary": 0}])
def test_sizes_that_hold_nothing_are_refused(model, asked):
    with pytest.raises(CacheError, match="must be at least 1"):
        model.cache(**asked)


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT16])
def test_a_file_holds_a_cache(tmp_path, ids, dtype):
    model = random_model(preset("tiny"), dtype=dtype)
    cache = model.cache(2, 40, boundary=8)
    model.prefill([list(range(5)), list(range(20))], cache)
    cache.save(tmp_path / "a.safetensors")
    read = Cache.load(tmp_path / "a.safetensors", model.config)
    assert equal(read, cache) and read.boundaries == cache.boundaries
    assert torch.equal(model.decode([1, 2], read), model.decode([1, 2], cache))
    read.truncate(0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_no_cache_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CacheError, match="written by Cache.save"):
        Cache.load(path, model.config)
    path.write_bytes(b"no cache")
    with pytest.raises(CacheError, match="written by Cache.save"):
        Cache.load(path, model.config)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CacheError, match="schema 1"):
        Cache.load(path, model.config)


def test_the_file_of_another_model_is_refused(model, tmp_path):
    cache = model.cache(1, 8)
    model.prefill([[1, 2, 3]], cache)
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match="kda_heads"):
        Cache.load(tmp_path / "a.safetensors", replace(model.config, kda_heads=2))


DAMAGE = {
    "a tensor less": (lambda x, about: x.pop("latents.0"), "latents.0 must be .* got nothing"),
    "another shape": (lambda x, about: x.update({"live.states.0": torch.zeros(1)}), "live.states.0 must be"),
    "another dtype": (
        lambda x, about: x.update({"live.inputs.1": x["live.inputs.1"].double()}),
        "live.inputs.1 must be",
    ),
    "a strange name": (lambda x, about: x.update({"kept.7.x": torch.zeros(1)}), "expected names kept"),
    "no lengths": (lambda x, about: about.pop("lengths"), "expected sizes of a cache"),
    "too long": (lambda x, about: about.update(lengths=[9]), "lengths must be from 0 to the capacity 8"),
    "no capacity": (lambda x, about: about.update(capacity=0), "expected sizes of a cache"),
    "a strange dtype": (lambda x, about: about.update(dtype="x"), "expected sizes of a cache"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(model, tmp_path, name):
    change, message = DAMAGE[name]
    path, cache = tmp_path / "a.safetensors", model.cache(1, 8)
    model.prefill([[1, 2, 3]], cache)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["kimi_linear.cache"])
    stored = load_file(path)
    change(stored, about)
    save_file(stored, path, metadata={"kimi_linear.cache": json.dumps(about)})
    with pytest.raises(CacheError, match=message):
        Cache.load(path, model.config)


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_who_interrupts_a_step_finds_the_cache_as_it_was(model, ids, monkeypatch, call):
    cache = model.cache(2, 40)
    model.prefill(ids(2, 10), cache)
    before = cache.fork()
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[-1].ffn, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            getattr(model, call)(ids(2, 1, seed=5), cache)
    assert equal(cache, before)
    assert torch.equal(model.decode([1, 2], cache), model.decode([1, 2], before))


def test_a_drawn_cache_goes_on_as_one_that_was_read(model):
    one, again = (filled(model, 5000, room=2, batch=2) for _ in range(2))
    assert one.lengths == (5000, 5000) and equal(one, again)
    assert all(x[:, :5000].abs().amin(-1).gt(0).all() and not x[:, 5000:].any() for x in one.latents)
    logits = model.decode([1, 2], one)
    assert logits.isfinite().all() and torch.equal(model.decode([1, 2], again), logits) and one.lengths == (5001, 5001)
