"""The section on synthetic tasks: every seed is drawn, at the best rate, and said in words and in the table."""

import example_results as examples
import pytest

from reports import load, pages, synthetic
from reports.sections import sections

RUN = {
    "task": "mqar", "mixer": "kda", "length": 48, "alphabet": 32, "head_dim": 16, "hidden": 64, "batch": 32,
    "steps": 200, "rate": 1e-3, "warmup": 10, "stop": 0.999, "seed": 0, "heads": 2, "layers": 2, "mlp": 2, "conv": 4,
    "output_gate": "sigmoid", "dtype": "float32", "clip": 1.0, "weight_decay": 0.01, "window": 100,
}  # fmt: skip


def run(label: str, accuracy: float | None, state: str = "over", task: str = "12 pairs", **changes) -> dict:
    points = [
        {"step": step, "loss": 2.0 / step, "accuracy": (accuracy or 0) * step / 200, "exact": 0.0, "seconds": step / 10}
        for step in (100, 200)
    ]
    about = {"label": label, "task": task, "parameters": 1000, "state": state, "accuracy": accuracy, "exact": accuracy}
    return {"run": RUN | changes} | about | {"curve": points}


def result(tmp_path, *runs: dict):
    about = {"schema": 1, "kind": "synthetic tasks", "date": examples.DATE, "device": examples.DEVICE, "threads": 2}
    document = about | {"versions": {"torch": "2.13.0"}, "runs": list(runs)}
    return load.read([examples.document(tmp_path / "synthetic.json", document)])


def test_every_seed_is_a_line_at_the_rate_that_was_best(tmp_path):
    runs = [run("kda", 0.9, rate=5e-4), run("kda", 0.97), run("kda", None, "pruned", rate=1e-4)]
    runs += [run("kda", 0.96, seed=1), run("mamba2", 0.2)]
    [figure] = synthetic.figures(result(tmp_path, *runs))
    assert "kda 97.0% after 200 steps, 96.0% after 200 steps; mamba2 20.0%" in figure.alt
    assert len(figure.table.rows) == 5
    accuracy, loss = figure.drawing.axes
    drawn = [line for line in accuracy.get_lines() if len(line.get_xdata()) > 1]
    assert len(drawn) == 3 and len({line.get_color() for line in drawn}) == 2
    assert [line.get_ydata()[-1] for line in drawn] == pytest.approx([97, 96, 20])
    assert accuracy.get_legend_handles_labels()[1] == ["kda", "mamba2"]


def test_tasks_and_lengths_have_figures_of_their_own(tmp_path):
    runs = [run("kda", 0.9), run("kda", 0.9, length=96, task="24 pairs"), run("kda", 0.9, task="47 letters")]
    assert len(synthetic.figures(result(tmp_path, *runs))) == 3


@pytest.mark.parametrize(
    "odd",
    [
        [],
        [run("kda", None, "pruned")],
        [run("kda", None, "diverged") | {"curve": []}],
        [run(f"{examples.NASTY} {i}", 0.5) for i in range(9)],
    ],
)
def test_odd_results_make_a_page_too(tmp_path, odd):
    results = result(tmp_path, *odd)
    page = pages.html(results, sections(results), examples.DATE)
    assert "synthetic" in page and "<script>alert" not in page


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(load.ResultError, match="no result of kind 'synthetic tasks'"):
        result(tmp_path, run("kda", 2.0))
