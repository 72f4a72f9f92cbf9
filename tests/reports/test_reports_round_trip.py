"""What the commands write now is read: each kind from its own writer, through the one schema, to a figure."""

import json

import example_results as examples
import pytest

from autotune.__main__ import main as autotune
from autotune.replay import Recorded, recorded, save
from impls import compile_report
from kimi_linear.__main__ import main as kimi_linear
from reports import load
from reports.sections import pictures, sections
from verify.__main__ import main as verify

SMALL = "bench", "--preset", "tiny", "--layers", "4", "--context", "4,8", "--steps", "1", "--rounds", "1", "--baseline"


def drawn(path) -> list[str]:
    """Return the names of the figures that a file gives."""
    return [figure.name for figure in pictures(sections(load.read([path])))]


def test_records_of_the_judge(tmp_path):
    path = tmp_path / "verify.jsonl"
    assert (
        verify(["recurrent_torch", "--profile", "smoke", "--property", "dplr_equality,split", "--json", str(path)]) == 0
    )
    [result] = load.read([path])
    assert result.origin.date[:2] == "20" and {x["kind"] for x in result.data} >= {"run", "case", "target", "summary"}
    assert {"verification-1", "error-by-inputs-1", "coverage-1"} <= set(drawn(path))


def test_a_benchmark_of_the_model(tmp_path):
    path = tmp_path / "model.json"
    assert kimi_linear([*SMALL, "hybrid,mla", "--json", str(path)]) == 0
    assert drawn(path) == ["model-1"]


def test_a_yardstick(tmp_path):
    path = tmp_path / "yardstick.json"
    asked = ["yardstick", "--tokens", "32,64", "--heads", "1", "--minutes", "2", "--out", str(path)]
    assert autotune(asked) == 0
    assert drawn(path) == ["yardstick-1"]


def test_a_table_of_trials(tmp_path):
    table = Recorded(examples.ROOT / "tests" / "autotune" / "trials-chunk-torch-4096.json")
    about = table.implementation, table.shape, table.default, table.outcomes, table.provenance, table.device
    save(tmp_path / "trials.json", recorded(*about))
    [result] = load.read([tmp_path / "trials.json"])
    assert len(result.data["points"]) == len(table.outcomes) == 102
    assert drawn(tmp_path / "trials.json") == ["tuning-history-1", "importance-1"]


@pytest.mark.parametrize("error", [None, "does not compile"])
def test_a_compile_report(tmp_path, error):
    counts = dict.fromkeys(compile_report.COUNTED, 1) | {"local": 0}
    resources = {"registers": 8, "stack": 0, "shared_memory": 1, "warps": 2, "code": counts, "loop": counts}
    row = compile_report.Row("sm_90", "walk", 64, {"walk_warps": 2}, None if error else resources, 1024, error)
    try:
        data = compile_report.stored([row], "bfloat16")
    except ImportError:
        pytest.skip("triton is not installed")
    path = examples.document(tmp_path / "compile.json", data)
    assert drawn(path) == ["compile-1"]
    assert json.loads(path.read_text())["rows"][0]["failed"] is bool(error)
