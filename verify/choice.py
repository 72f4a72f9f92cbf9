"""Which implementations are judged, and on which device: what is named, what a device has, what this machine offers."""

from dataclasses import dataclass, field

import torch

from impls.table import IMPLEMENTATIONS, Impl
from verify import interpreter
from verify.replay import TARGET


class UsageError(Exception):
    """The command line asks for something that does not exist; the message says what was expected."""


@dataclass
class Choice:
    """What is to be judged, by target its device; and by implementation why it is not judged here."""

    devices: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def choose(asked: list[str], device: str | None) -> Choice:
    """Choose targets by name or group; without a device, each on the first that it has and this machine offers.

    What a group holds and cannot run here is listed with the reason; what is named must run. Raises UsageError.
    """
    choice = Choice()
    for name in asked or ["all"]:
        if ":" in name:
            if not TARGET.fullmatch(name):
                raise UsageError(f"expected package.module:function, got {name}")
            choice.devices[name] = device or "cpu"
        for impl in () if ":" in name else _rows(name):
            reason = _reason(impl, device)
            if reason and name == impl.name:
                raise UsageError(reason)
            if reason:
                choice.absent[impl.name] = reason
            else:
                choice.devices[impl.name] = device or first_device(impl)
    if not asked and device is not None:  # what a device runs was asked for, not the rest
        choice.absent.clear()
    return choice


def _rows(name: str) -> list[Impl]:
    """Return the rows of the table that a name or group stands for."""
    if name == "all":
        return list(IMPLEMENTATIONS)
    if name == "cpu":
        return [impl for impl in IMPLEMENTATIONS if "cpu" in impl.devices]
    if found := [impl for impl in IMPLEMENTATIONS if impl.name == name]:
        return found
    known = ", ".join(sorted(impl.name for impl in IMPLEMENTATIONS))
    raise UsageError(f"unknown target {name}; known are {known}, all, cpu, or package.module:function")


def first_device(impl: Impl) -> str | None:
    """Return the first device of a row that this machine offers; None where it offers none."""
    offered = {"cpu": "cpu"}
    if torch.cuda.is_available():
        offered["cuda"] = "cuda:0"
    if interpreter.installed():
        offered["interpret"] = "interpret"
    return next((offered[kind] for kind in impl.devices if kind in offered), None)


def _reason(impl: Impl, device: str | None) -> str | None:
    """Say why a row cannot run on the device, or on any of this machine; None where it can."""
    runs = f"{impl.name} runs on {', '.join(impl.devices)}"
    if device is not None:
        return None if device.split(":")[0] in impl.devices else f"{runs}, not on {device}"
    if first_device(impl):
        return None
    lacks = {"cuda": "there is no GPU", "interpret": interpreter.MISSING}
    return f"{runs}: {', and '.join(lacks[kind] for kind in impl.devices)}"
