"""Failing cases as files: a JSON recipe that --replay reads, and a script that needs only torch and the target."""

import json
import re
from pathlib import Path

import numpy as np

from kda_spec.recurrent import recurrent
from verify.cases import Case
from verify.families import materialise
from verify.properties import PROPERTIES
from verify.recipes import Recipe, from_json, words
from verify.records import INFINITE, SCHEMA, versions
from verify.yardstick import activated

SCRIPT_ELEMENTS = 4096
"""Cases with more elements than this get no script: it would hold pages of numbers, and shrinking has failed anyway."""

NEEDED = {"target", "device", "property", "recipe", "inputs", "config", "contract"}
"""Fields of a failure record without which it cannot be replayed."""


def save(folder: Path, failure: dict) -> Path:
    """Write a failure record as FOLDER/<target>-<property>-<hash>.json, and beside a small case a script."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "_", f"{failure['target']}-{failure['property']}-{failure['inputs'][:6]}")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**failure, "versions": versions()}, indent=2) + "\n")
    case = materialise(from_json(failure["recipe"]))
    if sum(x.size for x in (case.q, case.k, case.v, case.g, case.beta, case.initial)) <= SCRIPT_ELEMENTS:
        path.with_suffix(".py").write_text(script(failure, case))
    return path


def load(path: Path) -> dict:
    """Read a failure file. Raises ValueError that says what is wrong with it."""
    try:
        failure = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--replay {path}: not a failure file: {error}") from error
    if not isinstance(failure, dict) or failure.get("schema") != SCHEMA or failure.get("kind") != "failure":
        raise ValueError(f"--replay {path}: expected a failure record of schema version {SCHEMA}")
    if missing := sorted(NEEDED - set(failure)):
        raise ValueError(f"--replay {path}: the record lacks {', '.join(missing)}")
    if failure["property"].removesuffix(INFINITE) not in {p.name for p in PROPERTIES}:
        raise ValueError(f"--replay {path}: unknown property {failure['property']} (--list names them)")
    made = materialise(from_json(failure["recipe"])).digest()
    if made != failure["inputs"]:
        raise ValueError(
            f"--replay {path}: its recipe now makes other inputs (hash {made}, recorded {failure['inputs']})"
        )
    return failure


_SCRIPT = '''"""{title}

{words}
Found by `python -m verify`: property {property}, {what}: observed {observed}, allowed {allowed}.
"""

import importlib
from operator import attrgetter

import torch

inf = float("inf")


def tensor(shape, dtype, values):
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


arguments = {{
{arguments}
}}
# the float64 definition of the unchanged case
expected = {{
    "o": tensor({o_shape}, torch.float64, {o}),
    "final_state": tensor({S_shape}, torch.float64, {S}),
}}

if __name__ == "__main__":
    module, name = {target!r}.split(":")
    positional = [arguments.pop(x) for x in ("q", "k", "v", "g", "beta")]
    returned = attrgetter(name)(importlib.import_module(module))(*positional, **arguments)
    for (what, right), x in zip(expected.items(), returned):
        print(what)
        print("  got     ", x.double().flatten().tolist())
        print("  expected", right.flatten().tolist())
        print("  largest difference", (x.double() - right).abs().max().item() if x.numel() else 0.0)
'''


def script(failure: dict, case: Case) -> str:
    """Write a script that calls the target on the case and prints its output beside the definition's."""
    recipe: Recipe = from_json(failure["recipe"])
    exact = recurrent(activated(case).inputs())
    target = failure["target"] if ":" in failure["target"] else f"impls:{_public(failure['target'])}"
    return _SCRIPT.format(
        title=f"A case on which {failure['target']} fails.",
        words=words(recipe),
        property=failure["property"],
        what=failure["what"],
        observed=failure["observed"],
        allowed=failure["allowed"],
        target=target,
        arguments="\n".join(_arguments(case)),
        o_shape=exact.o.shape,
        o=_values(exact.o),
        S_shape=exact.final_state.shape,
        S=_values(exact.final_state),
    )


def _public(name: str) -> str:
    return "chunk_kda" if name.startswith("chunk") else "fused_recurrent_kda"


def _arguments(case: Case) -> list[str]:
    tensors = {
        "q": (case.q, case.dtype),
        "k": (case.k, case.dtype),
        "v": (case.v, case.dtype),
        "g": (case.g, case.gate_dtype),
        "beta": (case.beta, case.gate_dtype),
    }
    a = case.activation
    optional = {"initial_state": case.S0, "A_log": a.A_log, "dt_bias": a.dt_bias}
    tensors |= {name: (x, case.state_dtype) for name, x in optional.items() if x is not None}
    lines = [f'    "{name}": tensor({x.shape}, torch.{dtype}, {_values(x)}),' for name, (x, dtype) in tensors.items()]
    flags = {
        "scale": case.scale,
        "chunk_size": case.chunk_size,
        "lower_bound": a.lower_bound,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": a.l2norm or None,
        "use_gate_in_kernel": a.gate != "none" or None,
        "use_beta_sigmoid_in_kernel": a.sigmoid != "none" or None,
        "allow_neg_eigval": a.sigmoid == "twice" or None,
    }
    lines += [f'    "{name}": {value!r},' for name, value in flags.items() if value is not None]
    if case.cu_seqlens is not None:
        lines.append(f'    "cu_seqlens": torch.tensor({list(case.cu_seqlens)}),')
    return lines


def _values(x: np.ndarray) -> str:
    return "[" + ", ".join(repr(float(v)) for v in x.reshape(-1)) + "]"
