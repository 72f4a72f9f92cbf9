"""KDA over tokens that lie on several ranks: outputs, inputs and states of one process, however they are split."""

import math

import pytest
import torch
from ranks import done, run

from impls import chunk_kda
from kimi_linear import preset
from kimi_linear.initial import random_model
from kimi_linear.parallel import kda_over_ranks

RANK = """
import os, sys, torch
from kimi_linear.__main__ import end
from kimi_linear.parallel import joined
from test_parallel_context import CASES, LAYERS, op, layer
torch.set_num_threads(1)
with joined(timeout=120) as job:
    ops = {name: op(job.share.rank, *CASES[name]) for name in CASES if len(CASES[name][0]) == job.share.ranks}
    layers = {split: layer(job.share.rank, split) for split in LAYERS if len(split) == job.share.ranks}
    torch.save((ops, layers), f"{sys.argv[1]}/rank{job.share.rank}.pt")
end(0)
"""
RAW = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
CASES = {
    "even": ((64, 64), {}),
    "ragged": ((37, 101), {}),
    "one token first": ((1, 80), {}),
    "one token last": ((80, 1), {}),
    "nothing first": ((0, 40), {}),
    "nothing last": ((40, 0), {}),
    "no token at all": ((0, 0), {}),
    "two sequences, grouped heads, narrow values": ((33, 50), {"B": 2, "HV": 4, "V": 16}),
    "channels that need two runs": ((20, 30), {"K": 144, "V": 128}),
    "activations in the op": ((70, 41), {"raw": True}),
    "resets": ((30, 30), {"resets": True}),
    "from zero": ((30, 31), {"initial": False}),
    "three": ((50, 20, 70), {}),
    "three, nothing between": ((31, 0, 40), {}),
    "three, one token between": ((31, 1, 40), {}),
    "three, nothing but the last": ((0, 0, 40), {}),
}
LAYERS = [(40, 30), (70, 0), (0, 70), (1, 69), (69, 1), (40, 1, 29), (2, 1, 67), (1, 0, 69), (69, 1, 0), (0, 1, 1)]
"""Splits of a layer's tokens; its convolutions reach back over 3, which may lie on several ranks."""


def drawn(T: int, B=1, HV=2, K=32, V=32, raw=False, resets=False, initial=True):
    """Return the inputs of the op and its options."""
    generator, H = torch.Generator().manual_seed(T), 2
    q, k = torch.randn(2, B, T, H, K, generator=generator)
    v, S = torch.randn(B, T, HV, V, generator=generator), torch.randn(B, HV, K, V, generator=generator)
    g, beta = torch.randn(B, T, HV, K, generator=generator), torch.randn(B, T, HV, generator=generator)
    given = {"initial_state": S if initial else None}
    if raw:
        A_log, bias = torch.rand(HV, generator=generator), torch.randn(HV * K, generator=generator)
        return (q, k, v, g, beta), given | RAW | {"A_log": A_log, "dt_bias": bias}
    g = -0.1 * g.exp()
    if resets:
        g[:, ::7], g[:, 40] = -math.inf, -1000.0
    return (q, torch.nn.functional.normalize(k, dim=-1), v, g, beta.sigmoid()), given


def op(rank: int, split: tuple[int, ...], options: dict):
    """Return what a rank makes of its tokens."""
    inputs, given = drawn(sum(split), **options)
    return kda_over_ranks(*(x.split(split, 1)[rank] for x in inputs), output_final_state=True, **given)


def layer(rank: int | None, split: tuple[int, ...]):
    """Return y, inputs and state of a KDA layer: of a rank's tokens, or of all of them in one process."""
    from kimi_linear.parallel import layer_over_ranks

    config = preset("tiny", layers=1, ratio=(1, 0))
    mixer = random_model(config, seed=5, dtype=torch.float32).layers[0].mixer
    generator = torch.Generator().manual_seed(sum(split))
    x = torch.randn(sum(split), config.hidden_size, generator=generator)
    inputs = torch.randn(1, config.conv_size - 1, 3 * config.kda_dim, generator=generator)
    S = torch.randn(1, config.kda_heads, config.kda_head_dim, config.kda_head_dim, generator=generator)
    with torch.no_grad():
        if rank is None:
            return mixer.prefill(x, (0, len(x)), inputs, S)
        return layer_over_ranks(mixer, x.split(split)[rank], inputs, S)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return, per number of ranks, what each of them makes of the cases and of the layer."""
    found = {}
    for ranks in (2, 3):
        folder = tmp_path_factory.mktemp("context")
        done(run(["-c", RANK, str(folder)], ranks))
        found[ranks] = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    return found


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_make_of_their_tokens_what_one_process_makes_of_all(told, name):
    split, options = CASES[name]
    inputs, given = drawn(sum(split), **options)
    o, S = chunk_kda(*inputs, output_final_state=True, **given)
    found = [ops[name] for ops, _ in told[len(split)]]
    assert [part.shape[1] for part, _ in found] == list(split)
    agree(torch.cat([part for part, _ in found], 1), o)
    for _, final in found:
        agree(final, S)
        assert torch.equal(final, found[0][1]), "every rank has the same bits of the final state"


@pytest.mark.parametrize("split", LAYERS)
def test_a_layer_over_ranks_is_the_layer(told, split):
    y, inputs, S = layer(None, split)
    found = [layers[split] for _, layers in told[len(split)]]
    agree(torch.cat([part for part, _, _ in found]), y)
    for _, own, final in found:
        agree(own, inputs)
        agree(final, S)


def test_without_ranks_it_is_refused():
    inputs, given = drawn(5)
    with pytest.raises(ValueError, match="torch.distributed must be initialised"):
        kda_over_ranks(*inputs, **given)


@pytest.mark.parametrize("option", ["cu_seqlens", "state_v_first", "return_intermediate_states"])
def test_what_tokens_on_several_ranks_do_not_take_is_refused(option):
    import torch.distributed as dist

    inputs, given = drawn(5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=f"take the options .* got .'{option}'"):
            kda_over_ranks(*inputs, **given, **{option: True})
        with pytest.raises(ValueError, match="initial_state must"):
            kda_over_ranks(*inputs, initial_state=torch.zeros(1, 2, 32, 31))
    finally:
        dist.destroy_process_group()
