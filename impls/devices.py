"""Name the device that a tensor lives on, as it stands in the names of files."""

import platform
import re
from functools import cache
from pathlib import Path

import torch


@cache
def named(device: str) -> dict[str, str | int | None]:
    """Return kind, name, capability and number of units of cpu or cuda:N; capability and units are None for a CPU."""
    if device == "cpu":
        return {"kind": "cpu", "name": _processor(), "capability": None, "units": None}
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return {"kind": "cuda", "name": found.name, "capability": capability, "units": found.multi_processor_count}


def slug(name: str) -> str:
    """Return a device's name as it stands in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
