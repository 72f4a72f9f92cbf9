"""The mixers: each is the recurrence that it is named after, and KDA and GDN are the model's own layer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from impls.activations import l2norm, log_decay, write_strength
from kimi_linear.layers import KDALayer
from kimi_linear.presets import TINY
from kimi_linear.synthetic.mixers import MIXERS, Mixer, MixerConfig, MixerError

SIZES = {"heads": 2, "head_dim": 8, "hidden": 24}
ABLATIONS = ({}, {"conv": 0}, {"output_gate": "none"}, {"output_gate": "silu"})


def mixer(kind: str, seed: int = 0, **options) -> Mixer:
    return Mixer(MixerConfig(kind, **SIZES, **options), torch.Generator().manual_seed(seed)).double()


def tokens(B: int = 2, T: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(trained: Mixer, kind: str) -> KDALayer:
    """Return the model's layer with the parameters of a mixer."""
    gate = "channel" if kind == "kda" else "head"
    layer = KDALayer(replace(TINY, hidden_size=24, kda_heads=2, kda_head_dim=8, gate=gate)).double()
    own = trained.state_dict()
    layer.load_state_dict(own | {"out_proj.weight": own.pop("out_proj")})
    return layer


@pytest.mark.parametrize("kind", ["kda", "gdn"])
def test_what_is_trained_is_the_models_layer(kind):
    trained, x = mixer(kind), tokens()
    layer, (B, T, D) = layer_of(trained, kind), x.shape
    zeros = (x.new_zeros(B, 3, 48), x.new_zeros(B, 2, 8, 8))
    with torch.no_grad():
        y, _, _ = layer.prefill(x.view(-1, D), list(range(0, B * T + 1, T)), *zeros)
        torch.testing.assert_close(trained(x), y.view(x.shape), rtol=1e-10, atol=1e-12)


def test_what_is_trained_can_be_decoded_token_by_token():
    trained, x = mixer("kda"), tokens()
    layer, inputs, S = layer_of(trained, "kda"), x.new_zeros(2, 3, 48), x.new_zeros(2, 2, 8, 8)
    steps = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, inputs, S = layer.step(x[:, t], inputs, S)
            steps.append(y)
        torch.testing.assert_close(trained(x), torch.stack(steps, 1), rtol=1e-10, atol=1e-12)


def transitions(kind: str, mixer: Mixer, q, k, v, rest):
    """Return A [B, T, H, K, K], the written values and the queries of S_t = A_t S_{t-1} + k_t w_t^T."""
    dtype = k.dtype
    if kind == "mamba2":
        step = F.softplus(rest.f + mixer.biases().view(2, 8), threshold=100)[..., :1]
        A = torch.exp(-mixer.A_log.exp()[:, None] * step)[..., None] * torch.eye(8, dtype=dtype)
        return A, k, step * v, q * k.shape[-1] ** -0.5
    q, k = l2norm(q, dtype), l2norm(k, dtype)
    alpha = torch.ones_like(k) if rest.f is None else log_decay(rest.f, mixer.A_log, mixer.biases(), None, dtype).exp()
    beta = write_strength(rest.beta, False, dtype)[..., None]
    c, r = (k, beta)
    if kind == "dplr":
        c, r = l2norm(rest.c, dtype), write_strength(rest.r, False, dtype)[..., None]
    A = torch.diag_embed(alpha) - (r * c)[..., :, None] * (c * alpha)[..., None, :]
    return A, k, beta * v, q * k.shape[-1] ** -0.5


@pytest.mark.parametrize("kind", [name for name in MIXERS if name != "softmax"])
def test_a_mixer_is_the_recurrence_that_it_is_named_after(kind):
    mixed = mixer(kind)
    q, k, v, rest, _ = mixed.inputs(tokens())
    A, keys, values, queries = transitions(kind, mixed, q, k, v, rest)
    S, outputs = torch.zeros(2, 2, 8, 8, dtype=torch.float64), []
    for t in range(q.shape[1]):
        S = A[:, t] @ S + keys[:, t, :, :, None] * values[:, t, :, None]
        outputs.append((queries[:, t, :, None] @ S)[:, :, 0])
    torch.testing.assert_close(mixed.kind.run(mixed, q, k, v, rest), torch.stack(outputs, 1), rtol=1e-10, atol=1e-12)


def test_softmax_attends_to_every_token_before_and_its_own():
    mixed = mixer("softmax")
    q, k, v, rest, _ = mixed.inputs(tokens())
    outputs = []
    for t in range(q.shape[1]):
        weights = torch.softmax((q[:, t, None] * k[:, : t + 1]).sum(-1) / k.shape[-1] ** 0.5, dim=1)
        outputs.append((weights[..., None] * v[:, : t + 1]).sum(1))
    torch.testing.assert_close(mixed.kind.run(mixed, q, k, v, rest), torch.stack(outputs, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("conv", [0, 4])
def test_autocast_has_the_recurrence_read_bfloat16_with_a_convolution_or_without(conv):
    mixed = Mixer(MixerConfig("kda", 2, 8, 6, conv), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, rest, _ = mixed.inputs(torch.ones(1, 4, 6))
    assert {x.dtype for x in (q, k, v, rest.f, rest.beta)} == {torch.bfloat16}


def test_mixers_decay_by_channel_by_head_or_not_at_all():
    def spread(kind):
        f = mixer(kind).inputs(tokens())[3].f
        return None if f is None else (f.amax(-1) - f.amin(-1)).max().item()

    assert spread("kda") > 0 and spread("dplr") > 0
    assert spread("gdn") == 0 and spread("mamba2") == 0
    assert spread("deltanet") is None and spread("softmax") is None


@pytest.mark.parametrize("kind", ["kda", "gdn", "mamba2", "dplr"])
def test_every_seed_begins_with_the_same_decays_in_an_order_of_its_own(kind):
    mixers = [mixer(kind, seed) for seed in range(8)]
    steps = [F.softplus(each.dt_bias.detach()).float() for each in mixers]
    count = len(steps[0])
    torch.testing.assert_close(steps[0].sort().values, 1e-3 * 100 ** ((torch.arange(count) + 0.5) / count))
    assert all(torch.equal(each.sort().values, steps[0].sort().values) for each in steps)
    assert len({tuple(each.tolist()) for each in steps}) > 1
    for each in mixers:
        torch.testing.assert_close(each.A_log.detach().exp().sort().values.float(), torch.tensor([4.75, 12.25]))


def test_the_transition_of_general_dplr_never_grows_a_state():
    mixed = mixer("dplr")
    A = transitions("dplr", mixed, *mixed.inputs(10 * tokens())[:4])[0]
    assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("options", ABLATIONS)
def test_every_parameter_has_a_gradient_and_no_token_sees_later_ones(kind, options):
    mixed, x = mixer(kind, **options), tokens()
    y = mixed(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixed.parameters())
    later = x.clone()
    later[:, 13:] = 1
    assert torch.equal(mixed(later)[:, :13], y[:, :13])


def test_ablations_leave_out_what_they_say():
    kept = {str(options): mixer("kda", **options) for options in ABLATIONS}
    whole, no_conv, no_gate, silu = kept.values()
    assert no_conv.conv is None and no_gate.g_b is None
    x = tokens()
    assert not torch.equal(whole(x), silu(x)) and whole.state_dict().keys() == silu.state_dict().keys()
    q, *_ = no_conv.inputs(x)
    alone, *_ = no_conv.inputs(x[:, 5:6])
    torch.testing.assert_close(q[:, 5:6], alone)  # reads no other token


def test_gradients_through_a_layer_are_those_of_the_recurrence():
    """The op's backward, with convolution, gates and norm around it, against autograd of a loop in float64."""
    mixed, x = mixer("kda"), tokens(T=9)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def looped(layer: Mixer, x: torch.Tensor) -> torch.Tensor:
        q, k, v, rest, gate = layer.inputs(x)
        A, keys, values, queries = transitions("kda", layer, q, k, v, rest)
        S, o = x.new_zeros(2, 2, 8, 8), []
        for t in range(x.shape[1]):
            S = A[:, t] @ S + keys[:, t, :, :, None] * values[:, t, :, None]
            o.append((queries[:, t, :, None] @ S)[:, :, 0])
        o = F.rms_norm(torch.stack(o, 1), (8,), layer.o_norm, 1e-5)
        gate = torch.sigmoid(F.linear(gate, layer.g_b)).view(o.shape)
        return F.linear((o * gate).flatten(2), layer.out_proj)

    parameters = dict(mixed.named_parameters())
    ours = torch.autograd.grad((mixed(x) * weights).sum(), parameters.values())
    theirs = torch.autograd.grad((looped(mixed, x) * weights).sum(), parameters.values())
    for name, got, expected in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mamba3"}, "mixer must be one of kda, gdn, deltanet, mamba2, dplr, softmax, got 'mamba3'"),
        ({"output_gate": "tanh"}, "output gate must be one of sigmoid, silu, none, got 'tanh'"),
        ({"heads": 0}, "heads, head dim and hidden size must be at least 1"),
    ],
)
def test_a_mixer_that_there_is_not_is_refused(options, message):
    with pytest.raises(MixerError, match=message):
        MixerConfig(**{"kind": "kda", **SIZES, **options})
