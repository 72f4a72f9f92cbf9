"""The table and the remarks, of a made-up comparison on a GPU."""

import io
from copy import deepcopy

import pytest
from rich.console import Console

from autotune import display


def spread(median: float) -> dict:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "least": 0.1, "most": 9.0, "count": 5}


def entry(name: str, ours: bool, launched: float | None, graph: float | None, **changes) -> dict:
    times = {mode: x for mode, x in (("launched", launched), ("graph", graph)) if x}
    errors = {mode: {"o": 0.002, "final_state": 0.001} for mode in times}
    fields = {"status": "measured" if times else "failed", "message": None, "failures": {}, "errors": errors}
    over = {mode: x / 0.25 for mode, x in times.items()}
    ms = {mode: spread(x) for mode, x in times.items()}
    return {"name": name, "ours": ours, "first_call_s": 1.0, "ms": ms, "over_floor": over, **fields, **changes}


def quotient(other: str, mode: str, median: float) -> dict:
    return {"ours": "chunk_triton", "other": other, "mode": mode, "other_over_ours": spread(median)}


ENTRIES = [
    entry("chunk_triton", True, 0.5, 0.4),
    entry("fla", False, 1.5, None, failures={"graph": "RuntimeError: [capture] not permitted"}),
    entry("fla_safe_gate", False, 0.3, 0.2, errors={"launched": {"o": "nan", "final_state": 0.0}}),
    entry("flash_kda", False, None, None, status="unsupported", message="ValueError: it has the bounded gate only"),
]
CASE = {
    "name": "t8192-h64-fixed-unbounded",
    "seconds": 12.0,
    "floor": {"bytes": 1, "flops": 1, "bytes_ms": 0.25, "flops_ms": 0.02, "ms": 0.25},
    "implementations": ENTRIES,
    "ratios": [quotient("fla", "launched", 3.04), quotient("fla_safe_gate", "graph", 0.52)],
}
DATA = {
    "identity": {
        "device": {"name": "NVIDIA H200 [x]", "driver": "580.1"},
        "versions": {"torch": "2.11.0", "flash_kda": None},
    },
    "git": {"commit": "0123456789abcdef", "changed": True},
    "updated": "2026-01-01T00:00:00+00:00",
    "note": "a note",
    "method": {"modes": ["launched", "graph"]},
    "ceilings": {
        "copy": {"bytes_per_second": 4.3e12},
        "matmul": {"bfloat16": {"flops_per_second": 7.9e14}},
    },
    "verification": {"chunk_triton": {"code": 0}},
    "not_compared": [{"name": "other", "reason": "the package other is not installed"}],
}


def printed(*things) -> str:
    page = Console(file=io.StringIO(), width=200)
    for thing in things:
        page.print(thing)
    return page.file.getvalue()


def row(text: str, name: str) -> list[str]:
    """Return the cells of the row of one implementation."""
    line = next(line for line in text.splitlines() if line.startswith(f"│   {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.fixture(scope="module")
def shown() -> str:
    return printed(display.table(DATA, [CASE]))


def test_ours_is_one_and_others_are_how_many_times_as_long(shown):
    assert "over chunk_triton" in shown and "launched from Python, ms" in shown and "CUDA graph, ms" in shown
    ours = ["chunk_triton", "0.5 [0.45, 0.55]", "2.00", "1", "0.4 [0.36, 0.44]", "1.60", "1", "2.0e-03"]
    assert row(shown, "chunk_triton") == ours
    assert row(shown, "fla")[1:4] == ["1.5 [1.35, 1.65]", "6.00", "3.04"]


def test_what_has_no_time_says_why(shown):
    assert row(shown, "fla")[4:] == ["failed", "-", "-", "2.0e-03"]
    assert row(shown, "flash_kda")[1:] == ["unsupported", "-", "-", "unsupported", "-", "-", "-"]


def test_the_floor_of_a_case_names_what_it_is_made_of(shown):
    assert "floor 0.25 (bytes)" in shown


def test_a_wrong_answer_is_shouted_about():
    text = printed(*display.remarks(DATA, [CASE], ["t1024-h4-bounded"]))
    assert "fla_safe_gate: OUTPUTS DIFFER from ours by nan" in text
    assert "chunk_triton: OUTPUTS" not in text
    assert "fla: graph failed: RuntimeError: [capture] not permitted" in text
    assert "flash_kda: unsupported: ValueError: it has the bounded gate only" in text
    assert "not compared: other: the package other is not installed" in text
    assert "not measured (the time box ran out): t1024-h4-bounded" in text


def test_a_noisy_time_is_called_that():
    assert "noisy" not in printed(*display.remarks(DATA, [CASE], []))
    case = deepcopy(CASE)
    case["implementations"][0]["ms"]["graph"] |= {"median": 1.0, "low": 0.5, "high": 2.0}
    text = printed(*display.remarks(DATA, [case], []))
    assert "chunk_triton: noisy: graph, quartiles 150% of the median apart" in text and text.count("noisy") == 1


def test_what_failed_verification_is_shouted_about():
    data = deepcopy(DATA)
    data["verification"]["chunk_triton"] = {"code": 1, "outcome": "failed", "reason": None, "failed": ["causality"]}
    assert "NOT VERIFIED chunk_triton: python -m verify: failed: causality" in printed(*display.remarks(data, [], []))


def test_figures_carry_device_versions_and_date():
    text = printed(display.provenance(DATA), display.ceilings(DATA))
    assert "NVIDIA H200 [x], driver 580.1; torch 2.11.0, commit 0123456789ab with changes; 2026-01-01" in text
    assert "flash_kda" not in text and "a note" in text
    assert "copy 4,300 GB/s, matrix product bfloat16 790 TFLOP/s" in text


def test_a_case_is_one_line_where_nobody_watches():
    line = "t8192-h64-fixed-unbounded: chunk_triton launched 0.5, graph 0.4; fla launched 1.5; "
    assert display.case_line(CASE) == line + "fla_safe_gate launched 0.3, graph 0.2; flash_kda unsupported (12 s)"
