"""What everybody owes bit for bit, and what the contracts claim beyond that, over many random cases."""

import random

import pytest
import torch

from impls import IMPLEMENTATIONS, ChunkTorchConfig, find, kda
from impls.checks import DTYPE_NAMES
from impls.configs import ChunkTritonConfig

NAMES = [implementation.name for implementation in IMPLEMENTATIONS]
CLAIMED = [(name, claim) for name in NAMES for claim in sorted(find(name).contract("float32").bitwise)]
# An interpreted program takes 3 ms a token, 18 ms a chunk: few trials, small ones, around the chunks of 16 tokens.
TRIALS = {"cpu": 40, "interpret": 3}
SIZES = {"cpu": (4, 90, 3, 3), "interpret": (2, 12, 2, 2), "interpret chunk": (2, 40, 2, 2)}
"""The largest B, T, H and HV / H."""


def cases(seed: int, name: str):
    """Yield dtype and shape (B, T, H, HV, K, V) of random cases for a row, most of them ragged."""
    rng, row = random.Random(seed), find(name)
    kind = "cpu" if "cpu" in row.devices else "interpret"
    dtypes = [x for x in (torch.float32, torch.float64, torch.bfloat16) if DTYPE_NAMES[x] in row.dtypes]
    most_B, most_T, most_H, most_group = SIZES.get(f"{kind} {row.form}", SIZES[kind])
    for _ in range(TRIALS[kind]):
        H = rng.randint(1, most_H)
        shape = (
            rng.randint(1, most_B),
            rng.randint(1, most_T),
            H,
            H * rng.randint(1, most_group),
            rng.randint(1, 40),
            rng.randint(1, 40),
        )
        yield rng, rng.choice(dtypes), shape


def both(name, inputs, **keywords):
    return kda(*inputs, implementation=name, output_final_state=True, **keywords)


def assert_same(results, expected):
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_the_future_does_not_reach_the_past(draw, name):
    for rng, dtype, shape in cases(1, name):
        inputs, other, t = draw(*shape, dtype, resets=True), draw(*shape, dtype, seed=7), rng.randrange(shape[1])
        changed = [torch.cat([x[:, :t], y[:, t:]], 1) for x, y in zip(inputs, other, strict=True)]
        assert torch.equal(both(name, inputs)[0][:, :t], both(name, changed)[0][:, :t])


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_content_does_not_matter_not_even_nan(draw, draw_state, name):
    for rng, dtype, shape in cases(2, name):
        B, _, H, HV, K, V = shape
        inputs, S0 = draw(*shape, dtype), draw_state(B, HV, K, V, torch.float32)
        b, h = rng.randrange(B), rng.randrange(H)
        group = slice(h * (HV // H), (h + 1) * (HV // H))
        o, S = both(name, inputs, initial_state=S0)
        alone = [torch.full_like(x, torch.nan) for x in inputs]
        for x, y, heads in zip(alone, inputs, (h, h, group, group, group), strict=True):
            x[b, :, heads] = y[b, :, heads]
        poisoned_o, poisoned_S = both(name, alone, initial_state=S0)
        assert_same((poisoned_o[b, :, group], poisoned_S[b, group]), (o[b, :, group], S[b, group]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [False, True])
def test_permuting_batches_and_heads_permutes_bits_with_and_without_activations(draw, name, flags):
    for rng, dtype, (B, T, _, HV, K, V) in cases(3, name):
        inputs, A_log = draw(B, T, HV, HV, K, V, dtype), torch.linspace(-1, 1, HV)
        order, heads = (torch.tensor(rng.sample(range(n), n)) for n in (B, HV))
        names = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
        on = dict.fromkeys(names, flags)
        o, S = both(name, inputs, A_log=A_log, **on)
        permuted = both(name, [x[order][:, :, heads] for x in inputs], A_log=A_log[heads], **on)
        assert_same(permuted, (o[order][:, :, heads], S[order][:, heads]))


@pytest.mark.parametrize("name", NAMES)
def test_signs_and_powers_of_two_pass_through(draw, draw_state, name):
    for _, dtype, shape in cases(4, name):
        B, _, _, HV, K, V = shape
        (q, k, v, g, beta), S0 = draw(*shape, dtype), draw_state(B, HV, K, V, torch.float32)
        o, S = both(name, (q, k, v, g, beta), initial_state=S0)
        sign = torch.where(torch.arange(K) % 3 == 0, -1, 1).to(dtype)
        flipped = both(name, (q * sign, k * sign, v, g, beta), initial_state=S0 * sign[:, None])
        assert_same(flipped, (o, S * sign[:, None]))
        assert_same(both(name, (-4 * q, -2 * k, -2 * v, g, beta / 4), initial_state=S0), (-4 * o, S))
        assert_same(both(name, (q, k, v / 8, g, beta), initial_state=S0 / 8), (o / 8, S / 8))


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_themselves(draw, name):
    for _, dtype, shape in cases(5, name):
        inputs = draw(*shape, dtype)
        assert_same(both(name, inputs), both(name, inputs))


def sequence_count(name, inputs, rng, S0, **config):
    B, T = inputs[0].shape[:2]
    o, S = both(name, inputs, initial_state=S0, **config)
    b = rng.randrange(B)
    alone = both(name, [x[b : b + 1] for x in inputs], initial_state=S0[b : b + 1], **config)
    assert_same(alone, (o[b : b + 1], S[b : b + 1]))
    packed = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
    bounds = torch.arange(B + 1) * T
    assert_same(both(name, packed, initial_state=S0, cu_seqlens=bounds, **config), (o.flatten(0, 1).unsqueeze(0), S))


def length(name, inputs, rng, S0, **config):
    t = rng.randrange(inputs[0].shape[1] + 1)
    o, _ = both(name, inputs, initial_state=S0, **config)
    assert torch.equal(both(name, [x[:, :t] for x in inputs], initial_state=S0, **config)[0], o[:, :t])


def layout(name, inputs, rng, S0):
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for other in (views, shifted, strided):
        assert_same(both(name, other, initial_state=S0.mT.contiguous().mT), both(name, inputs, initial_state=S0))
    expanded = [x[:, :1].expand_as(x) for x in inputs]
    assert_same(both(name, expanded), both(name, [x.contiguous() for x in expanded]))


def value_slices(name, inputs, rng, S0):
    q, k, v, g, beta = inputs
    o, S = both(name, inputs, initial_state=S0)
    some = slice(first := rng.randrange(v.shape[-1]), rng.randrange(first, v.shape[-1]) + 1)
    assert_same(both(name, (q, k, v[..., some], g, beta), initial_state=S0[..., some]), (o[..., some], S[..., some]))


def split(name, inputs, rng, S0):
    t = rng.randrange(inputs[0].shape[1] + 1)
    first, between = both(name, [x[:, :t] for x in inputs], initial_state=S0)
    second, S = both(name, [x[:, t:] for x in inputs], initial_state=between)
    assert_same((torch.cat([first, second], 1), S), both(name, inputs, initial_state=S0))


@pytest.mark.parametrize("name, claim", CLAIMED)
def test_claims_of_the_contracts_hold(draw, draw_state, name, claim):
    for rng, dtype, shape in cases(6, name):
        B, _, _, HV, K, V = shape
        state = torch.float64 if dtype == torch.float64 else torch.float32
        globals()[claim](name, draw(*shape, dtype, resets=True), rng, draw_state(B, HV, K, V, state))


def test_the_size_of_the_workspace_has_no_influence_on_the_bits(draw):
    for rng, dtype, shape in cases(7, "chunk_torch"):
        inputs, C = draw(*shape, dtype, resets=True), rng.choice([16, 32, 64])
        small = both("chunk_torch", inputs, config=ChunkTorchConfig(C, C * rng.randint(1, 3), rng.randint(1, 5)))
        assert_same(small, both("chunk_torch", inputs, config=ChunkTorchConfig(C)))


@pytest.mark.parametrize("C", [16, 32, 64, 128])
def test_a_chunk_form_cut_between_chunks_is_bit_equal(draw, C):
    inputs = draw(2, 2 * C + 5, 1, 2, 12, 7)
    o, S = both("chunk_torch", inputs, chunk_size=C)
    first, between = both("chunk_torch", [x[:, :C] for x in inputs], chunk_size=C)
    second, last = both("chunk_torch", [x[:, C:] for x in inputs], chunk_size=C, initial_state=between)
    assert_same((torch.cat([first, second], 1), last), (o, S))


@pytest.mark.parametrize("recompute", [False, True])
def test_with_one_segment_neither_neighbours_nor_what_follows_change_a_sequences_bits(draw, draw_state, recompute):
    """The claims sequence_count and length, which the rule that picks segments cannot make for the row's default."""
    config = ChunkTritonConfig(segments=1, recompute=recompute)
    for rng, dtype, shape in cases(8, "chunk_triton"):
        inputs, S0 = draw(*shape, dtype, resets=True), draw_state(shape[0], shape[3], *shape[4:])
        sequence_count("chunk_triton", inputs, rng, S0, config=config)
        length("chunk_triton", inputs, rng, S0, config=config)


@pytest.mark.parametrize("segments", [2, 3])
def test_segments_are_causal_and_repeat_themselves(draw, segments):
    inputs, other = draw(1, 50, 1, 2, 6, 5, resets=True), draw(1, 50, 1, 2, 6, 5, seed=7)
    config = ChunkTritonConfig(segments=segments)
    o, S = both("chunk_triton", inputs, config=config)
    assert_same(both("chunk_triton", inputs, config=config), (o, S))
    for t in (0, 7, 16, 33, 49):
        changed = [torch.cat([x[:, :t], y[:, t:]], 1) for x, y in zip(inputs, other, strict=True)]
        assert torch.equal(both("chunk_triton", changed, config=config)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("segments", [1, 2])
def test_nan_in_a_packed_sequence_reaches_no_other(draw, draw_state, segments):
    inputs, bounds, S0 = draw(1, 45, 1, 2, 6, 5), [0, 17, 36, 36, 45], draw_state(4, 2, 6, 5)
    asked = {"config": ChunkTritonConfig(segments=segments), "cu_seqlens": torch.tensor(bounds)}
    o, S = both("chunk_triton", inputs, initial_state=S0, **asked)
    poisoned, poisoned_S0 = [x.clone() for x in inputs], S0.clone()
    for x in poisoned:
        x[:, 17:36] = torch.nan
    poisoned_S0[1] = torch.nan
    found_o, found_S = both("chunk_triton", poisoned, initial_state=poisoned_S0, **asked)
    assert found_o[:, 17:36].isnan().all() and found_S[1].isnan().all()
    for first, last in ((0, 17), (36, 45)):
        assert torch.equal(found_o[:, first:last], o[:, first:last])
    assert torch.equal(found_S[[0, 2, 3]], S[[0, 2, 3]])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (row.name, dtype)
        for row in IMPLEMENTATIONS if row.backward
        for dtype in ("float32", "bfloat16", "float64") if dtype in row.dtypes
    ],
)  # fmt: skip
@pytest.mark.parametrize("bound", [None, -5.0])
def test_asking_for_a_gradient_changes_no_bit(draw, draw_state, name, dtype, bound):
    q, k, v, g, beta = draw(1, 150, 2, 4, 20, 5, getattr(torch, dtype))
    packing, S0 = torch.tensor([0, 1, 70, 150]), draw_state(3, 4, 5, 20)
    keywords = {
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "A_log": torch.linspace(-1, 1, 4), "dt_bias": torch.linspace(-2, 2, 80), "lower_bound": bound,
        "initial_state": S0, "state_v_first": True, "cu_seqlens": packing,
    }  # fmt: skip
    plain = both(name, (q, k, v, g, beta), **keywords)
    asked = both(name, (q, k, v.clone().requires_grad_(), g, beta), **keywords)
    assert asked[0].requires_grad and all(torch.equal(x, y) for x, y in zip(plain, asked, strict=True))
