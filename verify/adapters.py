"""Objects that stand between the judge and a kernel whose arguments, layouts or domain are not FLA's.

    class MyKernel:                                  # my_adapter.py;  python -m verify --adapter my_adapter.py:MyKernel
        dtypes = ("bfloat16",)
        refuses = {"varlen": "one sequence a call", "backward": "inference only"}

        def __call__(self, q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False):
            ...
            return o, final_state

An adapter is a class without arguments. Its instance is called as FLA's chunk_kda is, with what the case needs, and
returns (o [B, T, HV, V], final state [N, HV, K, V] or None). Everything else is optional:

    dtypes       input dtypes that it takes; others are not tried
    refuses      axis of the domain -> why it does not take it: UNSUPPORTED, with its share of the recipes
    chunk_sizes  chunk lengths that it takes as chunk_size=
    devices      of cpu, cuda and interpret (Triton's interpreter), those on which it runs; the first that there is
                 is taken where none is named
    form         "chunk", or "recurrent" where it goes token by token: what a call costs in the interpreter
    keywords     names that it takes beside those of its signature, through **kwargs
    contract     the operands' dtype, or a function of the input dtype's name that returns a
                 impls.contracts.PrecisionContract; without it: operands as the inputs, sums and state in float32
    settle       a function from a recipe to the nearest one that it takes, where an axis does not say it
    inverse      a function (k, g, beta) [B, T, HV, ..] -> (I + diag(beta) L)^-1 diag(beta) [B, HV, chunks, C, C]
                 of every chunk, where the kernel keeps it: its norm is bounded

Third parties register classes or functions under the entry-point group `kda_verify.implementations`; their names are
targets, and are imported only when they are named.
"""

import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from impls.contracts import PrecisionContract
from verify.recipes import AXES, DTYPES
from verify.targets import OTHER_AXES, Target, TargetError, default_contract, named_keywords

GROUP = "kda_verify.implementations"
KINDS = ("cpu", "cuda", "interpret")


def registered() -> dict[str, EntryPoint]:
    """Return what is registered under the entry-point group, by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def loaded(file: Path) -> ModuleType:
    """Import a file as a module of its stem's name; its folder is on the path, as for a script.

    Raises TargetError for what is no file, and for whatever it raises.
    """
    if not file.is_file():
        raise TargetError(f"--adapter {file}: no such file")
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None:
        raise TargetError(f"--adapter {file}: expected a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module
    if str(file.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(file.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"--adapter {file}: {type(error).__name__}: {error}") from error
    return module


def attribute(module: ModuleType, path: str, place: str) -> object:
    """Find a name in a module. Raises TargetError that lists what it has, the nearest first."""
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{place}: no {part} in {getattr(found, '__name__', path)}{_offered(found, part)}")
        found = getattr(found, part)
    return found


def _offered(owner: object, wanted: str) -> str:
    names = [name for name in dir(owner) if not name.startswith("_") and callable(getattr(owner, name, None))]
    nearest = get_close_matches(wanted, names, 3, 0.5)
    meant = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{meant} It has {', '.join(names[:20])}{' and more' if len(names) > 20 else ''}" if names else meant


def adapted(name: str, adapter: type, device: str, contract: str | None) -> Target:
    """Make a target of an adapter class. Raises TargetError that names the attribute which is not as expected."""
    try:
        made = adapter()
    except (Exception, SystemExit) as error:
        raise TargetError(f"{name}: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise TargetError(f"{name}: expected a class with __call__(q, k, v, g, beta, ...)")
    devices = tuple(getattr(made, "devices", KINDS))
    if device.split(":")[0] not in devices:
        raise TargetError(f"{name} runs on {', '.join(devices)}, not on {device}")
    refuses, dtypes = dict(getattr(made, "refuses", {})), tuple(getattr(made, "dtypes", DTYPES))
    _check(name, "refuses", refuses, (*AXES, *OTHER_AXES))
    _check(name, "dtypes", dtypes, DTYPES)
    return Target(
        name,
        made,
        _contract(name, made, contract),
        dtypes,
        chunks=tuple(getattr(made, "chunk_sizes", ())),
        named=named_keywords(made) | frozenset(getattr(made, "keywords", ())),
        backward="backward" not in refuses,
        foreign=True,
        device=device,
        form=getattr(made, "form", "chunk"),
        refused=refuses,
        settle=getattr(made, "settle", None) or (lambda recipe: recipe),
        inverse=getattr(made, "inverse", None),
    )


def _check(name: str, field: str, given, known: tuple[str, ...]) -> None:
    for x in given:
        if x not in known:
            nearest = get_close_matches(x, known, 1, 0.3)
            meant = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise TargetError(f"{name}: {field} must name some of {', '.join(known)}, got {x!r}{meant}")


def _contract(name: str, made: object, asked: str | None) -> Callable[[str], PrecisionContract]:
    own = getattr(made, "contract", None)
    if asked or own is None:
        return (lambda _: default_contract(asked)) if asked else default_contract
    if isinstance(own, str):
        _check(name, "contract", (own,), DTYPES)
        return lambda _: default_contract(own)
    return own
