"""Write what was tuned in the formats that other tools read.

fla   FLA's cache of configurations: one <kernel>.json per Triton kernel, with the parameters that the kernel takes. Our
      kernels are not FLA's, which ignores these files: they are for tools that read the format. Into how many segments
      a sequence is cut is decided outside of the kernels and has no place here. Implementations in torch launch no
      kernels, and are refused.
vllm  vLLM's style: H=..,K=..,V=..,device_name=..,dtype=...json holds tokens -> configuration; N sequences and packing
      stand in the name where there are any. No name tells the implementation: give each a folder. A default row has no
      place here.
t4    Kernel Tuner's T4 results, of the trials that `tune --record TABLE` keeps. Correct is what gave the same bits
      twice, and the default's outputs within rounding; `verify` judges the winner only. The time of a trial was
      recorded as a whole, compilation included (times.benchmark, ms), and of its runs the spread (measurements).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from autotune import display
from autotune.outcomes import PASS, UsageError
from autotune.replay import Recorded
from autotune.search import FAILED, MEASURED, PRUNED, WRONG, Outcome
from autotune.store import write
from impls import tuned
from impls.checks import MAX_HEAD_DIM
from impls.plan import tile_of

SUMMARY = "write what was tuned in the format of FLA, vLLM or Kernel Tuner"
EPILOG = """\
examples   python -m autotune export ~/.cache/kda-forge/configs/nvidia-h200/chunk_triton.json --format fla --out fla/
           python -m autotune export impls/tuned/generic-cpu/chunk_torch.json --format vllm --out vllm/chunk_torch/
           python -m autotune export trials.json --format t4 --out t4.json
"""
KERNELS = {
    "chunk_triton": {
        "intra": {
            "C": "chunk_size",
            "TILES": "intra_tiles",
            "CONTIGUITY": "intra_contiguity",
            "RECOMPUTE": "recompute",
        },
        "walk": {"C": "chunk_size", "BV": "value_tile", "CONTIGUITY": "walk_contiguity", "RECOMPUTE": "recompute"},
    },
    "recurrent_triton": {"recurrent": {"BV": "value_tile"}},
}
"""Implementation -> kernel -> its parameter -> our field."""
T4_VERSION = "1.0.0"
INVALIDITY = {MEASURED: "correct", WRONG: "correctness", PRUNED: "constraints"}
FAULTS = {"Timeout": "timeout", "Compil": "compile", "PTXAS": "compile"}
"""What the name of an exception holds -> T4's word for it."""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("file", type=Path, metavar="FILE", help="a tuned file; for t4 a table of trials")
    p.add_argument("--format", required=True, choices=tuple(FORMATS), help="see above")
    out = "folder to write to; for t4 the file. What is there under the same names is replaced"
    p.add_argument("--out", type=Path, required=True, metavar="PATH", help=out)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    files = FORMATS[args.format](args.file, args.out)
    if args.file.resolve() in [path.resolve() for path in files]:
        raise UsageError(f"--out {args.out} would replace FILE itself")
    page = display.console()
    for path, data in files.items():
        write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
        page.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return PASS


def fla(file: Path, out: Path) -> dict[Path, dict]:
    """Return FLA's files, path -> content, of a tuned file of a Triton implementation."""
    data = _tuned(file)
    if data["implementation"] not in KERNELS:
        ours = f"{data['implementation']} launches none"
        raise UsageError(f"FILE {file}: --format fla is for the Triton kernels of {', '.join(KERNELS)}; {ours}")
    kernels = KERNELS[data["implementation"]]
    return {out / f"{kernel}.json": _fla_kernel(data, kernel) for kernel in kernels}


def _fla_kernel(data: dict, kernel: str) -> dict:
    entries = {}
    for entry in data["entries"]:
        T, N, HV, K, V, dtype, packed = tuned.Shape(**entry["shape"])
        key = [T, N, HV, K, V, packed, f"torch.{dtype}"]
        name = hashlib.md5(json.dumps(key, separators=(",", ":")).encode(), usedforsecurity=False).hexdigest()
        entries[name] = {"autotune_key": key, "config": _fla_config(data, kernel, entry["config"], V)}
    return {
        "kernel_name": kernel,
        "triton_version": data["provenance"]["versions"].get("triton"),
        "autotune_entries": entries,
        "default_config": _fla_config(data, kernel, data["default"], MAX_HEAD_DIM) if data["default"] else None,
    }


def _fla_config(data: dict, kernel: str, row: dict, V: int) -> dict:
    implementation = data["implementation"]
    config = asdict(tuned.config_of(implementation, row))
    config["value_tile"] = min(config["value_tile"], tile_of(V))
    prefix = f"{kernel}_" if f"{kernel}_warps" in config else ""
    return {
        "kwargs": {name: config[field] for name, field in KERNELS[implementation][kernel].items()},
        "num_warps": config[f"{prefix}warps"],
        "num_stages": config[f"{prefix}stages"],
        "num_ctas": 1,
        "maxnreg": config[f"{prefix}registers"] or None,
        "pre_hook": None,
        "ir_override": None,
    }


def vllm(file: Path, out: Path) -> dict[Path, dict]:
    """Return files in vLLM's style, path -> content, of a tuned file."""
    data, files = _tuned(file), {}
    if not data["entries"]:
        raise UsageError(f"FILE {file} has no entries: --format vllm has no place for a default row")
    version = data["provenance"]["versions"].get("triton")
    about = {"triton_version": version} if version else {}
    for entry in sorted(data["entries"], key=lambda entry: entry["shape"]["T"]):
        shape = tuned.Shape(**entry["shape"])
        rows = files.setdefault(out / _vllm_name(shape, data["device"]["name"]), dict(about))
        rows[str(shape.T)] = entry["config"]
    return files


def _vllm_name(shape: tuned.Shape, device: str) -> str:
    several = (f"N={shape.N}",) if shape.N > 1 else ()
    packed = ("packed=true",) if shape.packed else ()
    device = re.sub(r"[^\w.()+-]", "_", device)
    sizes = (f"H={shape.HV}", f"K={shape.K}", f"V={shape.V}", *several, *packed)
    return ",".join((*sizes, f"device_name={device}", f"dtype={shape.dtype}")) + ".json"


def t4(file: Path, out: Path) -> dict[Path, dict]:
    """Return T4 results, path -> content, of a table of trials."""
    table = Recorded(file, "FILE")
    results = [_t4_result(asdict(config), x, table.provenance["date"]) for config, x in table.outcomes.items()]
    about = {
        "implementation": table.implementation,
        "shape": table.shape._asdict(),
        "device": table.device,
        "provenance": table.provenance,
    }
    return {out: {"schema_version": T4_VERSION, "metadata": about, "results": results}}


def _t4_result(config: dict, outcome: Outcome, date: str) -> dict:
    return {
        "timestamp": date,
        "configuration": config,
        "times": {"benchmark": outcome.seconds * 1e3, "runtimes": []},
        "invalidity": _invalidity(outcome),
        "correctness": int(outcome.status == MEASURED),
        "measurements": _measurements(outcome) if outcome.status == MEASURED else [],
        "objectives": ["time_over_default"],
    }


def _invalidity(outcome: Outcome) -> str:
    if outcome.status != FAILED:
        return INVALIDITY[outcome.status]
    raised = (outcome.message or "").split(":")[0]
    return next((word for part, word in FAULTS.items() if part in raised), "runtime")


def _measurements(outcome: Outcome) -> list[dict]:
    spreads = {"time": (outcome.ms, "ms"), "time_over_default": (outcome.ratio, "")}
    return [
        {"name": name if part == "median" else f"{name}_{part}", "value": x, "unit": "" if part == "count" else unit}
        for name, (spread, unit) in spreads.items()
        for part, x in spread.to_json().items()
    ]


def _tuned(file: Path) -> dict:
    try:
        return tuned.read(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"FILE {file} is no file of tuned configurations: {error}") from error


FORMATS: dict[str, Callable[[Path, Path], dict[Path, dict]]] = {"fla": fla, "vllm": vllm, "t4": t4}
