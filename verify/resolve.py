"""Find what a name stands for: a row of the table, a mutant's target, a peer, or anybody's kernel by module or file."""

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

from impls import configs, table
from verify import adapters
from verify.inverses import INVERSES
from verify.peers import PEERS
from verify.targets import STANDARD, Target, TargetError, default_contract, named_keywords

SIGNATURE = "f(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens, ...)"


def resolve(
    name: str, device: str, config: Path | None = None, contract: str | None = None, adapter: str | None = None
) -> Target:
    """Find a target. Raises TargetError for unknown names, modules that do not import, or something not callable.

    adapter: the file that holds the class which `name` names behind its colon.
    """
    if adapter is not None:
        file, attribute = Path(adapter), name.partition(":")[2]
        found = adapters.attribute(adapters.loaded(file), attribute, f"--adapter {adapter}")
        return _taken(name, found, device, contract)
    if ":" in name:
        return _taken(name, _imported(name), device, contract)
    if peer := PEERS.get(name):
        kind = device.split(":")[0]
        if kind not in peer.devices:
            raise TargetError(f"{name} runs on {', '.join(peer.devices)}, not on {device}")
        return _taken(name, peer.adapter or _imported(peer.place), device, contract)
    if point := adapters.registered().get(name) if not _ours(name) else None:
        try:
            found = point.load()
        except (Exception, SystemExit) as error:
            raise TargetError(f"{name} ({point.value}): {type(error).__name__}: {error}") from error
        return _taken(name, found, device, contract)
    return _row(name, device, config)


def _ours(name: str) -> bool:
    return any(impl.name == name for impl in table.NAMED)


def _row(name: str, device: str, config: Path | None) -> Target:
    try:
        impl = table.find(name)
    except (KeyError, ValueError) as error:
        raise TargetError(f"{error.args[0]}; or name anybody's kernel as package.module:function") from error
    if device.split(":")[0] not in impl.devices:
        raise TargetError(f"{name} runs on {', '.join(impl.devices)}, not on {device}")
    launch = None if config is None else _configuration(impl, config)
    return Target(
        name,
        lambda *a, **k: impl.call(*a, config=launch, **k),
        impl.contract,
        tuple(impl.dtypes),
        chunks=tuple(impl.chunk_sizes or ()) if launch is None else (),
        backward=impl.backward,
        device=device,
        form=impl.form,
        named=STANDARD if impl.chunk_sizes and launch is None else STANDARD - {"chunk_size"},
        inverse=INVERSES.get(name),
    )


def _configuration(impl: table.Impl, path: Path) -> object:
    if impl.config is None:
        raise TargetError(f"--config {path}: {impl.name} has no launch configuration")
    try:
        config = impl.config(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise TargetError(f"--config {path}: not a launch configuration of {impl.name}: {error}") from error
    if reason := configs.invalid(config):
        raise TargetError(f"--config {path}: {reason}")
    return config


def _imported(name: str) -> object:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything, or leave, while it is imported
        raise TargetError(f"{name}: {type(error).__name__}: {error}") from error
    return adapters.attribute(module, attribute, name)


def _taken(name: str, found: object, device: str, contract: str | None) -> Target:
    """Make a target of a function, or of an adapter class."""
    if isinstance(found, type):
        return adapters.adapted(name, found, device, contract)
    if not callable(found):
        raise TargetError(f"{name}: expected a function with the signature of chunk_kda, got {type(found).__name__}")
    if reason := misfit(found):
        raise TargetError(f"{name}: expected {SIGNATURE}, {reason}")
    return Target(
        name,
        found,
        (lambda _: default_contract(contract)) if contract else default_contract,
        ("float32", "bfloat16", "float16", "float64"),
        named=named_keywords(found),
        foreign=True,
        device=device,
    )


def misfit(function: Callable) -> str | None:
    """Say why a function cannot be called with q, k, v, g, beta and FLA's keywords; None where it can, or hides it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    needed = [x for x in signature.parameters.values() if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    variable = any(x.kind is x.VAR_POSITIONAL for x in signature.parameters.values())
    if len(needed) < 5 and not variable:
        return f"got {function.__name__}{signature}: it takes {len(needed)} of the five tensors"
    others = [x for x in list(signature.parameters.values())[5 if not variable else 0 :] if x.default is x.empty]
    unknown = [
        x.name for x in others if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD) and x.name not in STANDARD
    ]
    return f"got {function.__name__}{signature}: {', '.join(unknown)} would have no value" if unknown else None
