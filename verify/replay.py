"""Failing cases as files: a JSON recipe that --replay reads, and a script that needs only torch and the target.

A file may come from anybody: it is checked before anything is computed, and nothing of it reaches a script as code.
"""

import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np

from kda_spec.recurrent import recurrent
from verify.cases import Case
from verify.families import materialise
from verify.properties import PROPERTIES
from verify.recipes import Recipe, from_json, words
from verify.records import DEFINITIONS, INFINITE, SCHEMA, versions
from verify.yardstick import activated

SCRIPT_ELEMENTS = 4096
"""Cases with more elements than this get no script: it would hold pages of numbers, and shrinking has failed anyway."""

TARGET = re.compile(r"[\w.]+(:[\w.]+)?")
"""A name from the table, mutant:name, or package.module:function."""

LARGEST = 10**8
"""Largest B*T*HV*K*V of a file's case: fifty times the largest that the deep profile draws."""


def save(folder: Path, failure: dict) -> Path:
    """Write a failure record as FOLDER/<target>-<property>-<hash>.json, and beside a small case a script."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "_", f"{failure['target']}-{failure['property']}-{failure['inputs'][:6]}")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**failure, "versions": versions()}, indent=2) + "\n")
    case = materialise(from_json(failure["recipe"]))
    small = sum(x.size for x in (case.q, case.k, case.v, case.g, case.beta, case.initial)) <= SCRIPT_ELEMENTS
    if small and not failure["target"].startswith("mutant:"):  # whose functions have no name to be imported by
        path.with_suffix(".py").write_text(script(failure, case), encoding="utf-8")
    return path


def load(path: Path) -> dict:
    """Read a failure file. Raises ValueError that says what is wrong with it."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--replay {path}: not a failure file: {error}") from error
    if problem := _problem(failure):
        raise ValueError(f"--replay {path}: {problem}")
    made = materialise(from_json(failure["recipe"])).digest()
    if made != failure["inputs"]:
        raise ValueError(
            f"--replay {path}: its recipe now makes other inputs (hash {made}, recorded {failure['inputs']})"
        )
    return failure


def _problem(failure: object) -> str | None:
    """Say what is wrong with a file's content, without computing anything of the size that it names."""
    if not isinstance(failure, dict) or failure.get("schema") != SCHEMA or failure.get("kind") != "failure":
        return f"expected a failure record of schema version {SCHEMA}"
    of_kind = {"$ref": "#/$defs/failure", "$defs": DEFINITIONS["$defs"]}  # its errors name fields, the whole's do not
    for schema in (of_kind, DEFINITIONS):
        if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(failure)):
            return f"not a failure record: {error.json_path}: {error.message}"
    if not TARGET.fullmatch(failure["target"]):
        return f"expected a target like package.module:function, got {failure['target']!r}"
    if failure["property"].removesuffix(INFINITE) not in {p.name for p in PROPERTIES}:
        return f"unknown property {failure['property']} (--list names them)"
    return _unmakeable(failure["recipe"])


def _unmakeable(recipe: dict) -> str | None:
    """Say why no case can be made of a recipe that fits the schema (to which 3.0 is an integer)."""
    lengths = recipe["lengths"]
    if floats := [x for x in (*recipe.values(), *lengths) if isinstance(x, float)]:
        return f"recipe: expected integers, got {floats[0]}"
    if lengths and (recipe["B"] != 1 or recipe["T"] != sum(lengths)):
        return f"recipe: lengths {lengths} need B=1 and T={sum(lengths)}, got B={recipe['B']} T={recipe['T']}"
    sizes = [max(recipe["B"], len(lengths)), max(recipe["T"], 1), *(recipe[x] for x in "HGKV")]
    if math.prod(sizes) > LARGEST:
        return f"recipe: B*T*HV*K*V is at most {LARGEST:.0e} in a file, got {words(from_json(recipe))}"
    return None


_SCRIPT = '''"""Call a kernel on one case, and print its results beside those of the float64 definition."""

{about}

import importlib
{environment}from operator import attrgetter

import torch
{repair}
inf = float("inf")


def tensor(shape, dtype, values):
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to({place!r}, dtype)


arguments = {{
{arguments}
}}
# the float64 definition of the unchanged case
expected = {{
    "o": tensor({o_shape}, torch.float64, {o}),
    "final_state": tensor({S_shape}, torch.float64, {S}),
}}

if __name__ == "__main__":
    kernel = attrgetter({function!r})(importlib.import_module({module!r}))
    positional = [arguments.pop(x) for x in ("q", "k", "v", "g", "beta")]
    returned = kernel(*positional, **arguments)
    results = returned if isinstance(returned, tuple) else (returned,)
    for (what, right), x in zip(expected.items(), results):
        print(what)
        if not isinstance(x, torch.Tensor):
            print("  got     ", x)
            continue
        x, right = x.double().cpu(), right.cpu()
        print("  got     ", x.flatten().tolist())
        print("  expected", right.flatten().tolist())
        print("  largest difference", (x - right).abs().max().item() if x.numel() else 0.0)
'''


def script(failure: dict, case: Case) -> str:
    """Write a script that calls the target on the case and prints its output beside the definition's.

    In Triton's interpreter it needs this package too, for the mended bfloat16.
    """
    recipe: Recipe = from_json(failure["recipe"])
    exact = recurrent(activated(case).inputs())
    target, own = failure["target"], ":" not in failure["target"]
    assert TARGET.fullmatch(target)
    module, _, function = ("impls:kda" if own else target).partition(":")
    chosen = [f'    "implementation": {target!r},'] if own else []
    if own and failure["config"]:
        chosen.append(f"    # found with the launch configuration {ascii(failure['config'])}")
    found = f"property {failure['property']}, {failure['what']} {failure['where']}"
    interpreted = failure["device"] == "interpret"
    place = "cpu" if interpreted else failure["device"]
    return _SCRIPT.format(
        environment='import os\n\nos.environ["TRITON_INTERPRET"] = "1"\n' if interpreted else "",
        repair="\nfrom verify.interpreter import repair\n\nrepair()" if interpreted else "",
        place=place,
        about=_comment(
            f"{target} fails on {words(recipe)}",
            f"Found by `python -m verify`: {found}: observed {failure['observed']}, allowed {failure['allowed']}.",
        ),
        module=module,
        function=function,
        arguments="\n".join((*chosen, *_arguments(case, place))),
        o_shape=exact.o.shape,
        o=_values(exact.o),
        S_shape=exact.final_state.shape,
        S=_values(exact.final_state),
    )


def _comment(*lines: str) -> str:
    """Return lines of comment; whatever could end a line, a target's exceptions among it, is escaped."""
    return "\n".join("# " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in lines)


def _arguments(case: Case, place: str) -> list[str]:
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
        lines.append(f'    "cu_seqlens": torch.tensor({list(case.cu_seqlens)}, device={place!r}),')
    return lines


def _values(x: np.ndarray) -> str:
    return "[" + ", ".join(repr(float(v)) for v in x.reshape(-1)) + "]"
