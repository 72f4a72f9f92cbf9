"""General DPLR agrees with its definition, is an oracle for KDA and the family, and has the right gradients."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kda_spec
from impls import chunk_kda, dplr_torch
from impls.configs import DplrTorchConfig
from impls.dplr_checks import Dplr
from impls.dplr_ops import FORMS, dplr
from kda_spec.family import FAMILY, Parameters
from verify.__main__ import main
from verify.session import PASS

FLOAT32 = 4.8e-7
"""As in tests/impls/test_triton_reference.py."""
NARROW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = {"dplr_torch": 1.0, "dplr_triton": 1.5}
"""Roundings of 16 bits: of outputs alone, 0.44 at worst, and of all that is stored and multiplied, 0.75 at worst."""


def drawn(B, T, H, K, V, dtype=torch.float32, resets=True):
    """Return q, k, v, a, b, g with |a|, |b| = 0.7, so that states stay bounded."""
    generator = torch.Generator().manual_seed(0)

    def normal(size):
        return torch.randn(B, T, H, size, generator=generator, dtype=torch.float64)

    q, k, a, b = (torch.nn.functional.normalize(normal(K), dim=-1) for _ in range(4))
    g = -torch.exp(2 * normal(K) - 2)
    if resets:
        g[:, 5::17] = -torch.inf
        g[:, 3::7, :, : K // 2] = -torch.inf
    return tuple(x.to(dtype) for x in (q, k, normal(V), 0.7 * a, 0.7 * b, g))


def reference(tokens, S0=None, scale=None):
    arrays = (x.double().numpy().swapaxes(1, 2) for x in tokens)
    o, S = kda_spec.general_dplr(*arrays, None if S0 is None else S0.double().numpy(), scale)
    return o.swapaxes(1, 2), S


def assert_close(x, exact, bound):
    assert tuple(x.shape) == exact.shape
    assert np.linalg.norm(x.double().numpy() - exact) <= bound * np.linalg.norm(exact)


SHAPES = [(1, 5, 2, 1, 1), (2, 37, 2, 17, 20), (1, 16, 1, 60, 16), (1, 33, 1, 128, 40), (2, 0, 1, 3, 5)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("C", [16, 32, 64])
def test_every_size_agrees_with_the_definition(name, shape, C):
    tokens = drawn(*shape)
    S0 = torch.randn(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1))
    exact = reference(tokens, S0, 0.7)
    asked = {"initial_state": S0, "scale": 0.7, "chunk_size": C, "output_final_state": True, "implementation": name}
    o, S = dplr(*tokens, **asked)
    assert_close(o, exact[0], FLOAT32)
    assert_close(S, exact[1], FLOAT32)
    turned, S = dplr(*tokens, **asked | {"initial_state": S0.mT, "state_v_first": True})
    assert torch.equal(turned, o)
    assert_close(S.mT, exact[1], FLOAT32)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_inputs_cost_a_few_roundings(name, dtype):
    tokens = drawn(1, 50, 2, 16, 16, dtype)
    o, S = dplr(*tokens, output_final_state=True, implementation=name)
    exact, bound = reference(tokens), ROUNDINGS[name] * NARROW[dtype]
    assert_close(o, exact[0], bound)
    assert_close(S, exact[1], bound)


@pytest.mark.parametrize("name", FORMS)
def test_packed_sequences_agree_empty_ones_included(name):
    tokens, bounds = drawn(1, 50, 2, 6, 5), [0, 0, 17, 18, 18, 50]
    S0 = torch.randn(5, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    o, S = dplr(
        *tokens, initial_state=S0, cu_seqlens=torch.tensor(bounds), output_final_state=True, implementation=name
    )
    for n, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        exact = reference([x[:, first:last] for x in tokens], S0[n : n + 1])
        assert_close(S[n : n + 1], exact[1], FLOAT32)
        if last > first:
            assert_close(o[:, first:last], exact[0], FLOAT32)


def test_packing_on_a_device_is_read_by_torch_alone():
    """There no value is looked at beforehand."""
    tokens, packing = drawn(1, 20, 1, 4, 3), torch.tensor([0, 7, 20])
    o, S = dplr_torch.dplr_torch(Dplr(tokens, 0.5, None, packing, None), 16)
    expected, final = dplr(*tokens, scale=0.5, cu_seqlens=packing, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(S, final)


@pytest.mark.parametrize("name", FORMS)
def test_kda_is_the_member_whose_a_and_b_are_bound_to_k(name, draw):
    q, k, v, g, beta = draw(1, 70, 2, 2, 16, 20, resets=True)
    strength = beta[..., None]
    o, S = dplr(q, k, strength * v, strength * k, k * g.exp(), g, output_final_state=True, implementation=name)
    expected, final = chunk_kda(q, k, v, g, beta, output_final_state=True)
    assert_close(o, expected.double().numpy(), 2 * FLOAT32)
    assert_close(S, final.double().numpy(), 2 * FLOAT32)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
def test_every_member_of_the_family_runs(name, member):
    """DeltaNet, GDN, RWKV7, Comba and the others, by the parameters that the definition gives them."""
    random, shape = np.random.default_rng(0), (1, 2, 40)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in random.normal(size=(3, *shape, 6))]
    parameters = Parameters(
        v=random.normal(size=(*shape, 5)), k=unit[0], g=-random.random((*shape, 6)), beta=random.random(shape),
        feedback=random.random(shape), k_hat=unit[1], rate=random.random((*shape, 6)),
    )  # fmt: skip
    arguments = member.arguments(parameters)
    rows = [np.broadcast_to(x, (*shape, x.shape[-1] if i == 1 else 6)) for i, x in enumerate(arguments)]
    exact = kda_spec.general_dplr(unit[2], *arguments)
    q, k, v, a, b, g = (torch.tensor(np.float32(x)).transpose(1, 2).contiguous() for x in (unit[2], *rows))
    o, S = dplr(q, k, v, a, b, g, output_final_state=True, implementation=name)
    assert_close(o, exact[0].swapaxes(1, 2), 2 * FLOAT32)
    assert_close(S, exact[1], 2 * FLOAT32)


def test_gradients_are_those_of_the_recurrence():
    """In blocks of 16 tokens, with gates of -inf: autograd of the plain recurrence in float64."""
    tokens = [x.requires_grad_() for x in drawn(2, 45, 2, 4, 3, torch.float64)]
    S0 = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    q, k, v, a, b, g = tokens
    alpha, S, o = g.exp(), S0, []
    for t in range(45):
        x = torch.einsum("bhk,bhkv->bhv", b[:, t], S)
        S = alpha[:, t, :, :, None] * S - a[:, t, :, :, None] * x[:, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    blocks = DplrTorchConfig(block_tokens=16)
    found = dplr(*tokens, initial_state=S0, scale=1.0, output_final_state=True, config=blocks)
    weights = [torch.randn_like(x) for x in found]
    of = [torch.autograd.grad([x for x in pair], [*tokens, S0], weights) for pair in (found, (torch.stack(o, 1), S))]
    for ours, exact in zip(*of, strict=True):
        assert ours.isfinite().all()
        assert_close(ours, exact.numpy(), 1e-12)


def test_gradients_can_be_had_once():
    tokens = [x.requires_grad_() for x in drawn(1, 20, 1, 4, 3, torch.float64)]
    o, _ = dplr(*tokens)
    (dq,) = torch.autograd.grad(o.square().sum(), tokens[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dq.sum().backward()


@pytest.mark.parametrize("name", FORMS)
def test_the_same_call_gives_the_same_bits_and_no_bit_of_the_future(name):
    tokens = drawn(1, 50, 2, 16, 16)
    o, S = dplr(*tokens, output_final_state=True, implementation=name)
    again = dplr(*tokens, output_final_state=True, implementation=name)
    assert torch.equal(o, again[0]) and torch.equal(S, again[1])
    changed = [x.clone() for x in tokens]
    for x in changed:
        x[:, 31:] = -x[:, 31:].abs() - 1
    assert torch.equal(dplr(*changed, implementation=name)[0][:, :31], o[:, :31])


REFUSED = {
    "k": ({"k": torch.zeros(1, 4, 1, 3)}, ValueError, r"k must have shape \[B, T, H, K\]"),
    "a": ({"a": torch.zeros(1, 4, 1, 2).double()}, TypeError, "a must be one of float32, got float64"),
    "chunk_size": ({"chunk_size": 8}, ValueError, "chunk_size must be one of 16, 32, 64, got 8"),
    "chunk_size by a float": ({"chunk_size": 16.0}, ValueError, "chunk_size must be one of 16, 32, 64, got 16.0"),
    "implementation": ({"implementation": "dplr_cuda"}, KeyError, "known: dplr_torch, dplr_triton"),
    "state": ({"initial_state": torch.zeros(1, 1, 2, 2).int()}, TypeError, "initial_state must be one of float32"),
    "gradients": ({"g": torch.zeros(1, 4, 1, 2, requires_grad=True), "implementation": "dplr_triton"}, ValueError,
                  "dplr_triton has no backward"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(case):
    changed, error, message = case
    arguments = dict(zip(("q", "k", "v", "a", "b", "g"), drawn(1, 4, 1, 2, 2), strict=True)) | changed
    with pytest.raises(error, match=message):
        dplr(**arguments)


@pytest.mark.parametrize("name", FORMS)
def test_tangents_are_refused(name):
    q, *others = drawn(1, 4, 1, 2, 2)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dplr(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), *others, implementation=name)


COMPILING = """
from impls import dplr_triton
from impls.compiler_triton import compiled
from impls.plan import Problem
from impls.defaults import default_dplr
from impls.targets import TARGETS
target = TARGETS["sm_90"]
problem = Problem(B=1, T=64, N=1, H=1, HV=1, K=128, V=128, dtype="bfloat16", initial=True, final=True)
walk = dplr_triton.plan(problem, default_dplr(128, 128, "bfloat16", target, 64), target).launches[1]
print(compiled(walk, problem, target).shared_memory, target.shared_memory)
"""


@pytest.mark.slow
def test_the_longest_chunk_fits_the_shared_memory_of_sm_90():
    """In a process that compiles: this one interprets."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"} | {"PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    needed, there = map(int, run.stdout.split())
    assert 0 < needed <= there


@pytest.mark.parametrize("arguments", [["by_torch"], ["by_triton", "--device", "interpret"]], ids=lambda x: x[0])
def test_the_judge_of_kda_finds_nothing(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    name, *device = arguments
    assert main([f"impls.dplr_as_kda:{name}", "--profile", "smoke", *device]) == PASS
    assert "no counterexample" in capfd.readouterr().out


def test_tokens_that_lie_head_by_head_are_as_good():
    """16 tokens of one channel: a view of the blocks is no contiguous tensor there."""
    tokens = drawn(1, 16, 2, 1, 1)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    assert torch.equal(dplr(*turned)[0], dplr(*tokens)[0])
