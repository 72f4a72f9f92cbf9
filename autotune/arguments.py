"""Read what stands on command lines: implementations, shapes, targets, times, fields; else UsageError."""

import json
import re

from autotune.outcomes import UsageError
from impls.plan import Problem
from impls.table import NAMED, Impl
from impls.targets import TARGETS, Target
from impls.tuned import Shape

DTYPES = ("bfloat16", "float16", "float32")


def implementation_of(name: str) -> Impl:
    """Return the implementation of that name; UsageError where there is none."""
    found = {x.name: x for x in NAMED}
    if name not in found:
        raise UsageError(f"OP must be one of {', '.join(found)}, got {name!r}")
    return found[name]


def problem_of(text: str, dtype: str) -> Problem:
    """Read T=N,H=N,...; UsageError for what is no size."""
    sizes = {"T": 8192, "H": 64, "HV": 0, "K": 128, "V": 128, "N": 1}
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        if name not in sizes or not number.isdecimal() or int(number) < 1:
            raise UsageError(f"--shape: expected {'=N, '.join(sizes)}=N with N from 1 on, got {item!r}")
        sizes[name] = int(number)
    sizes["HV"] = sizes["HV"] or sizes["H"]
    return Problem(B=1, packed=sizes["N"] > 1, dtype=dtype, l2norm=True, gate="softplus", sigmoid="once", **sizes)


def target_of(implementation: Impl, name: str | None) -> Target | None:
    """Return the processor of that name, None for cpu; UsageError where the implementation does not run there."""
    if name is None:
        name = "cpu" if "cpu" in implementation.devices else "sm_90"
    if name != "cpu" and name not in TARGETS:
        raise UsageError(f"--target must be cpu or one of {', '.join(TARGETS)}, got {name!r}")
    if ("cpu" in implementation.devices) != (name == "cpu"):
        raise UsageError(f"--target {name}: {implementation.name} is tuned for {', '.join(implementation.devices)}")
    return None if name == "cpu" else TARGETS[name]


def shape_of(text: str) -> Shape:
    """Read T=N,dtype=NAME,...; UsageError for what is none."""
    found = {"T": 4096, "N": 1, "HV": 16, "K": 128, "V": 128, "dtype": "float32", "packed": False}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name == "dtype" and value in DTYPES:
            found[name] = value
        elif name == "packed" and value in ("true", "false"):
            found[name] = value == "true"
        elif name in ("T", "N", "HV", "K", "V") and value.isdecimal() and int(value):
            found[name] = int(value)
        else:
            raise UsageError(f"--shape: expected T, N, HV, K, V, dtype ({', '.join(DTYPES)}) or packed, got {item!r}")
    return Shape(**found)


def seconds_of(text: str, name: str) -> float:
    """Read 90, 90s or 1.5m; UsageError naming the argument for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([sm]?)", text)
    if not found or float(found[1]) == 0:
        raise UsageError(f"{name} must be seconds or minutes, as 120s or 2m, got {text!r}")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def fixed_of(text: str) -> tuple[str, object]:
    """Read FIELD=VALUE; UsageError for what is none. `space_of` refuses unknown fields."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise UsageError(f"--fix must be FIELD=VALUE with a number, true or false, got {text!r}") from None
