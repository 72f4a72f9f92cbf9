"""Failing cases as files: a JSON recipe that --replay reads, and a script that needs only torch and the target.

A file may come from anybody: it is checked before anything is computed, and nothing of it reaches a script as code.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import numpy as np

from impls.table import NAMED
from verify.adapters import registered
from verify.cases import Case
from verify.families import materialise
from verify.peers import PEERS
from verify.properties import PROPERTIES
from verify.recipes import Recipe, from_json, words
from verify.records import DEFINITIONS, INFINITE, SCHEMA, versions
from verify.yardstick import activated, exact_of

SCRIPT_ELEMENTS = 4096
"""Cases with more elements than this get no script: it would hold pages of numbers, and shrinking has failed anyway."""

TARGET = re.compile(r"[\w.]+(:[\w.]+)?")
"""A name from the table, mutant:name, or package.module:function."""

LARGEST = 10**8
"""Largest B*T*HV*K*V of a file's case: fifty times the largest that the deep profile draws."""


def save(folder: Path, failure: dict, adapter: str | None = None) -> Path:
    """Write a failure record as FOLDER/<target>-<property>-<hash>.json, and beside a small case a script.

    adapter: the file of the class through which the target is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "_", f"{failure['target']}-{failure['property']}-{failure['inputs'][:6]}")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**failure, "versions": versions()}, indent=2) + "\n")
    case = materialise(from_json(failure["recipe"]))
    small = sum(x.size for x in (case.q, case.k, case.v, case.g, case.beta, case.initial)) <= SCRIPT_ELEMENTS
    if small and _callable_by_name(failure["target"]):
        path.with_suffix(".py").write_text(script(failure, case, adapter), encoding="utf-8")
    return path


def _callable_by_name(target: str) -> bool:
    """Tell whether a script can call a target: not mutants, which have no name, nor what only an adapter can call."""
    return not target.startswith("mutant:") and (target not in PEERS or PEERS[target].same_signature)


def load(path: Path) -> dict:
    """Read a failure file. Raises ValueError that says what is wrong with it."""
    return checked(path, _problem, lambda recipe: materialise(from_json(recipe)).digest())


def checked(path: Path, problem: Callable[[dict], str | None], digest: Callable[[dict], str]) -> dict:
    """Read a failure record that fits its schema and `problem`, and whose recipe makes the inputs that it names."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--replay {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--replay {path}: not a failure file: {error}") from error
    if found := _misfit(failure) or problem(failure):
        raise ValueError(f"--replay {path}: {found}")
    if (made := digest(failure["recipe"])) != failure["inputs"]:
        recorded = f"hash {made}, recorded {failure['inputs']}"
        raise ValueError(f"--replay {path}: its recipe now makes other inputs ({recorded})")
    return failure


def _misfit(failure: object) -> str | None:
    """Say why something is no failure record, without computing anything of the size that it names."""
    if not isinstance(failure, dict) or failure.get("schema") != SCHEMA or failure.get("kind") != "failure":
        return f"expected a failure record of schema version {SCHEMA}"
    of_kind = {"$ref": "#/$defs/failure", "$defs": DEFINITIONS["$defs"]}  # its errors name fields, the whole's do not
    for schema in (of_kind, DEFINITIONS):
        if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(failure)):
            return f"not a failure record: {error.json_path}: {error.message}"
    return None


def _problem(failure: dict) -> str | None:
    """Say what is wrong with a record of an implementation of the op."""
    if "layers" in failure["recipe"]:
        return "expected the failure of an implementation of the op, got that of a model"
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

import importlib.util
import sys
{environment}from importlib import import_module
{unwrap}from operator import attrgetter

import torch
{repair}
sys.path.insert(0, "")  # as `python -m verify`: modules are looked for where it is run
inf = float("inf")


def tensor(shape, dtype, values):
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to({place!r}, dtype)
{load}

arguments = {{
{arguments}
}}
# the float64 definition of the unchanged case
expected = {{
{expected}
}}

if __name__ == "__main__":
    kernel = {kernel}{leaves}
    positional = [arguments.pop(x) for x in ("q", "k", "v", "g", "beta")]
    returned = kernel(*positional, **arguments)
    results = returned if isinstance(returned, tuple) else (returned,){gradients}
    for (what, right), x in zip(expected.items(), results):
        print(what)
        if not isinstance(x, torch.Tensor):
            print("  got     ", x)
            continue
        x, right = x.detach().double().cpu(), right.cpu()
        print("  got     ", x.flatten().tolist())
        print("  expected", right.flatten().tolist())
        print("  largest difference", (x - right).abs().max().item() if x.numel() else 0.0)
{more}'''

_LEAVES = """
    leaves = [x.requires_grad_() for x in arguments.values() if torch.is_tensor(x) and x.is_floating_point()]"""
_GRADIENTS = """
    starts = [x.to(y.dtype) for x, y in zip(({}), results)]
    results += torch.autograd.grad(results, leaves, starts, allow_unused=True)"""
_MORE = """    print({!r})
"""


def script(failure: dict, case: Case, adapter: str | None = None) -> str:
    """Write a script that calls the target on the case and prints its output beside the definition's.

    It needs torch and the target; in Triton's interpreter this package too, for the mended bfloat16.
    """
    recipe: Recipe = from_json(failure["recipe"])
    asked = failure["property"].removesuffix(INFINITE)
    backward = asked == "reference_backward"
    target, ours = failure["target"], any(impl.name == failure["target"] for impl in NAMED)
    assert TARGET.fullmatch(target)
    module, function, chosen = _called(target, ours, adapter)
    if ours and failure["config"]:
        chosen.append(f"    # found with the launch configuration {ascii(failure['config'])}")
    found = f"property {failure['property']}, {failure['what']} {failure['where']}"
    interpreted = failure["device"] == "interpret"
    kernel = f"load({adapter!r}).{function}()" if adapter else f"attrgetter({function!r})(import_module({module!r}))"
    unwrapped = target in PEERS and PEERS[target].unwrapped
    place = "cpu" if interpreted else failure["device"]
    return _SCRIPT.format(
        environment='import os\n\nos.environ["TRITON_INTERPRET"] = "1"\n' if interpreted else "",
        repair=_REPAIR.format("" if ours else _ADAPT) if interpreted else "",
        place=place,
        about=_comment(
            f"{target} fails on {words(recipe)}",
            f"Found by `python -m verify`: {found}: observed {failure['observed']}, allowed {failure['allowed']}.",
        ),
        kernel=f"unwrap({kernel})" if unwrapped else kernel,
        unwrap="from inspect import unwrap\n" if unwrapped else "",
        load=_LOAD if adapter else "",
        arguments="\n".join((*chosen, *_arguments(case, place))),
        expected="\n".join(_expected(case, backward)),
        leaves=_LEAVES if backward else "",
        gradients=_GRADIENTS.format(", ".join(_starts(case))) if backward else "",
        more="" if asked in ("reference_forward", "reference_backward") else _MORE.format(_not_shown(target, asked)),
    )


def _not_shown(target: str, asked: str) -> str:
    how = f"python -m verify {target} --replay"
    return f"{asked} asks for more than this call: `{how}` and the name of the .json beside this show it"


def _expected(case: Case, backward: bool) -> Iterator[str]:
    """Yield the lines of what the definition says, in the order in which the script finds it."""
    inner, names = activated(case), {"S": "final_state", "dS0": "dinitial_state"}
    exact, _ = exact_of(case, inner.inputs(), inner, backward)
    if case.S0 is None:
        exact.pop("dS0", None)
    for name, x in exact.items():
        shape = case.activation.dt_bias.shape if name == "ddt_bias" else x.shape
        yield f'    "{names.get(name, name)}": tensor({shape}, torch.float64, {_values(x)}),'


def _starts(case: Case) -> Iterator[str]:
    """Yield what makes do and dS, from which a backward starts."""
    for x, dtype in ((case.do, case.dtype), (case.dS, case.state_dtype)):
        yield f"tensor({x.shape}, torch.{dtype}, {_values(x)})"


_REPAIR = """
from verify.interpreter import repair

repair(){}"""
_ADAPT = """
from verify.interpreter_foreign import adapt

adapt()"""
_LOAD = """

def load(file):
    specification = importlib.util.spec_from_file_location("adapter", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
"""


def _called(target: str, ours: bool, adapter: str | None) -> tuple[str, str, list[str]]:
    """Return module and function of a target, and the lines of arguments that it needs beside the case's."""
    if ours:
        return "impls", "kda", [f'    "implementation": {target!r},']
    if peer := PEERS.get(target):
        module, _, function = peer.place.partition(":")
        return module, function, [f'    "{name}": {value!r},' for name, value in peer.keywords.items()]
    point = None if adapter or ":" in target else registered().get(target)
    module, _, function = (point.value if point else target).partition(":")
    return module, function, []


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
