"""Compiled blocks and steps: one compilation whatever the call, the claims kept bit for bit, any number of threads."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from impls import (
    ChunkTorchConfig,
    RecurrentTorchConfig,
    chunk_backward_torch,
    chunk_torch,
    compiler_cpu,
    fetch_torch,
    kda,
    recurrent_torch,
)
from impls.choice import chunk_torch_launch, recurrent_torch_launch
from impls.compiler_cpu import Compiled, compiled

K, V = 16, 32
COMPILED = {
    "chunk_torch": ChunkTorchConfig(chunk_size=16, block_tokens=32, heads=4, compile=True),
    "recurrent_torch": RecurrentTorchConfig(compile=True),
}
UNCOMPILED = {
    "chunk_torch": ChunkTorchConfig(chunk_size=16, block_tokens=32, heads=4),
    "recurrent_torch": RecurrentTorchConfig(),
}
CACHES = {"chunk_torch": chunk_torch._compiled, "recurrent_torch": recurrent_torch._compiled_steps}
NAMES = list(COMPILED)
# B, T, H, HV: fewer and more pairs than a block has lanes, ragged chunks, one token.
SHAPES = [(1, 37, 2, 2), (3, 70, 1, 2), (2, 1, 1, 5), (1, 33, 7, 7), (5, 16, 1, 1)]


def run(name, inputs, configs=COMPILED, **keywords):
    return kda(*inputs, implementation=name, config=configs[name], output_final_state=True, **keywords)


def assert_same(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_compiled_and_uncompiled_agree_within_rounding(draw, draw_state, name, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = {torch.float64: 1e-14, torch.float32: 4e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for B, T, H, HV in SHAPES:
        inputs, S0 = draw(B, T, H, HV, K, V, dtype, resets=True), draw_state(B, HV, K, V, wide)
        found, expected = (run(name, inputs, which, initial_state=S0) for which in (COMPILED, UNCOMPILED))
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype and (x - y).abs().max() <= bound * y.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_again_for_another_call(draw, draw_state, monkeypatch, name):
    run(name, [x.requires_grad_() for x in draw(*SHAPES[0], K, V)])[0].sum().backward()
    run(name, draw(*SHAPES[0], K, V), use_qk_l2norm_in_kernel=True)
    compiled = CACHES[name].cache_info().misses
    for module in (chunk_torch, chunk_backward_torch, fetch_torch, recurrent_torch):
        monkeypatch.setattr(module, "compiled", None)
    for B, T, H, HV in SHAPES:
        inputs, packing = draw(B, T, H, HV, K, V), torch.tensor([0, T // 2, T])
        run(name, inputs, initial_state=draw_state(B, HV, K, V))
        run(name, [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs])
        run(name, [x[:1] for x in inputs], cu_seqlens=packing, use_qk_l2norm_in_kernel=True)
        run(name, [x.clone().requires_grad_() for x in inputs])[0].sum().backward()
        with torch.inference_mode():
            run(name, inputs, scale=0.3)
    assert CACHES[name].cache_info().misses == compiled


@pytest.mark.parametrize("name", NAMES)
def test_a_sequences_bits_depend_on_nothing_but_its_own_past(draw, draw_state, name, threads):
    for B, T, H, HV in SHAPES:
        inputs, S0 = draw(B, T, H, HV, K, V, resets=True), draw_state(B, HV, K, V)
        o, S = run(name, inputs, initial_state=S0)
        assert_same(run(name, inputs, initial_state=S0), (o, S))
        alone = run(name, [x[-1:] for x in inputs], initial_state=S0[-1:])
        assert_same(alone, (o[-1:], S[-1:]))
        packed, bounds = [x.flatten(0, 1).unsqueeze(0) for x in inputs], torch.arange(B + 1) * T
        assert_same(run(name, packed, initial_state=S0, cu_seqlens=bounds), (o.flatten(0, 1).unsqueeze(0), S))
        t, other = T // 2, draw(B, T, H, HV, K, V, seed=7)
        assert torch.equal(run(name, [x[:, :t] for x in inputs], initial_state=S0)[0], o[:, :t])
        changed = [torch.cat([x[:, :t], y[:, t:]], 1) for x, y in zip(inputs, other, strict=True)]
        assert torch.equal(run(name, changed, initial_state=S0)[0][:, :t], o[:, :t])
        strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
        assert_same(run(name, strided, initial_state=S0.mT.contiguous().mT), (o, S))


@pytest.mark.parametrize("which", [COMPILED, UNCOMPILED], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_first_gate_that_is_not_a_number_shows_though_it_decays_only_zeros(draw, name, which):
    inputs = draw(2, 37, 2, 2, K, V)
    before, _ = run(name, inputs, which)
    inputs[3][1, 0, 0, 3] = torch.nan
    o, S = run(name, inputs, which)
    assert o[1, :, 0].isnan().all() and S[1, 0].isnan().all()
    assert torch.equal(o[:, :, 1], before[:, :, 1]) and torch.equal(o[0], before[0])


@pytest.mark.parametrize("which", [COMPILED, UNCOMPILED], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_number_beyond_rounding(draw, name, which):
    inputs, before, found = draw(2, 70, 3, 3, K, V, resets=True), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(name, inputs, which))
    finally:
        torch.set_num_threads(before)
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()


@pytest.mark.parametrize("normed", [False, True])
def test_a_compiled_step_cut_anywhere_is_bit_equal(draw, draw_state, normed):
    """Norms and the scale come into prefill as into a decode step, whose lengths divide sums."""
    asked = {"use_qk_l2norm_in_kernel": normed, "scale": 0.3}
    inputs, S0 = draw(2, 9, 3, 3, K, V, resets=True), draw_state(2, 3, K, V)
    o, S = run("recurrent_torch", inputs, initial_state=S0, **asked)
    for t in (1, 4, 8):
        first, between = run("recurrent_torch", [x[:, :t] for x in inputs], initial_state=S0, **asked)
        second, last = run("recurrent_torch", [x[:, t:] for x in inputs], initial_state=between, **asked)
        assert_same((torch.cat([first, second], 1), last), (o, S))


def test_neighbours_content_does_not_matter_not_even_nan(draw, draw_state):
    for name in NAMES:
        inputs, S0 = draw(3, 37, 1, 2, K, V), draw_state(3, 2, K, V)
        o, S = run(name, inputs, initial_state=S0)
        poisoned = [x.clone() for x in inputs]
        for x in poisoned:
            x[1] = torch.nan
        found_o, found_S = run(name, poisoned, initial_state=S0)
        assert_same((found_o[[0, 2]], found_S[[0, 2]]), (o[[0, 2]], S[[0, 2]]))


@pytest.mark.parametrize("HV", [1, 6])
def test_long_short_and_empty_sequences_share_blocks(draw, draw_state, HV):
    bounds = torch.tensor([0, 0, 1, 50, 50, 53, 90, 123, 124])
    inputs, S0 = draw(1, 124, 1, HV, K, V, resets=True), draw_state(8, HV, K, V)
    S0[0, 0, 0, :2] = torch.tensor([torch.inf, -0.0])  # of an empty sequence: null tokens would change both
    for configs in (COMPILED, UNCOMPILED):
        o, S = run("chunk_torch", inputs, configs, cu_seqlens=bounds, initial_state=S0)
        for n, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
            alone = run("chunk_torch", [x[:, first:last] for x in inputs], configs, initial_state=S0[n : n + 1])
            assert_same(alone, (o[:, first:last], S[n : n + 1]))
        assert torch.equal(S[[0, 3]], S0[[0, 3]]) and torch.equal(S[0].signbit(), S0[0].signbit())


def test_steps_of_many_states_are_taken_in_parts_with_the_same_bits(draw, draw_state):
    inputs, S0 = draw(1, 1, 37, 37, 128, 24), draw_state(1, 37, 128, 24, torch.bfloat16)
    o, S = run("recurrent_torch", inputs, initial_state=S0)
    expected, _ = run("recurrent_torch", inputs, UNCOMPILED, initial_state=S0)
    assert (o - expected).abs().max() <= 4e-6 * expected.abs().max()
    for heads in (slice(0, 32), slice(30, 35), slice(36, 37)):
        alone = run("recurrent_torch", [x[:, :, heads] for x in inputs], initial_state=S0[:, heads])
        assert_same(alone, (o[:, :, heads], S[:, heads]))


def test_what_compiles_runs_on_a_cpu_only(monkeypatch):
    monkeypatch.setenv("KDA_COMPILE", "1")
    choices = {"chunk_torch": chunk_torch_launch, "recurrent_torch": recurrent_torch_launch}
    for name, choose in choices.items():
        assert choose(None, None, "cpu")[-1] == 1 and choose(None, None, "cuda")[-1] == -1
        with pytest.raises(ValueError, match="config.compile must be False on cuda"):
            choose(COMPILED[name], None, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_first_in_inference_mode_is_the_same(draw, draw_state, name):
    inputs, S0 = draw(1, 37, 2, 2, K, V), draw_state(1, 2, K, V)
    expected = run(name, inputs, initial_state=S0)
    for cache in (CACHES[name], fetch_torch._compiled):  # what is fetched is found by strides alone
        cache.cache_clear()
    with torch.inference_mode():
        assert_same(run(name, inputs, initial_state=S0), expected)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_may_come_out_of_a_compiled_graph(draw, name, trains):
    """AOTAutograd watches the first run of a graph in a mode in which nothing can be traced."""

    def results(call, inputs):
        leaves = [x.clone().requires_grad_(trains) for x in inputs]
        found = call(leaves)
        return [*found, *torch.autograd.grad(sum(x.sum() for x in found), leaves)] if trains else found

    inputs = draw(1, 37, 2, 2, K, V)
    expected = results(partial(run, name), inputs)
    for cache in (CACHES[name], fetch_torch._compiled, chunk_backward_torch._compiled):
        cache.cache_clear()
    assert_same(results(torch.compile(partial(run, name), backend="aot_eager"), inputs), expected)


def test_threads_that_call_first_wait_for_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.linspace(-1, 1, 64)
    functions = [compiled(lambda x, n=n: (x * n + n,), [x]) for n in (3, 5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: functions[i % 2](x)[0], range(8)))
    assert_same(found, [x * n + n for n in (3, 5)] * 4)


def matrices(n: int) -> tuple[torch.Tensor, ...]:
    """Return n batches of four matrices."""
    return torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(n)).unbind()


def turned_and_squared(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what takes a view of its argument and products of the library."""
    turned = x.mT.contiguous()
    return torch.bmm(torch.bmm(x, turned) + 1, x), turned


def test_with_memory_a_function_gives_the_same_in_the_same_place():
    x, y = matrices(2)
    plain = compiled(turned_and_squared, [x])
    function = plain.with_memory()
    first = function(x)
    places = [found.data_ptr() for found in first]
    assert_same(first, plain(x))
    for argument in (y, x):
        found = function(argument)
        assert_same(found, plain(argument))
        assert [found.data_ptr() for found in found] == places
    another = plain.with_memory()(y)
    assert_same(function(x), plain(x))
    assert_same(another, plain(y))


def test_the_memory_of_a_function_ends_with_it():
    [x] = matrices(1)
    function = compiled(turned_and_squared, [x]).with_memory()
    held = weakref.ref(function(x)[0])
    assert held() is not None
    gc.disable()
    try:
        del function
        assert held() is None
    finally:
        gc.enable()


def test_a_call_in_the_middle_of_another_has_memory_of_its_own():
    """As of a signal's handler: here, of what the first call asks for a tensor."""
    x, y = matrices(2)
    plain = compiled(turned_and_squared, [x])
    function, inner = plain.with_memory(), []

    class Interrupted(type(function.kept)):
        def again(self, *arguments):
            made = super().again(*arguments)
            if len(inner) < 3:
                inner.append(None)
                inner[-1] = function(y)
            return made

    function.kept = Interrupted()
    assert_same(function(x), plain(x))
    assert len(inner) == 3
    for found in inner:
        assert_same(found, plain(y))
    assert_same(function(y), plain(y))


def test_with_memory_an_argument_may_come_with_other_memory():
    x, y, other = matrices(3)
    plain = compiled(lambda x, y: (torch.bmm(x.mT, y),), [x, y])
    function = plain.with_memory()
    assert_same(function(x, y), plain(x, y))
    x.data = other
    assert_same(function(x, y), plain(other, y))


def test_every_thread_has_memory_of_its_own(monkeypatch):
    x, out, made = torch.linspace(-1, 1, 64), torch.empty(64), []
    function = compiled(lambda x, out: [out.copy_(2 * x), None][1], [x, out]).in_threads()
    with_memory = Compiled.with_memory
    monkeypatch.setattr(Compiled, "with_memory", lambda self: made.append(with_memory(self)) or made[-1])
    for threads in (1, 2):
        with ThreadPoolExecutor(1) as thread:
            for _ in range(2):
                thread.submit(function, x, out.zero_()).result()
                assert torch.equal(out, 2 * x)
        assert len(made) == threads


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_waits_for_no_other_compilation(draw, draw_state, name):
    inputs, S0 = draw(1, 1, 2, 2, K, V), draw_state(1, 2, K, V)
    expected = run(name, inputs, initial_state=S0)
    with compiler_cpu._compiling, ThreadPoolExecutor(1) as another:  # as who compiles holds it
        found = another.submit(run, name, inputs, initial_state=S0)
        try:
            assert_same(found.result(60), expected)
        except TimeoutError:
            compiler_cpu._compiling.release()  # or the other thread would never end
            raise


def test_the_parts_of_slots_are_taken_once(draw, monkeypatch):
    taken, split = [], chunk_torch._Walk.split
    monkeypatch.setattr(chunk_torch._Walk, "split", lambda *them: taken.append(split(*them)) or taken[-1])
    run("chunk_torch", draw(1, 200, 2, 2, K, V))
    assert len(taken) > 3 and all(x is taken[0] for x in taken)


def test_compiling_leaves_the_threads_of_others_alone():
    """torch.set_num_threads sets a thread's own number and the process's, which threads to come begin with."""
    x, before = torch.ones(64), torch.get_num_threads()
    with ThreadPoolExecutor(1) as another:
        another.submit(torch.set_num_threads, before + 1).result()
    try:
        assert torch.equal(compiled(lambda x: (x * 9 + 1,), [x])(x)[0], 9 * x + 1)
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_is_compiled_for_other_vectors_is_not_taken_out_of_the_cache(monkeypatch, tmp_path):
    """A processor with AVX-512 and one without may share a folder: code for the one gave the other half of the sums."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.ones(64)
    for capability, finds in (("avx2", 0), ("avx2", 1), ("default", 0)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        counters.clear()
        assert torch.equal(compiled(lambda x: (x * 3 + 1,), [x])(x)[0], 3 * x + 1)
        assert counters["inductor"]["fxgraph_cache_hit"] == finds


def test_what_the_compiler_refuses_fails_at_every_call(monkeypatch, tmp_path):
    from torch._inductor import codecache

    def refused(*_):
        raise RuntimeError("refused")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "_worker_compile_cpp", refused)
    x = torch.ones(64)
    function = compiled(lambda x: (x * 7 + 1,), [x])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused"):
            function(x)
