"""Choose the learning rate: Optuna over a grid, which prunes what is behind. The runs' own folders are all it keeps."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from kimi_linear.synthetic import saved
from kimi_linear.synthetic.runs import Run, RunError
from kimi_linear.synthetic.saved import Point
from kimi_linear.synthetic.train import Diverged, Trainer

OUTCOME = "outcome.json"
OVER, PRUNED, DIVERGED = "over", "pruned", "diverged"
UNPRUNED = 2
"""The first one in so many of the steps is free: nothing is pruned there. In a quarter of the small setting's steps
nobody has left chance."""

Meet = Callable[[Run, Point], None]


@dataclass(frozen=True)
class Outcome:
    """What a run ended with: over, pruned or diverged; figures over unseen batches where it is over."""

    state: str
    accuracy: float | None = None
    exact: float | None = None


@dataclass(frozen=True)
class Finished:
    """A run that is not gone on with: over, diverged, or pruned by what else its grid held."""

    run: Run
    outcome: Outcome
    curve: list[Point]

    @property
    def rank(self) -> tuple[float, int]:
        """Return what a better run has more of: accuracy on unseen batches, then steps left."""
        return (self.outcome.accuracy, -self.curve[-1].step)


def finished(run: Run, out: Path, device: str) -> Finished | None:
    """Return what a run came to, or None where it is not finished; SavedError where that was on another device."""
    path = out / run.folder
    if not (path / OUTCOME).is_file():
        return None
    saved.check_origin(path, device)
    return Finished(run, Outcome(**json.loads((path / OUTCOME).read_text())), saved.curve(path / saved.CURVE))


def trained(run: Run, out: Path, device: str, meet: Meet, go_on: Callable[[], bool]) -> Finished | None:
    """Train a run in its own folder below `out`, or go on with it; None where `go_on` ended it.

    meet may raise `optuna.TrialPruned`, an outcome of its grid alone that is not kept: in another grid the run goes on.
    """
    if found := finished(run, out, device):
        return found
    try:
        trainer = Trainer(run, out / run.folder, device)
        for point in trainer.curve[-1:]:  # who was killed while it was met meets it now
            meet(run, point)
        result = trainer.train(lambda point: meet(run, point), go_on)
        if not result.over:
            return None
        outcome = Outcome(OVER, result.accuracy, result.exact)
    except optuna.TrialPruned:
        return Finished(run, Outcome(PRUNED), trainer.curve)
    except Diverged:
        outcome = Outcome(DIVERGED)
    path = out / run.folder / OUTCOME
    path.with_suffix(".new").write_text(json.dumps(asdict(outcome)) + "\n")
    path.with_suffix(".new").replace(path)
    return finished(run, out, device)


def search(
    run: Run, rates: Sequence[float], out: Path, device: str, meet: Meet, go_on: Callable[[], bool]
) -> list[Finished] | None:
    """Train a run at every rate of a grid, the largest first; None where `go_on` ended it before the end.

    A rate is pruned by Optuna's median rule, from half of the steps on. The study is made anew of what lies in the
    runs' folders: who is killed goes on with the same decisions.
    """
    grid = CategoricalDistribution(sorted(rates, reverse=True))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=run.steps // UNPRUNED)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    done = []
    for rate in grid.choices:
        study.enqueue_trial({"rate": rate})
        trial = study.ask({"rate": grid})
        own = replace(run, rate=rate)
        reported = _Reported(trial, own, out, meet)
        found = trained(own, out, device, reported, go_on)
        if found is None:
            return None
        reported.close(study, found)
        done.append(found)
    return done


class _Reported:
    """A trial of Optuna's that is told every point of a run's curve once, those of processes before it too."""

    def __init__(self, trial: optuna.Trial, run: Run, out: Path, meet: Meet):
        self.trial, self.meet, self.steps = trial, meet, set()
        for point in saved.curve(out / run.folder / saved.CURVE):
            self.report(point.step, point.accuracy)

    def report(self, step: int, accuracy: float) -> None:
        """Tell the trial, unless it knows."""
        if step not in self.steps:
            self.steps.add(step)
            self.trial.report(accuracy, step)

    def __call__(self, run: Run, point: Point) -> None:
        """Show a point and tell the trial; raises TrialPruned where the run is behind."""
        self.meet(run, point)
        self.report(point.step, point.accuracy)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def close(self, study: optuna.Study, found: Finished) -> None:
        """End the trial. A run that is over before its last step counts as if it had gone on as good as it was."""
        if found.outcome.state != OVER:
            study.tell(self.trial, state=TrialState.PRUNED if found.outcome.state == PRUNED else TrialState.FAIL)
            return
        last, run = found.curve[-1], found.run
        for step in range(last.step, run.steps + 1, run.window):
            self.report(step, last.accuracy)
        study.tell(self.trial, found.outcome.accuracy)


def best(found: Sequence[Finished]) -> Finished:
    """Return the best run; RunError where all diverged."""
    over = [each for each in found if each.outcome.state == OVER]
    if not over:
        rates = ", ".join(f"{each.run.rate:g}" for each in found)
        raise RunError(f"no run ended with a number, at a rate of {rates}: a smaller --rate, or float32, may help")
    return max(over, key=lambda each: each.rank)
