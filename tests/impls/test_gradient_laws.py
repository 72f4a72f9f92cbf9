"""Gradients obey laws that need no reference, at any length; they pass through a cut; a part has the bits of all."""

import pytest
import torch

from impls import kda

NAMES = ["chunk_torch", "chunk_triton"]
INPUTS = ("q", "k", "v", "g", "beta")
EPSILON = torch.finfo(torch.float32).eps


def leaves_of(draw, draw_state, T, H=1, HV=2, K=16, V=16):
    """Return q to beta and initial_state by name, and do and dS."""
    leaves = dict(zip(INPUTS, draw(1, T, H, HV, K, V), strict=True)) | {"initial_state": draw_state(1, HV, K, V)}
    return leaves, draw_state(1, T, HV, V, seed=3), draw_state(1, HV, K, V, seed=5)


def differentiated(name, leaves, do, dS, wanted=None):
    """Return o, the final state and the gradients by name."""
    leaves = {x: y.detach().clone().requires_grad_(wanted is None or x in wanted) for x, y in leaves.items()}
    tokens, S0 = [leaves[x] for x in INPUTS], leaves["initial_state"]
    o, S = kda(*tokens, implementation=name, initial_state=S0, output_final_state=True)
    asked = {x: y for x, y in leaves.items() if y.requires_grad}
    return o, S, dict(zip(asked, torch.autograd.grad([o, S], list(asked.values()), [do, dS]), strict=True))


def assert_laws_hold(leaves, do, dS, o, S, d, bound):
    """Check the three conservation laws of every token, and the gates' total against the states, in float64."""
    x, d = ({name: y.double() for name, y in found.items()} for found in (leaves, d))
    do, dS, o, S = (y.double() for y in (do, dS, o, S))
    pairs = {"q": (x["q"], d["q"]), "k": (x["k"], d["k"]), "v": (x["v"], d["v"]), "o": (o, do)}
    q, k, v, given = ((a * b).sum((0, 2, 3)) for a, b in pairs.values())
    gates = torch.cat([d["g"].sum((0, 2, 3)), (dS * S).sum()[None]])
    laws = {
        "<q, dq> = <o, do>": q - given,
        "<k, dk> = 2 beta dbeta - <v, dv>": k + v - 2 * (x["beta"] * d["beta"]).sum((0, 2)),
        "sum dg_t - sum dg_(t+1) = <q, dq> - <v, dv>": gates[:-1] - gates[1:] - q + v,
        "sum dg_1 = <dS_0, S_0>": gates[:1] - (d["initial_state"] * x["initial_state"]).sum(),
    }
    size = torch.stack([y.abs().max() for y in (q, k, v, given)]).max()
    assert {name: law.abs().max().item() for name, law in laws.items() if law.abs().max() > bound * size} == {}


@pytest.mark.parametrize("T", [300, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_the_laws_hold_at_any_length(draw, draw_state, name, T):
    leaves, do, dS = leaves_of(draw, draw_state, T, HV=1)
    assert_laws_hold(leaves, do, dS, *differentiated(name, leaves, do, dS), 20 * EPSILON)


@pytest.mark.parametrize("cut", [1, 16, 37])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_through_a_cut_and_gates_get_what_the_state_there_has(draw, draw_state, name, cut):
    leaves, do, dS = leaves_of(draw, draw_state, 50)
    *_, whole = differentiated(name, leaves, do, dS)
    early, late = ({x: leaves[x][:, at] for x in INPUTS} for at in (slice(cut), slice(cut, None)))
    early["initial_state"] = leaves["initial_state"]
    _, S, _ = differentiated(name, early, do[:, :cut], dS)
    *_, behind = differentiated(name, late | {"initial_state": S}, do[:, cut:], dS)
    *_, before = differentiated(name, early, do[:, :cut], behind["initial_state"])
    for x in INPUTS:
        assert (torch.cat([before[x], behind[x]], 1) - whole[x]).norm() <= 1e-6 * whole[x].norm()
    assert (before["initial_state"] - whole["initial_state"]).norm() <= 1e-6 * whole["initial_state"].norm()
    of_state = (behind["initial_state"] * S).sum(-1)  # channel by channel: dg = sum_j dS S of the state that is decayed
    assert (whole["g"][:, cut] - of_state).norm() <= 2e-6 * of_state.norm()


@pytest.mark.parametrize("wanted", [["q"], ["v", "initial_state"], ["g", "beta"], ["k"]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_gradients_has_the_bits_of_all(draw, draw_state, name, wanted):
    leaves, do, dS = leaves_of(draw, draw_state, 20)
    *_, whole = differentiated(name, leaves, do, dS)
    *_, found = differentiated(name, leaves, do, dS, wanted)
    assert list(found) == [x for x in leaves if x in wanted]
    assert all(torch.equal(x, whole[name]) for name, x in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_ten_runs_give_the_same_bits(draw, draw_state, name):
    leaves, do, dS = leaves_of(draw, draw_state, 50)
    (o, S, first), *others = (differentiated(name, leaves, do, dS) for _ in range(10))
    for other_o, other_S, other in others:
        assert torch.equal(other_o, o) and torch.equal(other_S, S)
        assert all(torch.equal(other[x], first[x]) for x in first)
