"""The definition stands alone: it imports NumPy and itself, nothing else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
for name in ("torch", "triton", "impls", "verify", "hypothesis", "mpmath"):
    sys.modules[name] = None
import numpy as np
import kda_spec
inputs = kda_spec.Inputs(*np.ones((3, 1, 2, 1, 4)) / 2, g=-np.ones((1, 2, 1, 4)), beta=np.ones((1, 2, 1)))
print(kda_spec.gradients(inputs, kda_spec.recurrent(inputs).o).q.shape)
print(sorted(name for name in kda_spec.__all__ if not hasattr(kda_spec, name)))
"""


def test_the_definition_runs_without_torch_and_triton():
    result = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(1, 2, 1, 4)", "[]"]
