"""Files of results in the shapes that their writers give them, small, with text that a careless page would run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NASTY = "<script>alert(1)</script>|`x`"
VERSIONS = {"python": "3.11", "platform": "Linux", "torch": "2.13.0", "numpy": "2.4.6", "hypothesis": "6.170"}
DATE = "2026-11-21T12:00:00+00:00"
DEVICE = {"kind": "cpu", "name": "A CPU", "threads": 2}
SPREAD = {"median": 2.0, "low": 1.5, "high": 2.5, "least": 1.0, "most": 3.0, "count": 5}


def outcome(ratio: float | str, allowed: float = 3.0, where: str = "row (0, 2, 1)") -> dict:
    """Return a property's worst measure on a case."""
    observed = ratio * allowed if isinstance(ratio, float) else ratio
    return {"ratio": ratio, "what": "o", "observed": observed, "allowed": allowed, "where": where}


def case(target: str, **results) -> dict:
    """Return a record of one case."""
    recipe = {
        "version": 1, "dtype": "float32", "seed": 1, "B": 1, "T": 4, "H": 1, "G": 1, "K": 4, "V": 4, "lengths": [],
        "keys": "unit", "queries": "unit", "values": "normal", "gates": "mild", "betas": "one", "plant": 0,
        "state": False, "scale": False, "l2norm": False, "activation": "none", "sigmoid": "none",
        "gates_float32": False, "chunk": 0,
    }  # fmt: skip
    gates, coverage = {"row": {"observed": 1.2, "what": "o"}}, {"decay": 40.0, "erase": 0.5}
    about = {"target": target, "device": "cpu", "recipe": recipe, "inputs": "0" * 16}
    return {"schema": 1, "kind": "case", **about, "results": results, "gates": gates, "coverage": coverage}


def records() -> list[dict]:
    """Return the records of a run: one implementation that passes, one that fails, one that was not run."""
    run = {"schema": 1, "kind": "run", "date": DATE, "versions": VERSIONS, "device": "default", "profile": "quick"}
    return [
        run | {"seed": 0, "arguments": []},
        case("good", reference=outcome(0.4), causality=outcome(0.0, 0.0, "")),
        case("good", reference=outcome(0.3)),
        case(NASTY, reference=outcome(4.0), causality=outcome("inf", 0.0, "")),
        {"schema": 1, "kind": "not-run", "target": "absent", "reason": "no device"},
        {"schema": 1, "kind": "summary", "code": 1, "targets": {"good": 0, NASTY: 1}},
    ]


def self_test() -> dict:
    """Return a self-test with a survivor."""
    matrix = {"tail_row": ["reference", "causality"], "survivor": []}
    return {"schema": 1, "kind": "self-test", "date": DATE, "versions": VERSIONS, "matrix": matrix, "control": []}


def model() -> dict:
    """Return a benchmark of a model beside its baselines."""
    rows = [
        {"model": name, "context": T, "prefill_s": T / 1e3, "step_ms": step * T, "cache_bytes": 1000 + per_token * T}
        for name, step, per_token in (("hybrid", 0.001, 100), ("mla", 0.003, 400))
        for T in (1024, 4096)
    ]
    about = {"schema": 1, "kind": "model prefill and decode", "date": DATE, "device": DEVICE, "threads": 2}
    versions, arguments = {"torch": "2.13.0"}, {"preset": "tiny", "layers": "8"}
    return about | {"versions": versions, "arguments": arguments, "rows": rows}


def yardstick() -> dict:
    """Return KDA held against general DPLR at two lengths, one of them timed."""
    ratio = {"kda": 100, "dplr": 140, "dplr_over_kda": 1.4}
    counted = [{"T": T, "flops": ratio, "bytes": ratio, "launches": {"kda": 2, "dplr": 2}} for T in (2048, 65536)]
    timed = {"T": 2048, "dtype": "float32", "mode": "launched", "ms": {"kda": SPREAD, "dplr": SPREAD}}
    about = {"schema": 1, "kind": "yardstick", "device": DEVICE, "versions": {"torch": "2.13.0"}, "date": DATE}
    compiled = {"target": "sm_90", "reason": "no compiler"}
    return about | {"heads": 16, "counted": counted, "compiled": compiled, "timed": [timed | {"dplr_over_kda": SPREAD}]}


def bench() -> dict:
    """Return a benchmark of ours and a peer at two lengths, launched and from graphs, and one that was not compared."""
    floor = {"bytes": 1 << 20, "flops": 1 << 30, "bytes_ms": 0.5, "flops_ms": 0.25, "ms": 0.5}
    about = {"message": None, "first_call_s": 1.0, "errors": {}, "failures": {}}
    both = {"ms": {"launched": SPREAD, "graph": SPREAD}, "over_floor": {"launched": 4.0, "graph": 4.0}}
    ours = {"name": "ours", "ours": True, "status": "measured", **about, **both}
    peer = {"name": NASTY, "ours": False, "status": "measured", **about, "ms": {"launched": SPREAD}}
    failed = {"name": "lost", "ours": False, "status": "failed", **about, "ms": {}, "over_floor": {}}
    cases = [
        {
            "name": f"t{T}", "sizes": {"B": 1, "T": T, "H": 4, "HV": 4, "K": 128, "V": 128, "N": 1}, "lengths": None,
            "lower_bound": None, "dtype": "bfloat16", "seconds": 1.0, "floor": floor,
            "implementations": [ours, peer | {"over_floor": {"launched": 4.0}}, failed | {"message": "out of memory"}],
            "ratios": [{"ours": "ours", "other": NASTY, "mode": "launched", "other_over_ours": SPREAD}],
        }
        for T in (1024, 8192)
    ]  # fmt: skip
    product = {"size": 1024, "ms": SPREAD, "flops_per_second": 1e14}
    ceilings = {"copy": {"bytes": 1 << 30, "ms": SPREAD, "bytes_per_second": 1e12}, "matmul": {"bfloat16": product}}
    device = {"kind": "cuda", "name": "A GPU", "driver": "1", "units": 1, "memory_bytes": 1}
    identity = {"device": device, "versions": {"torch": "2.13.0", "fla-core": None}, "profile": "quick"}
    identity |= {"sources": "0" * 16, "implementations": None, "environment": {}}
    method = {"flushed_bytes": 1, "least_rounds": 1, "most_rounds": 2, "seconds": 1.0, "modes": ["launched", "graph"]}
    return {
        "schema": 1, "kind": "bench", "begun": DATE, "updated": DATE, "identity": identity, "git": None,
        "method": method, "note": None, "verification": {}, "ceilings": ceilings,
        "not_compared": [{"name": "flash_kda", "reason": "not installed"}], "casualties": [], "deaths": [],
        "running": None, "cases": cases,
    }  # fmt: skip


def lines(path: Path, *documents: dict, unfinished: str = "") -> Path:
    """Write documents as lines of JSON, and what a killed run leaves behind them."""
    path.write_text("".join(json.dumps(x) + "\n" for x in documents) + unfinished)
    return path


def document(path: Path, data: dict) -> Path:
    """Write one document."""
    path.write_text(json.dumps(data, indent=1))
    return path


def everything(folder: Path) -> list[Path]:
    """Write one file of each kind of these, and name those of the repository beside them."""
    return [
        lines(folder / "verify.jsonl", *records(), self_test()),
        document(folder / "model.json", model()),
        document(folder / "yardstick.json", yardstick()),
        document(folder / "bench.json", bench()),
        *sorted((ROOT / "results").glob("*.json")),
        *sorted((ROOT / "impls" / "tuned").rglob("*.json")),
        ROOT / "tests" / "autotune" / "trials-chunk-torch-4096.json",
        ROOT / "tests" / "benchmarks" / "recorded.json",
    ]
