"""Settings that every test shares: one torch thread per worker, and Hypothesis without chance, clock or memory."""

import importlib.util

from hypothesis import settings

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")
