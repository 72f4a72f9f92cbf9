"""Settings that every test shares: one torch thread per worker, Hypothesis without chance, clock or memory, and
Triton's interpreter, since no test needs a GPU: what compiles does so in a child process without the variable. What
the machine's user has tuned is not found."""

import importlib.util
import os
import tempfile

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ.pop("KDA_CONFIG_DIR", None)

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")
