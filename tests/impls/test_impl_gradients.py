"""Gradients agree with the definition, through every input and activation, and survive what training does to them."""

import numpy as np
import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

import kda_spec
from impls import IMPLEMENTATIONS, ChunkTorchConfig, chunk_kda, chunk_torch, kda, recurrent_torch
from impls.registration import _ON_CPU, register
from kda_spec.types import Inputs

ROWS = [row for row in IMPLEMENTATIONS if row.backward]
NAMES = [row.name for row in ROWS]
WIDE = [row.name for row in ROWS if "float64" in row.dtypes]
FLAGS = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
# Twice the worst relative error of a gradient over this file's cases, 6.3e-16 and 3.3e-7.
BOUNDS = {torch.float64: 1.3e-15, torch.float32: 6.6e-7}


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(name, inputs, S0, do, dS, **keywords):
    """Return the gradients of <do, o> + <dS, S> for the inputs and S0."""
    leaf = leaves([*inputs, S0])
    o, S = kda(*leaf[:5], implementation=name, initial_state=leaf[5], output_final_state=True, **keywords)
    return torch.autograd.grad([o, S], leaf, [do, dS])


def reference(inputs, S0, do, dS, cu_seqlens=None):
    packing = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    arrays = Inputs(*[x.double().numpy() for x in inputs], initial_state=S0.double().numpy(), cu_seqlens=packing)
    exact = kda_spec.gradients(arrays, do.double().numpy(), dS.double().numpy())
    return [exact.q, exact.k, exact.v, exact.g, exact.beta, exact.initial_state]


# B, T, H, HV, K, V: around the segments of 64 tokens, with one channel, with grouped heads, with the most channels.
SHAPES = [
    (2, 1, 1, 2, 3, 5),
    (1, 64, 2, 2, 16, 1),
    (2, 65, 2, 6, 1, 7),
    (1, 130, 1, 3, 20, 12),
    (1, 9, 1, 33, 256, 256),
]


CASES = [(name, dtype) for name in NAMES for dtype in BOUNDS if dtype == torch.float32 or name in WIDE]


# interpreted, 33 heads of 256 channels take 12 seconds: test_triton_backward has one
@pytest.mark.parametrize(
    "name, dtype, shape", [(*case, x) for case in CASES for x in SHAPES[: -1 if case[0] == "chunk_triton" else None]]
)
def test_every_gradient_agrees_and_gates_of_minus_infinity_have_none(draw, draw_state, name, dtype, shape):
    B, T, _, HV, K, V = shape
    inputs, S0 = draw(*shape, dtype, resets=True), draw_state(B, HV, K, V, dtype)
    do, dS = draw_state(B, T, HV, V, dtype, seed=3), draw_state(B, HV, K, V, dtype, seed=5)
    found = gradients(name, inputs, S0, do, dS)
    for x, exact, like in zip(found, reference(inputs, S0, do, dS), (*inputs, S0), strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape
        assert np.linalg.norm(x.double().numpy() - exact) <= BOUNDS[dtype] * np.linalg.norm(exact)
    assert not found[3][inputs[3] == -torch.inf].any()


@pytest.mark.parametrize("name, dtype", CASES)
def test_gradients_of_packed_sequences_agree_empty_ones_included(draw, draw_state, name, dtype):
    cu_seqlens = torch.tensor([0, 0, 65, 66, 66, 96])
    inputs, S0, dS = draw(1, 96, 2, 4, 5, 3, dtype), *(draw_state(5, 4, 5, 3, dtype, i) for i in (1, 2))
    do = draw_state(1, 96, 4, 3, dtype, seed=3)
    found = gradients(name, inputs, S0, do, dS, cu_seqlens=cu_seqlens)
    for x, exact in zip(found, reference(inputs, S0, do, dS, cu_seqlens), strict=True):
        assert np.linalg.norm(x.double().numpy() - exact) <= BOUNDS[dtype] * np.linalg.norm(exact)
    assert torch.equal(found[5][[0, 3]], dS[[0, 3]])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_dtypes_of_the_inputs(draw, draw_state, name):
    q, k, v, g, beta = draw(1, 20, 1, 2, 4, 4)
    inputs = leaves([q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta.half(), draw_state(1, 2, 4, 4, torch.bfloat16)])
    o, _ = kda(*inputs[:5], implementation=name, initial_state=inputs[5])
    o.sum().backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradcheck_through_every_activation(draw, draw_state, name, lower_bound):
    q, k, v, g, beta = draw(1, 6, 1, 2, 3, 2, torch.float64)
    raw = leaves(
        [2 * q, 3 * k, v, 4 * (g + 1), 6 * (beta - 0.5), torch.tensor([-0.5, 0.5]).double(), g[0, 0].flatten()]
    )
    S0 = draw_state(1, 2, 2, 3, torch.float64).requires_grad_()

    def run(q, k, v, g, beta, A_log, dt_bias, S0):
        more = {"A_log": A_log, "dt_bias": dt_bias, "initial_state": S0, "state_v_first": True, "scale": 0.6}
        asked = {"output_final_state": True, "lower_bound": lower_bound, "allow_neg_eigval": True, **FLAGS}
        return kda(q, k, v, g, beta, implementation=name, **more, **asked)

    assert torch.autograd.gradcheck(run, (*raw, S0), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_activations_are_finite_at_their_extremes(draw, name):
    q, k, v, g, beta = leaves(draw(1, 20, 1, 2, 4, 4))
    with torch.no_grad():
        q[:, 3], k[:, 4], g[:, 5], g[:, 6], beta[:, 7], beta[:, 8] = 0, 0, 1e30, -1e30, 1e30, -1e30
    A_log = torch.zeros(2, requires_grad=True)
    o, _ = kda(q, k, v, g, beta, implementation=name, A_log=A_log, **FLAGS)
    o.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, g, beta, A_log))


def test_half_of_the_sigmoid_at_zero_has_its_slope():
    from impls.activations import sigmoid

    x = torch.tensor([-800.0, -3, 0, 3, 800], dtype=torch.float64, requires_grad=True)
    y = sigmoid(x)
    y.sum().backward()
    assert torch.allclose(y, torch.sigmoid(x), rtol=1e-15, atol=0)
    assert torch.allclose(x.grad, torch.sigmoid(x) * torch.sigmoid(-x), rtol=1e-14, atol=0)


def loss_of(name, config=None):
    def loss(q, k, v, g, beta, A_log, S0):
        o, S = kda(
            q,
            k,
            v,
            g,
            beta,
            implementation=name,
            config=config,
            A_log=A_log,
            initial_state=S0,
            output_final_state=True,
            **FLAGS,
        )
        return o.square().mean() + S.mean()

    return loss


@pytest.mark.parametrize(
    "name, config, backend",
    [
        ("recurrent_torch", None, "aot_eager"),
        ("chunk_torch", ChunkTorchConfig(16), "inductor"),
        ("chunk_triton", None, "aot_eager"),
    ],
)
def test_a_training_step_compiles_into_one_graph(draw, draw_state, name, config, backend):
    inputs = [*draw(1, 20, 1, 2, 8, 8), torch.zeros(2), draw_state(1, 2, 8, 8)]
    eager, compiled = leaves(inputs), leaves(inputs)
    loss_of(name, config)(*eager).backward()
    # The key of torch's cache on disk leaves out our code: a backward traced by an older version would run here.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(loss_of(name, config), fullgraph=True, backend=backend)(*compiled).backward()
    for x, y in zip(compiled, eager, strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_numbers_of_tokens_and_scales_that_change_compile_into_one_graph(draw):
    compiled = torch.compile(lambda *x: chunk_kda(*x[:5], scale=x[5])[0], fullgraph=True, dynamic=True, backend="eager")
    for T, scale in ((20, 0.1), (33, 0.3), (130, 0.7)):
        inputs = draw(1, T, 1, 2, 8, 8)
        assert torch.equal(compiled(*inputs, scale), chunk_kda(*inputs, scale)[0])


def test_packed_inputs_compile_into_one_graph(draw):
    inputs, bounds = draw(1, 20, 1, 2, 8, 8), torch.tensor([0, 3, 20])
    compiled = torch.compile(lambda *x: kda(*x, cu_seqlens=bounds)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), kda(*inputs, cu_seqlens=bounds)[0])


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_bits(draw, name):
    plain, saved = leaves(draw(1, 20, 1, 2, 8, 8)), leaves(draw(1, 20, 1, 2, 8, 8))
    kda(*plain, implementation=name)[0].sum().backward()
    checkpoint(lambda *x: kda(*x, implementation=name)[0], *saved, use_reentrant=False).sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(plain, saved, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_a_clear_error(draw, name):
    inputs = leaves(draw(1, 4, 1, 1, 3, 3))
    o, _ = kda(*inputs, implementation=name)
    (dq,) = torch.autograd.grad(o.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_a_clear_error_and_no_zeros(draw, name):
    q, *others = draw(1, 4, 1, 1, 3, 3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: kda(q, *others, implementation=name)[0], (q,), (q,))


def test_the_old_name_of_the_state_layout_compiles_into_one_graph(draw):
    asked, inputs = {"output_final_state": True, "transpose_state_layout": True}, draw(1, 20, 1, 2, 8, 4)
    compiled = torch.compile(lambda *x: chunk_kda(*x, **asked)[1], fullgraph=True, backend="aot_eager")
    assert compiled(*inputs).shape == (1, 2, 4, 8)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_the_inside(draw, name):
    plain, cast = leaves(draw(1, 40, 1, 2, 16, 16)), leaves(draw(1, 40, 1, 2, 16, 16))
    o, _ = kda(*plain, implementation=name, use_qk_l2norm_in_kernel=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, _ = kda(*cast, implementation=name, use_qk_l2norm_in_kernel=True)
        other.sum().backward()
    o.sum().backward()
    assert torch.equal(o, other)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(plain, cast, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_lower_precision_of_products_elsewhere_does_not_reach_the_inside(draw, name):
    inputs = draw(1, 100, 2, 2, 64, 64)
    o, _ = kda(*inputs, implementation=name)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(kda(*inputs, implementation=name)[0], o)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_last_thread_to_leave_restores_the_precision_of_products():
    matmul, products = torch.backends.mkldnn.matmul, _ON_CPU
    torch.set_float32_matmul_precision("medium")
    try:
        with products:
            with products:  # another thread comes and goes
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_inherited_precision_of_products_stays_inherited():
    matmul, own = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    matmul.fp32_precision, torch.backends.mkldnn.fp32_precision = "none", "bf16"
    try:
        with _ON_CPU:
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision, torch.backends.mkldnn.fp32_precision = own, "none"


@pytest.mark.parametrize("name", NAMES)
def test_only_inputs_that_want_a_gradient_get_one_and_no_tokens_are_no_trouble(draw, draw_state, name):
    (q, k, v, g, beta), S0 = draw(2, 0, 1, 2, 3, 3), draw_state(2, 2, 3, 3).requires_grad_()
    v.requires_grad_()
    o, S = kda(q, k, v, g, beta, implementation=name, initial_state=S0, output_final_state=True)
    (o.sum() + 3 * S.sum()).backward()
    assert q.grad is None and v.grad.shape == v.shape and torch.equal(S0.grad, torch.full_like(S0, 3))


OPS = [("recurrent_torch", recurrent_torch.op, (0,)), ("chunk_torch", chunk_torch.op, (16, 32, 4, 0))]


@pytest.mark.parametrize("name, op, launch", OPS, ids=WIDE)
@pytest.mark.parametrize("bounds, S0, interval", [(None, True, 0), ([0, 0, 3, 20], False, 0), ([0, 3, 20], True, 16)])
def test_opcheck_passes(draw, draw_state, name, op, launch, bounds, S0, interval):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N = 2 if bounds is None else len(bounds) - 1
    inputs, state = draw(2 if bounds is None else 1, 20, 1, 2, 4, 3), draw_state(N, 2, 4, 3) if S0 else None
    if not interval:
        inputs, state = leaves(inputs), state if state is None else state.requires_grad_()
    torch.library.opcheck(op, (*inputs, state, cu_seqlens, 0.3, S0, interval, launch))


def test_the_backward_is_given_the_launch_of_its_forward(draw):
    given = []

    def forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, state_interval, launch):
        return v.clone(), v.new_empty(0), v.new_empty(0)

    def backward(q, k, v, g, beta, initial_state, cu_seqlens, scale, do, dS, launch):
        given.append(list(launch))
        return *(torch.zeros_like(x) for x in (q, k, v, g, beta)), v.new_empty(0)

    op = register("told_of_its_launch", forward, backward)
    for launch in ((16, 32), ()):
        op(*leaves(draw(1, 3, 1, 1, 2, 2)), None, None, 1.0, False, 0, launch)[0].sum().backward()
    assert given == [[16, 32], []]


@pytest.mark.parametrize("bounds, v_first, interval", [(None, False, 0), ([0, 0, 3, 20], True, 16)])
def test_opcheck_passes_where_the_op_activates(draw, draw_state, bounds, v_first, interval):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    N = 2 if bounds is None else len(bounds) - 1
    inputs, S0 = draw(2 if bounds is None else 1, 20, 1, 2, 4, 3), draw_state(N, 2, *((3, 4) if v_first else (4, 3)))
    arguments = (*inputs, torch.zeros(2), torch.zeros(8), S0, cu_seqlens, None, 0.3, None, True, "softplus", "once")
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(chunk_torch.op_raw, (*arguments, v_first, True, interval, OPS[1][2]), test_utils=checked)
