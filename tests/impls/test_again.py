"""A call with the signature of an earlier one is not checked again, gives the same bits, and hides no mistake."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from impls import again, fused_recurrent_kda, kda
from impls.configs import RecurrentTorchConfig

H, K, V = 2, 16, 32
RAW = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "A_log": torch.zeros(H)}
ASKED = [
    {},
    {"use_qk_l2norm_in_kernel": True, "scale": 0.5},
    {"output_final_state": True, "state_v_first": True},
    {"output_final_state": True, **RAW, "lower_bound": -5.0},
    {"output_final_state": True, **RAW, "allow_neg_eigval": True, "dt_bias": torch.ones(H * K)},
    {"output_final_state": None, "state_v_first": None},
]
NAMED = [lambda *x, **y: kda(*x, implementation="recurrent_torch", **y), kda, fused_recurrent_kda]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Begin without a plan, and without gradients."""
    monkeypatch.setattr(again, "_plans", {})
    with torch.no_grad():
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Return a function that forbids every check from when it is called."""

    def forbid():
        monkeypatch.setattr("impls.checks.check_inputs", None)
        monkeypatch.setattr("impls.table.check_inputs", None)
        monkeypatch.setattr("impls.call.checked", None)

    return forbid


def same(found, expected) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def step(draw, draw_state, asked, B=2, dtype=torch.float32, heads=H, decode=fused_recurrent_kda):
    S0 = draw_state(B, heads, *((V, K) if asked.get("state_v_first") else (K, V)))
    inputs = draw(B, 1, H, heads, K, V, dtype)
    return lambda **others: decode(*inputs, **{"initial_state": S0} | asked | others)


@pytest.mark.parametrize("decode", NAMED)
@pytest.mark.parametrize("asked", ASKED)
def test_the_second_call_passes_the_checks_by_and_has_the_same_bits(draw, draw_state, unchecked, asked, decode):
    run = step(draw, draw_state, asked, decode=decode)
    first = run()
    unchecked()
    assert same(run(), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("B, heads", [(1, 2), (16, 2), (3, 4)])
def test_any_number_of_states_has_the_same_bits(draw, draw_state, B, heads, dtype, compile):
    config = RecurrentTorchConfig(compile=compile)
    run = step(draw, draw_state, {"output_final_state": True}, B, dtype, heads, NAMED[0])
    expected = run(config=config)
    assert len(again._plans) == 1
    assert same(run(config=config), expected)


def test_other_layouts_of_memory_have_the_same_bits(draw, draw_state):
    inputs, S0 = draw(2, 1, H, H, K, V), draw_state(2, H, K, V)
    expected = fused_recurrent_kda(*inputs, initial_state=S0, output_final_state=True)
    scattered = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (*inputs, S0)]
    negated = [torch._neg_view(-x) for x in (*inputs, S0)]
    for *others, S in (scattered, negated):
        assert same(fused_recurrent_kda(*others, initial_state=S, output_final_state=True), expected)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"use_qk_l2norm_in_kernel": 1}, TypeError, "use_qk_l2norm_in_kernel must be True or False, got 1"),
        ({"scale": "1"}, TypeError, "scale must be a Python number, got str"),
        ({"scale": [1.0]}, TypeError, "scale must be a Python number, got list"),
        ({"initial_state": torch.zeros(2, H, V, K)}, ValueError, "initial_state must have shape"),
        ({"initial_state": torch.zeros(2, H, K, V).to_sparse()}, TypeError, "initial_state must be a dense tensor"),
        ({"initial_state": [1.0]}, TypeError, "initial_state must be a torch.Tensor, got list"),
        ({"A_log": torch.zeros(3), "use_gate_in_kernel": True}, ValueError, "A_log must have HV = 2 elements"),
        ({"cu_seqlens": torch.tensor([0, 1])}, ValueError, "batch size B = 1"),
        ({"cu_seqlens": False}, TypeError, "cu_seqlens must be"),
        ({"state_v_first": True, "transpose_state_layout": False}, ValueError, "got both"),
        ({"intial_state": None}, TypeError, "unexpected keyword argument 'intial_state'"),
    ],
)
def test_a_mistake_is_told_behind_calls_without(draw, draw_state, wrong, error, message):
    run = step(draw, draw_state, {"use_qk_l2norm_in_kernel": True, "scale": 1.0})
    run(), run()
    with pytest.raises(error, match=message):
        run(**wrong)


@pytest.mark.parametrize("place", range(5))
def test_a_missing_tensor_is_named_behind_calls_with_it(draw, draw_state, place):
    inputs, S0 = [*draw(1, 1, H, H, K, V)], draw_state(1, H, K, V)
    kda(*inputs, initial_state=S0), kda(*inputs, initial_state=S0)
    inputs[place] = None
    with pytest.raises(TypeError, match=f"{('q', 'k', 'v', 'g', 'beta')[place]} must be a torch.Tensor, got NoneType"):
        kda(*inputs, initial_state=S0)


def test_a_configuration_and_the_environment_are_looked_at_every_time(draw, draw_state, monkeypatch):
    run = step(draw, draw_state, {})
    run()
    monkeypatch.setenv("KDA_COMPILE", "yes")
    with pytest.raises(ValueError, match="KDA_COMPILE must be 0 or 1, got 'yes'"):
        run()
    with pytest.raises(ValueError, match="implementation must be named"):
        step(draw, draw_state, {}, decode=kda)(config=RecurrentTorchConfig())
    named = step(draw, draw_state, {}, decode=NAMED[0])
    with pytest.raises(TypeError, match="config must be a RecurrentTorchConfig for recurrent_torch, got {}"):
        named(config={})
    named(config=RecurrentTorchConfig(compile=False))
    with pytest.raises(ValueError, match="compile must be"):
        named(config=RecurrentTorchConfig(compile=0))


@pytest.mark.parametrize("compile", [False, True])
def test_tangents_are_refused_behind_calls_without(draw, draw_state, compile):
    inputs, S0 = draw(1, 1, H, H, K, V), draw_state(1, H, K, V)
    run = partial(NAMED[0], config=RecurrentTorchConfig(compile=compile), initial_state=S0)
    run(*inputs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        run(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs))


def test_a_compiled_caller_is_not_compiled_again_for_what_others_call(draw, draw_state):
    inputs, S0, counter = draw(1, 1, H, H, K, V), draw_state(1, H, K, V), CompileCounter()
    compiled = torch.compile(lambda *x: fused_recurrent_kda(*x, initial_state=S0)[0] + 1.0, backend=counter)
    compiled(*inputs)
    for B in (2, 3):
        step(draw, draw_state, {}, B)()
        compiled(*inputs)
    assert len(again._plans) == 2 and counter.frame_count == 1


def test_gradients_are_there_behind_calls_without(draw, draw_state):
    inputs, S0 = draw(1, 1, H, H, K, V), draw_state(1, H, K, V)
    fused_recurrent_kda(*inputs, initial_state=S0)
    inputs[2].requires_grad_()
    with torch.enable_grad():
        fused_recurrent_kda(*inputs, initial_state=S0)[0].sum().backward()
    assert inputs[2].grad.abs().sum() > 0


def test_no_more_signatures_than_a_few_are_remembered(draw, draw_state, monkeypatch):
    monkeypatch.setattr(again, "_MOST", 2)
    for B in (1, 2, 3):
        run = step(draw, draw_state, {}, B)
        assert same(run(), run())
    assert len(again._plans) == 2
    inputs, S0 = draw(1, 1, H, H, K, V), draw_state(1, H, K, V)
    expected = fused_recurrent_kda(*inputs, initial_state=S0)
    for n in range(2 * again._ALIKE):
        lying = torch.empty(1, H, K, V + n)[..., :V].copy_(S0)
        assert same(fused_recurrent_kda(*inputs, initial_state=lying), expected)
    assert max(map(len, again._plans.values())) == again._ALIKE


@pytest.mark.parametrize("twice", [(0, 1), (1, 3)])
def test_one_tensor_given_twice_has_the_bits_of_two(draw, draw_state, twice):
    inputs, S0 = [*draw(1, 1, H, H, K, V)], draw_state(1, H, K, V)
    first, second = twice
    inputs[second] = inputs[first]
    apart = [x.clone() for x in inputs]
    expected = fused_recurrent_kda(*apart, initial_state=S0)
    for _ in range(2):
        assert same(fused_recurrent_kda(*inputs, initial_state=S0), expected)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, partial(torch.autocast, "cpu"), partial(FlopCounterMode, display=False)]
)
def test_modes_come_and_go_between_calls(draw, draw_state, mode):
    run = step(draw, draw_state, {"output_final_state": True}, decode=NAMED[0])
    expected = run()
    for _ in range(2):
        with mode():
            assert same(run(), expected)
        assert same(run(), expected)


def test_who_watches_sees_the_op_behind_calls_that_nobody_watched(draw, draw_state):
    run, seen = step(draw, draw_state, {}), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    run(), run()
    with Watch():
        run()
    with torch.profiler.profile() as profile:
        run()
    with FakeTensorMode(allow_non_fake_inputs=True):
        o, _ = run()
    assert any("kda_forge::recurrent_torch" in x.key for x in profile.key_averages())
    assert any("kda_forge.recurrent_torch" in x for x in seen) and isinstance(o, FakeTensor)


def test_calls_with_gradients_enabled_are_not_remembered(draw, draw_state):
    run = step(draw, draw_state, {})
    with torch.enable_grad():
        assert same(run(), run()) and not again._plans
