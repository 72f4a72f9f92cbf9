"""Say where figures come from: device, driver, versions, sources; results of two origins are never mixed in a file."""

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from autotune.outcomes import UsageError
from impls.devices import named

ROOT = Path(__file__).resolve().parents[1]
MEASURING = ("cases.py", "contest.py", "floors.py", "timing.py")
"""Files of ours that decide what a figure means; those that print and store do not."""
PACKAGES = ("torch", "triton", "numpy", "fla-core", "flash_kda")
PREFIXES = ("FLA_", "TRITON_")
"""Environment variables that change what runs; folders among them do not."""


def check_device(device: str) -> None:
    """Raise UsageError unless the device is cpu, or a cuda:N that torch sees."""
    if device == "cpu":
        return
    if not (found := re.fullmatch(r"cuda:(\d+)", device)):
        raise UsageError(f"--device must be cpu or cuda:N, got {device}")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device here; --device cpu runs the same "
            "command on the CPU"
        )
    if int(found[1]) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices, from cuda:0 on")


def described(device: str) -> dict:
    """Describe a device in JSON values."""
    if device == "cpu":
        return {
            "kind": "cpu",
            "name": named("cpu")["name"],
            "driver": None,
            "units": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": properties.name,
        "driver": _driver(),
        "units": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of what decides speed; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def sources(root: Path = ROOT) -> str:
    """Return a hash of the implementations, what is tuned of them, and what measures them: of what figures mean."""
    tuned = (root / "impls").rglob("*.json")
    return _hashed(root, [*_kernels(root), *tuned, *(root / "autotune" / name for name in MEASURING)])


def kernels(root: Path = ROOT) -> str:
    """Return a hash of the implementations alone: of what a configuration was tuned for."""
    return _hashed(root, _kernels(root))


def _kernels(root: Path) -> list[Path]:
    return list((root / "impls").rglob("*.py"))


def _hashed(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def environment() -> dict[str, str]:
    """Return the variables that change what FLA and Triton do."""
    return {name: x for name, x in sorted(os.environ.items()) if name.startswith(PREFIXES) and "_DIR" not in name}


def git(root: Path = ROOT) -> dict | None:
    """Return the commit and whether files differ from it; None outside a repository or without git."""
    try:
        commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(root), "status", "--porcelain", "--", "impls", "kda_spec", "autotune")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
