"""Run tasks x mixers x seeds and write what came of it as one file of results; the same command goes on."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from impls.devices import named
from kimi_linear.synthetic.model import Toy
from kimi_linear.synthetic.rates import OUTCOME, Finished, Meet, best, search, trained
from kimi_linear.synthetic.runs import Run
from kimi_linear.synthetic.train import Trainer

PACKAGES = ("torch", "triton", "numpy", "optuna")
TIMED = 3
"""Steps that an estimate is made from; one before them warms up."""


@dataclass(frozen=True)
class Suite:
    """What is to be run: a run for every task, mixer and seed; the rate is chosen with the first seed, for all."""

    runs: tuple[Run, ...]
    """One for each task and mixer, with the first seed."""
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    def work(self, out: Path, device: str, meet: Meet, go_on: Callable[[], bool]) -> Iterator[list[Finished]]:
        """Yield what is finished of each task and mixer, every time that a run is; ends early where `go_on` says no."""
        for run in self.runs:
            done = search(replace(run, seed=self.seeds[0]), self.rates, out, device, meet, go_on)
            if done is None:
                return
            yield done
            for seed in self.seeds[1:]:
                found = trained(replace(best(done).run, seed=seed), out, device, meet, go_on)
                if found is None:
                    return
                yield [found]

    def pending(self, out: Path) -> tuple[Run, ...]:
        """Return the runs whose task and mixer lack a seed that ended at any rate."""
        folders = {run: [(out / replace(run, seed=seed).folder).parent for seed in self.seeds] for run in self.runs}
        return tuple(run for run, own in folders.items() if not all(any(x.glob(f"*/{OUTCOME}")) for x in own))


def seconds_of_a_step(run: Run, device: str) -> float:
    """Time a few steps of a run."""
    with TemporaryDirectory() as folder:
        trainer = Trainer(run, Path(folder), device)
        trainer.step()
        begun = time.perf_counter()
        for _ in range(TIMED):
            trainer.step()
        return (time.perf_counter() - begun) / TIMED


def estimate(suite: Suite, runs: Sequence[Run], steps_of: Callable[[Run], float]) -> float:
    """Return the most seconds that some of a suite's runs take: to their last step, at every rate, none pruned."""
    return sum(steps_of(run) * run.steps * (len(suite.rates) + len(suite.seeds) - 1) for run in runs)


def entry(found: Finished) -> dict:
    """Return what a file of results says of a run."""
    with torch.device("meta"):
        parameters = sum(x.numel() for x in Toy(found.run.toy).parameters())
    curve = [asdict(point) for point in found.curve]
    sizes = f"{found.run.drawn.described}; {found.run.drawn.vocabulary:,} ids, {found.run.batch} sequences a step"
    about = {"label": found.run.label, "task": sizes, "parameters": parameters}
    return {"run": found.run.to_json()} | about | asdict(found.outcome) | {"curve": curve}


def document(found: Iterable[Finished], device: str) -> dict:
    """Return the result: where, when and with what, and every run."""
    kind = torch.device(device).type
    about = named("cpu" if kind == "cpu" else device)
    return {
        "schema": 1,
        "kind": "synthetic tasks",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"kind": kind, "name": about["name"]},
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
        "runs": [entry(each) for each in found],
    }


def write(path: Path, found: Sequence[Finished], device: str) -> None:
    """Write a file of results in place of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document(found, device), indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
