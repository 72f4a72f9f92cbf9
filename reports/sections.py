"""What a report has to say, in its order: a section for each question, whether there are results for it or not."""

import shlex
from dataclasses import astuple

from reports import claims, counting, models, synthetic, timing, tuning, verification
from reports.figure import Figure, Section, Table
from reports.load import Result

SECTIONS = (
    (
        "verification", "Verification",
        "No counterexample in so many cases of these families under the stated precision contracts on these devices; "
        "never 'correct'. Errors are in units of their limits: above 1 fails.",
        "python -m verify --json FILE", verification.figures,
    ),
    (
        "mutants", "The judge, judged",
        "Bugs planted in a right implementation, each modelled on a real one; a survivor is a failure of the judge.",
        "python -m verify --self-test --json FILE", verification.mutants,
    ),
    (
        "tuning", "Tuning",
        "What was tried, what it is worth, and what decides the time. Only what the judge passed is chosen.",
        "python -m autotune tune --record FILE", tuning.figures,
    ),
    (
        "timing", "Time",
        "Ours and the peers in the same process and rounds, with quartiles; the floor is what the device could do.",
        "python -m autotune bench, make bench", timing.figures,
    ),
    (
        "yardstick", "KDA against general DPLR",
        "What binding a and b to k saves: counted, compiled, and timed in common rounds.",
        "python -m autotune yardstick --out FILE", counting.yardsticks,
    ),
    (
        "model", "The model",
        "Random weights: what a model of these sizes costs, not what it knows.",
        "python -m kimi_linear bench --json FILE", models.figures,
    ),
    (
        "synthetic", "Training: the paper's synthetic tasks",
        "Toys of two layers trained from scratch with the ops of this project, forward and backward: the smallest real "
        "training run. Sizes, not the paper's, stand in every title; every line is a seed. The small setting has as "
        "many steps as show who learns faster; with more, mixers without the delta rule learn these lengths, too.",
        "python -m kimi_linear.synthetic suite --json FILE", synthetic.figures,
    ),
    (
        "compile", "The compiler",
        "Compiled ahead of time for GPUs that need not be there: no times.",
        "python -m impls.compile_report --out FILE", counting.compiled,
    ),
)  # fmt: skip


def sections(results: list[Result]) -> list[Section]:
    """Return all sections; those without results have no figures."""
    return [Section(name, title, lead, command, tuple(make(results))) for name, title, lead, command, make in SECTIONS]


def pictures(sections: list[Section]) -> list[Figure]:
    """Return every figure that has a picture."""
    return [figure for section in sections for figure in section.figures if figure.drawing]


def sources(results: list[Result]) -> Table:
    """Return one row for every file: what it is, of what, with what, when."""
    rows = []
    for result in results:
        origin = result.origin
        versions = ", ".join(f"{name} {x}" for name, x in origin.versions.items())
        rows.append(
            (origin.file, result.kind, origin.device, versions, (origin.date or "not recorded")[:16].replace("T", " "))
        )
    return Table.of(("file", "kind", "device", "versions", "date, UTC"), rows)


def claimed(results: list[Result]) -> Table:
    """Return the paper's claims beside ours."""
    names = ("claim", "in the paper", "paper", "ours", "device", "from")
    return Table.of(names, [astuple(row) for row in claims.rows(results)])


def collections(results: list[Result]) -> Table | None:
    """Return the steps of every collection, or None where there is none."""
    rows = [
        (result.origin.file, name, step["outcome"], f"{step['seconds']:.0f}", shlex.join(step["command"]))
        for result in results
        if result.kind == "collected"
        for name, step in result.data["steps"].items()
    ]
    return Table.of(("collection", "step", "outcome", "s", "command"), rows) if rows else None
