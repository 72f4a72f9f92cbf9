"""Choose the configuration of one task: search, race the quickest, have the winner judged, say what became of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from autotune import clock, display, fleet, judge, provenance
from autotune.measuring import Guarded
from autotune.outcomes import BoxOver
from autotune.pinning import load
from autotune.replay import Recorded
from autotune.search import MEASURED, Outcome, Search
from autotune.tasks import Task
from autotune.timing import Box
from impls import tuned
from impls.devices import named, slug
from verify.cluster import Pool
from verify.session import PASS as VERIFIED

WITHIN, FINALISTS = 0.10, 5
PROFILE = "tune"

Timer = clock.Clock | Guarded | Recorded | fleet.Fleet


@dataclass(frozen=True)
class Choice:
    """What a task ended with: the winner that passed, its verdict, and everybody in the race."""

    winner: clock.Standing
    verdict: dict
    standings: list[clock.Standing]
    trials: int
    ways: dict[str, int]
    """How many trials were found in which way."""

    def entry(self, task: Task) -> dict:
        """Return the entry of a tuned file."""
        winner = self.winner
        tied = [
            asdict(x.config)
            for x in self.standings
            if x is not winner and abs(x.over_default.median / winner.over_default.median - 1) <= clock.TIE
        ]
        return {
            "shape": task.shape._asdict(),
            "config": asdict(winner.config),
            "provenance": task.origin,
            "verified": {"profile": PROFILE, "outcome": self.verdict["outcome"], "counts": self.verdict["counts"]},
            "timing": {
                "ms": winner.ms.to_json(),
                "over_default": winner.over_default.to_json(),
                "ties": tied,
                "noise": winner.config == task.default,
                "default": asdict(task.default),
                "trials": self.trials,
                "ways": self.ways,
                "load": load(),
                "conditions": winner.conditions.to_json() if winner.conditions else None,
            },
        }


def path_of(task: Task, out: Path) -> Path:
    """Return the file that the trials of a task are kept in: one for a device, versions, shape, space and sources."""
    shape = "-".join(str(x).lower() for x in task.shape)
    where = f"{slug(named(task.device)['name'])}-{torch.__version__}-{torch.get_num_threads()}"
    name = f"{where}-{task.implementation.name}-{shape}-{task.space.fingerprint}"
    if task.replay:
        name = f"replayed-{task.replay.digest}-{name}"
    folder = out / "replayed" if task.replay else tuned.user_folder().with_name("studies")
    return folder / f"{name}-{provenance.kernels()}.journal"


def in_use(task: Task) -> list[object]:
    """Return the configuration that a call of this shape runs with now, if the search covers it."""
    found = None if task.replay else tuned.looked_up(task.implementation.name, task.device, task.shape)
    return [found.config] if found and task.space.admits(found.config) else []


@contextmanager
def timer_of(task: Task, pool: Pool | None) -> Iterator[Timer]:
    """Give what times the task's configurations: on a CPU in this process, on a GPU in one that may be lost.

    With a pool of workers elsewhere all of those do.
    """
    if task.replay:
        yield task.replay
        return
    bench = clock.Bench(task.implementation.name, task.case, task.dtype, task.device, torch.get_num_threads())
    if pool:
        yield fleet.Fleet(pool, bench, task.default)
        return
    if task.device == "cpu":
        yield clock.Clock(bench, task.default, Box(0))
        return
    with Guarded(bench, task.default, Box(0)) as guarded:
        yield guarded


def searched(search: Search, timer: Timer, seconds: float, trials: int | None, page: Console) -> None:
    """Try configurations until the seconds are over, everything is known, or so many new trials are done."""
    known, timer.box = len(search.outcomes), Box(seconds)
    page.print(f"{search.size:,} points, {known} known from earlier runs", highlight=False)
    most = search.size if trials is None else known + trials
    with search, display.progress(page, search.size) as show:
        show("searching", known)
        for config, outcome in _tried(search, timer, most, lambda config: show(_short(config, timer), 0)):
            search.tell(config, outcome)
            show(_best(search), 1)
            page.print(_line(config, outcome), markup=False, highlight=False, soft_wrap=True)


def _tried(search: Search, timer: Timer, most: int, begins: Callable) -> Iterator[tuple[object, Outcome]]:
    """Yield configurations with what became of them: one after another, or as a fleet has them."""

    def claimed(flying: int = 0) -> object | None:
        wanted = timer.box.left and len(search.outcomes) + flying < most
        if config := search.next(timer.box.left) if wanted else None:
            begins(config)
        return config

    if isinstance(timer, fleet.Fleet):
        yield from timer.outcomes(claimed)
        return
    while (config := claimed()) is not None:
        try:
            outcome = timer.outcome(config)
        except BoxOver:
            return
        yield config, outcome


def chosen(task: Task, search: Search, timer: Timer, page: Console, known: dict) -> Choice | None:
    """Race the quickest against the default in a new process, and have the winner judged; None where nothing passes.

    known: verdicts by implementation, head dimension and configuration, those of this run added to it.
    """
    page.print("the quickest race the default in a new process")
    # what is in use comes first: within a tie it stays
    standings = timer.raced(list(dict.fromkeys((*in_use(task), *search.best(WITHIN, FINALISTS)))))
    winner, verdict = _verified(task, standings, page, known)
    return Choice(winner, verdict, standings, len(search.outcomes), search.ways) if winner else None


def _verified(
    task: Task, standings: list[clock.Standing], page: Console, known: dict
) -> tuple[clock.Standing | None, dict]:
    """Return the first choice that verify lets pass, and its verdict; behind one that fails the others are ranked anew.

    Where the default itself fails nobody is chosen: then more is wrong than a configuration.
    """
    row, K = task.implementation.name, task.case.K
    while standings:
        standing = clock.ranked(standings)[0]
        about = (row, K, standing.config)
        if about not in known:
            page.print(f"python -m verify judges {told(standing.config)}", soft_wrap=True, markup=False)
            folder = tuned.user_folder().with_name("judged")
            asked = row, standing.config, task.device, PROFILE, (K,), page.quiet, folder
            known[about] = judge.verified_config(*asked)
        if known[about]["code"] == VERIFIED:
            return standing, known[about]
        page.print(f"[red]not chosen[/]: {escape(judge.told(known[about]))}", soft_wrap=True)
        standings = [x for x in standings if x is not standing] if standing is not standings[0] else []
    return None, {}


def least_worst(searches: list[Search]) -> object | None:
    """Return the configuration that was measured for all shapes and is nowhere far behind; None where none was."""

    def worst(config) -> float:
        return max(search.outcomes[config].value for search in searches)

    measured = [{config for config, x in search.outcomes.items() if x.status == MEASURED} for search in searches]
    common = set.intersection(*measured) if measured else set()
    return min((config for config in searches[0].outcomes if config in common), key=worst, default=None)


def told(config: object) -> str:
    """Say a configuration in a line."""
    return ", ".join(f"{name}={x}" for name, x in asdict(config).items())


def _short(config, timer: Timer) -> str:
    return f"{timer.box.left:.0f} s left: {', '.join(str(x) for x in asdict(config).values())}"


def _best(search: Search) -> str:
    best = search.best(0, 1)
    return f"best {search.outcomes[best[0]].ratio.median:.2f} of the default" if best else "nothing measured yet"


def _line(config, outcome: Outcome) -> str:
    if outcome.status != MEASURED:
        return f"  {outcome.status:8} {told(config)}: {outcome.message}"
    return f"  {outcome.ratio.median:8.3f} {told(config)}: {outcome.ms.median:.2f} ms"
