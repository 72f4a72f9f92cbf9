"""Which implementations are judged, and on which device: what is named, what a device has, what this machine offers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch

from impls.table import IMPLEMENTATIONS, NAMED, Impl
from verify import adapters, interpreter
from verify.peers import PEERS
from verify.replay import TARGET

DEVICES = ("cpu", "cuda", "cuda:N", "interpret")


class UsageError(Exception):
    """The command line asks for something that does not exist; the message says what was expected."""


@dataclass
class Choice:
    """What is to be judged, by target its device; and by implementation why it is not judged here."""

    devices: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def own(name: str) -> bool:
    """Tell whether a target is one of ours: a row of the table or a mutant, which any file may name."""
    return name.startswith("mutant:") or any(impl.name == name for impl in NAMED)


def meant(wrong: str, known: Iterable[str]) -> str:
    """Return a question for the nearest names, or nothing where none is near."""
    nearest = get_close_matches(wrong, list(known), 2, 0.6)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def check_device(device: str) -> None:
    """Raise UsageError for what is no device."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "interpret") or (number and (kind != "cuda" or not number.isdecimal())):
        raise UsageError(
            f"--device must be cpu, cuda, cuda:N or interpret, got {device}{meant(device, DEVICES)}"
        )


def choose(asked: list[str], device: str | None, adapter: str | None = None) -> Choice:
    """Choose targets by name or group; without a device, each on the first that it has and this machine offers.

    What a group holds and cannot run here is listed with the reason; what is named must run. `adapter` is FILE:Class,
    one more target. Raises UsageError.
    """
    choice = Choice()
    if adapter is not None:
        choice.devices[adapter_target(adapter)] = device or "cpu"
    for name in asked or ([] if adapter else ["all"]):
        if ":" in name:
            if not TARGET.fullmatch(name):
                raise UsageError(f"expected package.module:function, got {name}")
            choice.devices[name] = device or "cpu"
        elif name in PEERS:
            choice.devices[name] = device or _peers_device(name)
        elif name in adapters.registered() and not own(name):
            choice.devices[name] = device or "cpu"
        else:
            _choose_ours(choice, name, device)
    if not asked and device is not None:  # what a device runs was asked for, not the rest
        choice.absent.clear()
    return choice


def adapter_target(adapter: str) -> str:
    """Return the target's name of FILE:Class. Raises UsageError for anything else."""
    file, colon, name = adapter.rpartition(":")
    stem = file.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    if not (colon and TARGET.fullmatch(f"{stem}:{name}")):
        raise UsageError(f"--adapter must be FILE:Class, got {adapter}")
    return f"{stem}:{name}"


def _choose_ours(choice: Choice, name: str, device: str | None) -> None:
    for impl in _rows(name):
        reason = _reason(impl, device)
        if reason and name == impl.name:
            raise UsageError(reason)
        if reason:
            choice.absent[impl.name] = reason
        else:
            choice.devices[impl.name] = device or first_device(impl.devices)


def _rows(name: str) -> list[Impl]:
    """Return the rows of the table that a name or group stands for."""
    if name == "all":
        return list(IMPLEMENTATIONS)
    if name == "cpu":
        return [impl for impl in IMPLEMENTATIONS if "cpu" in impl.devices]
    named = {impl.name: impl for impl in NAMED}
    if name in named:
        return [named[name]]
    ours, others = sorted(named), [*PEERS, *adapters.registered()]
    nearest = meant(name, [*ours, *others, "all", "cpu", "kimi_linear"])
    raise UsageError(
        f"unknown target {name}{nearest}; known are {', '.join(ours)}, all, cpu, or package.module:function, "
        f"and where their packages are installed {', '.join(others)}"
    )


def _peers_device(name: str) -> str:
    peer = PEERS[name]
    if not peer.installed:
        raise UsageError(f"{name} needs {peer.distribution}, which is not installed")
    if found := first_device(peer.devices):
        return found
    raise UsageError(f"{name} runs on {', '.join(peer.devices)}: there is no GPU")


def first_device(devices: tuple[str, ...]) -> str | None:
    """Return the first of these devices that this machine offers; None where it offers none."""
    offered = {"cpu": "cpu"}
    if torch.cuda.is_available():
        offered["cuda"] = "cuda:0"
    if interpreter.installed():
        offered["interpret"] = "interpret"
    return next((offered[kind] for kind in devices if kind in offered), None)


def _reason(impl: Impl, device: str | None) -> str | None:
    """Say why a row cannot run on the device, or on any of this machine; None where it can."""
    runs = f"{impl.name} runs on {', '.join(impl.devices)}"
    if device is not None:
        return None if device.split(":")[0] in impl.devices else f"{runs}, not on {device}"
    if first_device(impl.devices):
        return None
    lacks = {"cuda": "there is no GPU", "interpret": interpreter.MISSING}
    return f"{runs}: {', and '.join(lacks[kind] for kind in impl.devices)}"
