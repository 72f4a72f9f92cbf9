"""States go in, come out, and come out on the way: copies, in both layouts, equal to those of runs that were cut."""

import pytest
import torch

from impls import IMPLEMENTATIONS, chunk_kda, kda

NAMES = [implementation.name for implementation in IMPLEMENTATIONS]
INTERPRETED = {row.name for row in IMPLEMENTATIONS if "cpu" not in row.devices}
# Lengths and intervals: short ones where the interpreter takes 3 ms a token.
CUTS = [(0, 64), (64, 64), (200, 64), (200, 128), (100, 32)]
SHORT_CUTS = [(0, 64), (16, 16), (35, 16), (34, 32)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [0, 1, 20])
def test_inputs_stay_untouched_and_nothing_is_aliased(draw, draw_state, name, T):
    inputs = [*draw(2, T, 1, 2, 16, 16), draw_state(2, 2, 16, 16)]
    before = [x.clone() for x in inputs]
    o, S = kda(*inputs[:5], implementation=name, initial_state=inputs[5], output_final_state=True)
    o.fill_(7), S.fill_(7)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_pass_the_state_through(draw, draw_state, name):
    S0 = draw_state(2, 2, 3, 5, torch.bfloat16)
    o, S = kda(*draw(2, 0, 1, 2, 3, 5), implementation=name, initial_state=S0, output_final_state=True)
    assert o.shape == (2, 0, 2, 5) and torch.equal(S, S0.float())
    _, S = kda(*draw(2, 0, 1, 2, 3, 5), implementation=name, output_final_state=True)
    assert torch.equal(S, torch.zeros(2, 2, 3, 5))


@pytest.mark.parametrize("name", NAMES)
def test_empty_sequences_pass_their_state_through(draw, draw_state, name):
    bounds, S0 = torch.tensor([0, 0, 20, 20]), draw_state(3, 2, 3, 5)
    inputs = draw(1, 20, 1, 2, 3, 5)
    _, S = kda(*inputs, implementation=name, cu_seqlens=bounds, initial_state=S0, output_final_state=True)
    _, alone = kda(*inputs, implementation=name, initial_state=S0[1:2], output_final_state=True)
    assert torch.equal(S, torch.cat([S0[:1], alone, S0[2:]]))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_layouts_are_transposes_of_each_other(draw, draw_state, name):
    inputs, S0 = draw(2, 20, 1, 2, 6, 9), draw_state(2, 2, 6, 9)
    asked = {"implementation": name, "output_final_state": True, "return_intermediate_states": True}
    o, S, h = kda(*inputs, initial_state=S0, **asked)
    other, S_v_first, h_v_first = kda(*inputs, initial_state=S0.mT.contiguous(), state_v_first=True, **asked)
    assert torch.equal(o, other) and torch.equal(S, S_v_first.mT) and torch.equal(h, h_v_first.mT)
    assert S_v_first.is_contiguous()


@pytest.mark.parametrize(
    "name, T, interval", [(name, *cut) for name in NAMES for cut in (SHORT_CUTS if name in INTERPRETED else CUTS)]
)
def test_intermediate_states_are_those_of_runs_cut_there(draw, draw_state, name, T, interval):
    inputs, S0 = draw(2, T, 1, 2, 6, 9), draw_state(2, 2, 6, 9)
    _, _, h = kda(
        *inputs, implementation=name, initial_state=S0, return_intermediate_states=True, state_interval=interval
    )
    assert h.shape == (2, -(-T // interval), 2, 6, 9)
    for i in range(h.shape[1]):
        part = [x[:, : i * interval] for x in inputs]
        _, S = kda(*part, implementation=name, initial_state=S0, output_final_state=True)
        assert torch.equal(h[:, i], S)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_as_many_intermediate_states_as_a_full_one(draw, name):
    _, _, h = kda(*draw(0, 130, 1, 2, 6, 9), implementation=name, return_intermediate_states=True)
    assert h.shape == (0, 3, 2, 6, 9)


@pytest.mark.parametrize("C, kept", [(None, 5), (16, 5), (64, 5), (128, 3)])
def test_without_an_interval_states_are_64_tokens_or_a_longer_chunk_apart(draw, C, kept):
    _, _, h = chunk_kda(*draw(1, 300, 1, 2, 6, 9), chunk_size=C, return_intermediate_states=True)
    assert h.shape == (1, kept, 2, 6, 9)


@pytest.mark.parametrize("name", NAMES)
def test_intermediate_states_of_packed_sequences_follow_one_another(draw, name):
    bounds, interval = ([0, 20, 20, 21, 54], 16) if name in INTERPRETED else ([0, 70, 70, 71, 200], 64)
    inputs = draw(1, bounds[-1], 1, 2, 6, 9, torch.bfloat16)
    asked = {"implementation": name, "return_intermediate_states": True, "state_interval": interval}
    _, _, h = kda(*inputs, cu_seqlens=torch.tensor(bounds), **asked)
    runs = zip(bounds, bounds[1:], strict=False)
    alone = [kda(*(x[:, first:last] for x in inputs), **asked)[2] for first, last in runs]
    assert h.dtype == torch.bfloat16 and h.shape[1] == 2 + 0 + 1 + 3
    assert torch.equal(h, torch.cat(alone, 1))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_token_by_token_continues_a_prefill(draw, name):
    (dtype, T, bound) = (torch.float32, 17, 2e-6) if name in INTERPRETED else (torch.float64, 65, 1e-14)
    inputs = draw(2, T + 5, 1, 2, 16, 16, dtype)
    o, S = kda(*inputs, implementation=name, output_final_state=True)
    rows, state = [], None
    for first, last in [(0, T), *((t, t + 1) for t in range(T, T + 5))]:
        row, state = kda(*(x[:, first:last] for x in inputs), initial_state=state, output_final_state=True)
        rows.append(row)
    assert torch.allclose(torch.cat(rows, 1), o, rtol=0, atol=bound)
    assert torch.allclose(state, S, rtol=0, atol=bound)
