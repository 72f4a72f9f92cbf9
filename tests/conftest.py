"""Settings that every test shares: one torch thread per worker, Hypothesis without chance, clock or memory, and
Triton's interpreter, since no test needs a GPU: what compiles does so in a child process without the variable. What
the machine's user has tuned is not found."""

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("TRITON_INTERPRET", "1")
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name
for _name in ("KDA_CONFIG_DIR", "KDA_TUNED", "KDA_COMPILE"):
    os.environ.pop(_name, None)
MODULE = "transformers.models.kimi_linear.modeling_kimi_linear"

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)

_clocks = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("deterministic", derandomize=True, database=None, **_clocks)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def differently_tuned(tmp_path_factory) -> Path:
    """Return a folder with those of the tuned configurations of two ranks, 0 and 1, which differ."""
    from impls import tuned

    folder = tmp_path_factory.mktemp("ranks")
    for rank, T in enumerate((4096, 8192)):
        data = json.loads((tuned.PACKAGED / tuned.GENERIC / "chunk_torch.json").read_text())
        data["entries"][0]["shape"]["T"] = T
        path = tuned.path_of(folder / str(rank), "chunk_torch", tuned.GENERIC)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def theirs():
    """Import transformers' model with its torch functions, whatever faster ones are installed."""
    kept = {name: sys.modules.get(name) for name in ("fla", "causal_conv1d", MODULE)}
    sys.modules.update({"fla": None, "causal_conv1d": None})
    sys.modules.pop(MODULE, None)
    try:
        yield importlib.import_module(MODULE).KimiLinearForCausalLM
    except ImportError:
        pytest.skip("this transformers has no Kimi Linear: 5.16 or later is needed")
    finally:
        sys.modules.update({name: module for name, module in kept.items() if module})
        for name in (name for name, module in kept.items() if module is None):
            sys.modules.pop(name, None)
