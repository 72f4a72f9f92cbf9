"""Checkpoints of a run, from which it goes on bit for bit, and its curve: one file each, never half written."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from impls.devices import named
from kimi_linear.synthetic.runs import Run

CHECKPOINT, CURVE, ORIGIN = "checkpoint.safetensors", "curve.jsonl", "origin.json"
VERSION = "1"


class SavedError(ValueError):
    """A file that is no checkpoint, or one of another run."""


@dataclass(frozen=True)
class Point:
    """A line of the curve: means over the window that ends with this step."""

    step: int
    loss: float
    accuracy: float
    """Of answers."""
    exact: float
    """Of sequences whose answers are all right."""
    seconds: float
    """Spent in training until here, interruptions left out."""


@dataclass
class State:
    """What a run has come to, beside parameters and optimizer: the step, the time, and sums of the open window."""

    step: int = 0
    seconds: float = 0.0
    steps: int = 0
    """In the open window."""
    loss: float = 0.0
    right: int = 0
    asked: int = 0
    exact: int = 0


def origin(device: str) -> dict:
    """Return what decides the bits of a run beside the run itself, and whose seconds its curve counts."""
    about = named("cpu" if torch.device(device).type == "cpu" else device)
    return {"device": about["name"], "threads": torch.get_num_threads(), "torch": torch.__version__}


def check_origin(folder: Path, device: str) -> None:
    """Note where the run of a folder is trained; SavedError where it was trained elsewhere before."""
    here, path = origin(device), folder / ORIGIN
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(here) + "\n", encoding="utf-8")
        path.with_suffix(".new").replace(path)
    elif (there := json.loads(path.read_text(encoding="utf-8"))) != here:
        other = {name: value for name, value in here.items() if there.get(name) != value}
        told = "; ".join(f"{name} {there.get(name)}, here {value}" for name, value in other.items())
        raise SavedError(f"{folder} was trained elsewhere: {told}; OMP_NUM_THREADS sets threads, --out another folder")


def save(path: Path, run: Run, state: State, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint in place of the last one: whoever is killed meanwhile finds the last one."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": x for name, x in values.items()}
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    about = {"version": VERSION, "run": json.dumps(run.to_json()), "state": json.dumps(asdict(state))}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file(tensors, new, metadata=about)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


def about(path: Path) -> tuple[Run, State]:
    """Read the run and the state of a checkpoint; SavedError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SavedError(f"{path}: no checkpoint: {error}") from error
    if found.get("version") != VERSION or not {"run", "state"} <= found.keys():
        raise SavedError(f"{path}: expected a checkpoint of version {VERSION}, got {found.get('version')!r}")
    try:
        return Run.from_json(json.loads(found["run"])), State(**json.loads(found["state"]))
    except (TypeError, ValueError) as error:
        raise SavedError(f"{path}: no checkpoint: {error}") from error


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill parameters, and the optimizer where there is one."""
    device = str(next(model.parameters()).device)
    with safe_open(path, "pt", device=device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    own = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    model.load_state_dict(own)
    if optimizer is None:
        return
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, x in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".")
            states.setdefault(int(index), {})[field] = x.cpu() if field == "step" else x
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def curve(path: Path) -> list[Point]:
    """Read a curve; a last line without an end is not read."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Point(**json.loads(line)) for line in lines]


def keep(path: Path, points: list[Point]) -> None:
    """Write a curve anew, in place of the last one: what lies behind the checkpoint comes again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(f"{json.dumps(asdict(point))}\n" for point in points), encoding="utf-8")
    new.replace(path)


def append(path: Path, point: Point) -> None:
    """Add a line to a curve."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(asdict(point))}\n")
