"""Peers: what reaches them of our keywords, with stand-in modules, since neither installs without a GPU."""

import os
import sys
from functools import wraps
from types import ModuleType

import pytest
import torch

from autotune.cases import Case, draw
from autotune.contest import relative_error
from impls import IMPLEMENTATIONS, fused_recurrent_kda, unit_roundoff
from impls.layer_steps import in_one_call
from impls.peers import PEERS, installed
from impls.peers.fla import FLA, FLA_RECURRENT, FLA_SAFE_GATE
from impls.peers.flash_kda import FLASH_KDA
from impls.peers.layers import FLA_LAYER, TRANSFORMERS_LAYER
from impls.peers.training import FLA_ROWS, TRANSFORMERS_ROWS
from impls.table import Impl

ROWS = [row for rows in PEERS.values() for row in rows]
FUSED = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


def tensors(T: int = 6, H: int = 2, K: int = 128, V: int = 128) -> dict[str, torch.Tensor]:
    q = torch.zeros(1, T, H, K, dtype=torch.bfloat16)
    return {"q": q, "k": q, "v": q.new_zeros(1, T, H, V), "g": q, "beta": q[..., 0]}


def asked(**changes) -> dict[str, object]:
    """Return arguments that FlashKDA covers, with changes."""
    H = 2
    others = {"A_log": torch.zeros(H), "dt_bias": torch.zeros(H * 128), "lower_bound": -5.0, "state_v_first": True}
    return {**tensors(), **FUSED, **others, "output_final_state": True, **changes}


def plant(monkeypatch, name: str, **members) -> None:
    """Make a module of that name importable, its parents too."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(members)


@pytest.fixture
def fla(monkeypatch):
    """Stand in for fla.ops.kda with the signature of fla-core 0.6.0 behind a wrapper; returns what was passed."""
    passed = {}

    def chunk_kda(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
        lower_bound=None, disable_recompute=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
    ):  # fmt: skip
        passed.update({**locals(), **kwargs})
        return "o", "state"

    @wraps(chunk_kda)
    def dispatched(*args, **kwargs):
        return chunk_kda(*args, **kwargs)

    def fused_recurrent_kda(
        q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False, lower_bound=None, state_v_first=False, cu_seqlens=None, **kwargs,
    ):  # fmt: skip
        passed.update({**locals(), **kwargs})
        return "o", "state"

    plant(monkeypatch, "fla.ops.kda", chunk_kda=dispatched, fused_recurrent_kda=fused_recurrent_kda)
    monkeypatch.setenv("FLA_FLASH_KDA", "1")
    return passed


@pytest.fixture
def flash(monkeypatch):
    """Stand in for flash_kda, whose fwd writes into the tensors that it gets; returns what was passed."""
    passed = {}

    def fwd(q, k, v, g, beta, scale, out, *, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens):
        passed.update(locals())
        out.fill_(3)
        if final_state is not None:
            final_state.fill_(4)

    plant(monkeypatch, "flash_kda", fwd=fwd)
    return passed


def test_nothing_is_installed_here_and_nothing_is_imported_to_know_it(monkeypatch):
    monkeypatch.setattr("impls.peers.table.find_spec", lambda name: None)
    assert installed() == ()
    assert not {"fla", "flash_kda"} & sys.modules.keys()


def test_an_installed_package_brings_its_rows(monkeypatch):
    monkeypatch.setattr("impls.peers.table.find_spec", lambda name: object() if name == "fla" else None)
    assert installed() == (FLA, FLA_SAFE_GATE, FLA_RECURRENT, FLA_LAYER, *FLA_ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_peer_is_a_row_like_ours_and_not_among_them(row):
    assert isinstance(row, Impl) and row.name not in {own.name for own in IMPLEMENTATIONS}
    of_torch = row is TRANSFORMERS_LAYER or row in TRANSFORMERS_ROWS
    assert row in TRANSFORMERS_ROWS or row.supports(device="cuda:0", dtype="bfloat16", K=128, V=128) is None
    assert (row.supports(device="cpu", dtype="bfloat16") is None) == of_torch
    assert unit_roundoff(row.contract("bfloat16").inverse) > 0


@pytest.mark.parametrize("row", FLA_ROWS, ids=lambda row: row.name)
def test_a_training_step_of_fla_gets_every_argument_and_whether_to_recompute(fla, row):
    with pytest.raises(AttributeError, match="'str' object has no attribute 'detach'"):  # the stand-in computes nothing
        row.load()(**tensors(), A_log=torch.zeros(2), dt_bias=torch.zeros(256), do=torch.zeros(1, 6, 2, 128), **FUSED)
    assert fla["safe_gate"] == ("safe_gate" in row.name) and fla["disable_recompute"] == ("saving" in row.name)


@pytest.mark.parametrize(("row", "safe"), [(FLA, False), (FLA_SAFE_GATE, True)], ids=lambda x: getattr(x, "name", x))
def test_fla_gets_every_argument_and_its_own_safe_gate(fla, row, safe):
    arguments = asked(scale=0.5)
    assert row.load()(**arguments) == ("o", "state")
    assert {name: fla[name] for name in arguments} == arguments
    assert fla["safe_gate"] is safe


def test_fla_runs_its_own_kernels_and_not_flash_kda_under_its_name(fla):
    FLA_SAFE_GATE.load()
    assert os.environ["FLA_FLASH_KDA"] == "0"


def test_fla_s_decode_step_gets_every_argument_and_no_safe_gate(fla):
    arguments = asked(initial_state=torch.zeros(1))
    assert FLA_RECURRENT.load()(**arguments) == ("o", "state")
    assert {name: fla[name] for name in arguments} == arguments and "safe_gate" not in fla
    with pytest.raises(TypeError, match="FLA's fused_recurrent_kda takes no cu_seqlens_cpu"):
        FLA_RECURRENT.load()(**asked(cu_seqlens_cpu=torch.zeros(2)))


def test_fla_is_not_given_what_it_would_swallow(fla):
    with pytest.raises(TypeError, match="takes no state_interval"):
        FLA.load()(**asked(state_interval=64))
    with pytest.raises(ValueError, match="config must be None"):
        FLA.load()(**asked(config={"chunk_size": 64}))
    assert not fla


def test_flash_kda_writes_into_outputs_of_its_layout(flash):
    o, state = FLASH_KDA.load()(**asked())
    assert o.shape == (1, 6, 2, 128) and o.dtype == torch.bfloat16 and (o == 3).all()
    assert state.shape == (1, 2, 128, 128) and state.dtype == torch.float32 and (state == 4).all()
    assert flash["dt_bias"].shape == (2, 128)
    assert flash["scale"] == 128**-0.5 and flash["lower_bound"] == -5.0 and flash["initial_state"] is None


def test_flash_kda_gets_packed_sequences_as_int64(flash):
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    o, state = FLASH_KDA.load()(**asked(cu_seqlens=ends, cu_seqlens_cpu=ends, scale=0.25))
    assert flash["cu_seqlens"].dtype == torch.int64 and flash["cu_seqlens"].tolist() == [0, 2, 6]
    assert state.shape == (2, 2, 128, 128) and flash["scale"] == 0.25


def test_flash_kda_keeps_no_state_that_nobody_asked_for(flash):
    o, state = FLASH_KDA.load()(**asked(output_final_state=False))
    assert state is None and flash["final_state"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower_bound": None}, "bounded gate only: .* got None"),
        ({"lower_bound": -6.0}, "got -6.0"),
        (tensors(K=64), "K = 64, V = 128"),
        (tensors(V=64), "K = 128, V = 64"),
        ({"v": torch.zeros(1, 6, 4, 128)}, "HV must be H = 2, got 4"),
        ({"use_gate_in_kernel": False}, "use_gate_in_kernel must be True"),
        ({"dt_bias": None}, "A_log and dt_bias must be given"),
        ({"state_v_first": False}, "state_v_first must be True"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval must be False"),
        ({"return_intermediate_states": True}, "return_intermediate_states must be False"),
        ({"config": 1}, "config must be None"),
    ],
)
def test_flash_kda_refuses_what_it_would_ignore(flash, changes, message):
    with pytest.raises(ValueError, match=message):
        FLASH_KDA.load()(**asked(**changes))
    assert not flash


def test_flash_kda_takes_no_unknown_keyword(flash):
    with pytest.raises(TypeError, match="takes no chunk_size"):
        FLASH_KDA.load()(**asked(chunk_size=16))


def test_a_layer_of_fla_is_put_together_as_its_own_module_does(monkeypatch):
    """By stand-ins that compute what fla-core 0.6.0 does, whose kernels were run interpreted on the same tensors."""

    def update(x, cache, residual=None, weight=None, bias=None, activation=None):
        cache.copy_(torch.cat((cache[:, :, 1:], x.mT), 2))
        return torch.nn.functional.silu((cache * weight).sum(2))[:, None], cache

    def gated(x, g, weight, bias, activation="swish", eps=1e-6):
        assert activation == "sigmoid" and bias is None
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps) * g.sigmoid()

    plant(monkeypatch, "fla.modules.causal_conv1d.ops", causal_conv1d_update=update)
    plant(monkeypatch, "fla.modules.norm.fused_norm_gate", rms_norm_gated=gated)
    plant(monkeypatch, "fla.ops.kda", fused_recurrent_kda=fused_recurrent_kda)
    case = Case("layer", 3, 1, 2, 16, 16, forms=("layer",), initial=True)
    arguments = draw(case, "cpu", "float32")
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    expected = in_one_call(**arguments)
    for found, exact in zip(FLA_LAYER.call(**arguments), expected, strict=True):
        assert relative_error(found, exact) < 1e-6
    assert all(torch.equal(arguments[name], x) for name, x in before.items())
