"""Code written against flash-linear-attention's import paths runs on our ops, with and without an FLA beside it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
FLA = {
    "__init__.py": "from fla.ops import chunk_kda\n",
    "ops/__init__.py": "from .kda import chunk_kda, fused_recurrent_kda\nfrom .other import attention\n",
    "ops/other.py": "def attention(): return 'theirs'\n",
    "ops/kda/__init__.py": "from .chunk import chunk_kda, fused_recurrent_kda\n",
    "ops/kda/chunk.py": "def chunk_kda(): return 'theirs'\ndef fused_recurrent_kda(): return 'theirs'\n",
    "ops/kda/gate.py": "def fused_kda_gate(): return 'theirs'\n",
    "layers.py": "from fla.ops.kda import chunk_kda\n",
}
"""A package laid out as FLA is: what is defined in one place is bound by name in others."""
MODEL = '''
import torch
from torch import nn
from fla.ops.kda import chunk_kda, fused_recurrent_kda

class Mixer(nn.Module):
    """A KDA layer as the released remote code has it: activations inside the kernels, chunks above 64 tokens."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.f = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.b = nn.Linear(width, heads, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.rand(heads)), nn.Parameter(torch.rand(width))

    def forward(self, x, state=None):
        q, k, v, g = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v, self.f))
        op = chunk_kda if x.shape[1] > 64 else fused_recurrent_kda
        o, state = op(
            q=q, k=k, v=v, g=g, beta=self.b(x), A_log=self.A_log, dt_bias=self.dt_bias, initial_state=state,
            output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, cu_seqlens=None,
        )
        return o.flatten(2), state
'''


@pytest.fixture
def elsewhere(tmp_path):
    """Return a function: run a program in a process whose path has files that are given, and return what it prints."""

    def run(program: str, files: dict[str, str]) -> list[str]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", HIDING + program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


HIDING = """
# an FLA that is installed is not found: the tests bring their own, or none
import importlib.util, sys, sysconfig
from importlib.machinery import PathFinder
installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] == "fla" and path is None:
            path = [x for x in sys.path if x not in installed]
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
from impls import chunk_kda as ours, fla_compat
"""
INSIDE = {f"fla/{name}": text for name, text in FLA.items()}


@pytest.mark.parametrize("files", [{}, INSIDE], ids=["no FLA", "an FLA"])
def test_a_model_written_for_fla_has_the_results_of_our_recurrence(elsewhere, files):
    program = """
fla_compat.install()
import torch, model
from impls import kda
torch.manual_seed(0)
mixer, x = model.Mixer(), torch.randn(2, 80, 16)
q, k, v, g = (part(x).unflatten(-1, (2, -1)) for part in (mixer.q, mixer.k, mixer.v, mixer.f))
o, S = kda(q, k, v, g, mixer.b(x), implementation="recurrent_torch", A_log=mixer.A_log, dt_bias=mixer.dt_bias,
    output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
whole, state = mixer(x)
first, between = mixer(x[:, :70])
rest, last = mixer(x[:, 70:], between)
for found, expected in ((whole, o.flatten(2)), (torch.cat((first, rest), 1), o.flatten(2)), (state, S), (last, S)):
    print(float((found - expected).norm() / expected.norm()) < 1e-5)
whole.square().sum().backward()
print(bool(mixer.A_log.grad.norm() > 0))
"""
    assert elsewhere(program, {"model.py": MODEL} | files) == ["True"] * 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_where_fla_is_the_two_functions_are_ours_and_the_rest_its_own(elsewhere, when):
    imports = "import fla.layers, fla.ops.kda.gate\n"
    install = "fla_compat.install(); fla_compat.install()\n"
    program = (
        (install + imports if when == "before" else imports + install)
        + """
import fla
places = (fla, fla.ops, fla.ops.kda, fla.ops.kda.chunk, fla.layers)
print(all(place.chunk_kda is ours for place in places))
print(fla.ops.attention(), fla.ops.kda.gate.fused_kda_gate())
fla_compat.uninstall(); fla_compat.uninstall()
print(*{place.chunk_kda() for place in places}, fla.ops.kda.fused_recurrent_kda())
import inspect; print("chunk_kda" in inspect.getsource(fla.ops.kda))
"""
    )
    assert elsewhere(program, INSIDE) == ["True", "theirs", "theirs", "theirs", "theirs", "True"]


def test_where_fla_is_not_it_is_gone_again_afterwards(elsewhere):
    program = """
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
import importlib
names = ("fla", "fla.ops.kda", "fla.modules")
for change in (fla_compat.install, fla_compat.uninstall, fla_compat.install):
    change()
    print(*map(found, names))
from fla.ops.kda import *
print(chunk_kda is ours)
try:
    import fla.modules
except ModuleNotFoundError as error:
    print(error.name)
"""
    there, gone = ["True", "True", "False"], ["False"] * 3
    assert elsewhere(program, {}) == [*there, *gone, *there, "True", "fla.modules"]


def test_an_fla_that_cannot_be_imported_says_so_itself(elsewhere):
    program = """
fla_compat.install()
try:
    import fla.ops.kda
except ImportError as error:
    print(error)
"""
    assert elsewhere(program, INSIDE | {"fla/ops/kda/chunk.py": "raise ImportError('broken')"}) == ["broken"]


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
def test_the_fla_that_is_installed_keeps_all_but_the_two(tmp_path):
    program = """
import warnings; warnings.simplefilter("ignore")
from impls import chunk_kda as ours, fla_compat
fla_compat.install()
import fla.ops
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.gate import fused_kda_gate
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
print(chunk_kda is ours, fla.ops.chunk_kda is ours, fused_kda_gate.__module__, chunk_gated_delta_rule.__module__[:4])
fla_compat.uninstall()
print(fla.ops.chunk_kda.__module__, fla.ops.kda.chunk_kda.__module__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    own = ["fla.ops.kda.chunk"] * 2
    assert done.stdout.split() == ["True", "True", "fla.ops.kda.gate", "fla.", *own]
