"""Share a study between workers: the outcomes of its points, and who is at work on which, in one Optuna storage.

A point is claimed before it is measured. A claim is a running trial with all its parameters, added in one step (one
transaction, one line of a journal); then all trials are read again, and of several running trials of a point the one of
the lowest number holds it, the others are given up. Storages hand numbers out in the order in which trials become
visible, so whoever reads back his own sees every lower one: two never hold a point.

What a dead worker held is given up by whoever finds out, which any worker does on reading. On the same machine (the
same boot and process namespace) a process is there or not; elsewhere it is dead when its heartbeat did not move while
the reader watched for so long. Clocks of two machines are never compared.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autotune.outcomes import UsageError

BEAT = 20.0
"""Seconds between two signs of life; a compiler may keep a process from giving them for a while."""
SILENCE = 120.0
"""Seconds without a sign of life after which a worker elsewhere is dead."""

Params = Mapping[str, int]


@dataclass(frozen=True)
class Worker:
    """Who holds a claim."""

    token: str
    """Its own: a process may run several."""
    host: str
    """For people to read: containers of one machine may share the name."""
    place: str
    """Where the process number means something: boot and process namespace; empty where that is not known."""
    pid: int
    born: str
    """When the process began, in its system's own terms: numbers are used again."""

    @staticmethod
    def here() -> "Worker":
        """Describe a new worker of this process."""
        return Worker(uuid.uuid4().hex, platform.node(), _place(), os.getpid(), _born(os.getpid()))

    @property
    def gone(self) -> bool | None:
        """Tell whether the process has ended; None where that cannot be seen from here."""
        return _born(self.pid) != self.born if self.place and self.place == _place() else None


@dataclass
class Ledger:
    """One study in a storage, and this worker's part in it."""

    storage: BaseStorage
    name: str
    distributions: Mapping[str, BaseDistribution]
    now: Callable[[], float] = time.monotonic
    me: Worker = field(default_factory=Worker.here)
    known: dict[Hashable, str] = field(default_factory=dict, init=False)
    """Outcomes by point, as they were told, the oldest claim first."""
    busy: dict[Hashable, Worker] = field(default_factory=dict, init=False)
    """Points that are being measured, and by whom, this worker included."""

    def __post_init__(self):
        self._watched: dict[int, tuple[object, float]] = {}
        self._mine: dict[Hashable, Trial] = {}
        self._still = threading.Event()
        self._still.set()
        with self._reached():
            sampler = optuna.samplers.RandomSampler(seed=0)  # never asked: proposals are made elsewhere
            self.study = optuna.create_study(
                study_name=self.name, storage=self.storage, sampler=sampler, load_if_exists=True
            )
        self.read()

    def point(self, params: Params) -> Hashable:
        """Return what identifies a point."""
        return tuple(params[name] for name in self.distributions)

    def read(self) -> None:
        """Read what all workers have told so far, and give up what dead ones held."""
        with self._reached():
            trials = self.study.get_trials(deepcopy=False)
            self.busy = {}
            for trial in trials:
                if trial.state == TrialState.COMPLETE and "outcome" in trial.user_attrs:
                    self.known.setdefault(self.point(trial.params), trial.user_attrs["outcome"])
                elif trial.state == TrialState.RUNNING and "worker" in trial.user_attrs:
                    self._seen_running(trial)

    def claim(self, params: Params, way: str) -> bool:
        """Claim a point; False where another worker holds it, or told its outcome, meanwhile.

        way: how it was found, for those who read the study.
        """
        point, mark = self.point(params), uuid.uuid4().hex
        attributes = {"worker": asdict(self.me), "claim": mark, "way": way}
        with self._reached():
            self.study.add_trial(self._trial(params, state=TrialState.RUNNING, user_attrs=attributes))
            rivals = [x for x in self.study.get_trials(deepcopy=False) if self._same(x, point)]
            own = next(x for x in rivals if x.user_attrs.get("claim") == mark)
            if any(x.number < own.number or x.state == TrialState.COMPLETE for x in rivals):
                self._end(own, TrialState.FAIL)
                return False
            self._mine[point] = Trial(self.study, own._trial_id)
        self.busy[point] = self.me
        if self._still.is_set():
            self._still = threading.Event()
            threading.Thread(target=self._beat, args=(self._still,), name="heartbeat", daemon=True).start()
        return True

    def tell(self, params: Params, value: float, outcome: str, violated: bool) -> None:
        """Keep an outcome, that of a claimed point in its trial; it is in the storage when this returns.

        What was taken from this worker, which was silent too long, is dropped: another has measured it, or will.
        """
        point = self.point(params)
        trial = self._mine.pop(point, None)
        with self._reached():
            if trial is None:
                told, limits = {"outcome": outcome, "value": value}, {"failed": float(violated)}
                self.study.add_trial(self._trial(params, value=value, user_attrs=told, constraints=limits))
                self.known.setdefault(point, outcome)
            elif self._finish(trial, value, outcome, violated):
                self.known.setdefault(point, outcome)
        self.busy.pop(point, None)

    def release(self) -> None:
        """Give up all that this worker holds, whether or not it knows of it: an interruption may come anywhere."""
        self._still.set()
        self._mine = {}
        with self._reached():
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("worker", {}).get("token") == self.me.token:
                    self._end(trial, TrialState.FAIL)
        self.busy = {point: worker for point, worker in self.busy.items() if worker != self.me}

    def ways(self) -> dict[str, int]:
        """Return how many points were claimed and told, by the way in which they were found."""
        with self._reached():
            trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(Counter(x.user_attrs["way"] for x in trials if "way" in x.user_attrs))

    @property
    def holding(self) -> bool:
        """Tell whether this worker holds a point."""
        return bool(self._mine)

    @property
    def others(self) -> list[Worker]:
        """Return the living workers that are measuring now, without this one."""
        return list({x.token: x for x in self.busy.values() if x != self.me}.values())

    def _finish(self, trial: Trial, value: float, outcome: str, violated: bool) -> bool:
        """Tell a claimed trial; False where the claim was taken."""
        try:
            trial.set_constraint("failed", float(violated))
            trial.set_user_attr("value", value)
            trial.set_user_attr("outcome", outcome)  # from here on it is known: who finds it only ends the trial
            self.study.tell(trial.number, value)
        except (UpdateFinishedTrialError, ValueError):  # ValueError is what telling a finished trial raises
            return False
        return True

    def _seen_running(self, trial: FrozenTrial) -> None:
        point, worker = self.point(trial.params), Worker(**trial.user_attrs["worker"])
        if worker == self.me or not self._dead(trial, worker):
            self.busy.setdefault(point, worker)
        elif "outcome" in trial.user_attrs:
            self.known.setdefault(point, trial.user_attrs["outcome"])
            self._end(trial, TrialState.COMPLETE, trial.user_attrs["value"])
        else:
            self._end(trial, TrialState.FAIL)

    def _dead(self, trial: FrozenTrial, worker: Worker) -> bool:
        if (gone := worker.gone) is not None:
            return gone
        beat = trial.user_attrs.get("beat")
        last, since = self._watched.setdefault(trial.number, (beat, self.now()))
        if last != beat:
            self._watched[trial.number] = (beat, self.now())
            return False
        return self.now() - since >= SILENCE

    def _same(self, trial: FrozenTrial, point: Hashable) -> bool:
        """Tell whether a trial is a claim or an outcome of a point."""
        running = trial.state == TrialState.RUNNING and "claim" in trial.user_attrs
        told = trial.state == TrialState.COMPLETE and "outcome" in trial.user_attrs
        return (running or told) and self.point(trial.params) == point

    def _end(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):  # another worker was quicker
            self.study.tell(trial.number, value, state)

    def _trial(self, params: Params, **about) -> FrozenTrial:
        return create_trial(params=dict(params), distributions=dict(self.distributions), **about)

    def _beat(self, still: threading.Event) -> None:
        """Give signs of life until told to be still; a storage that is away for a while misses some."""
        beat = 0
        while not still.wait(BEAT):
            beat += 1
            for trial in list(self._mine.values()):
                with contextlib.suppress(Exception):
                    trial.set_user_attr("beat", beat)

    @contextlib.contextmanager
    def _reached(self):
        """Turn what a storage raises into UsageError."""
        try:
            yield
        except (StorageInternalError, OSError) as error:
            raise UsageError(f"the study cannot be read or written any more: {_cause(error)}") from error
        except KeyError as error:
            raise UsageError(f"the study is gone: {error.args[0]}; was it forgotten by --fresh elsewhere?") from error


def forget(storage: BaseStorage, name: str) -> None:
    """Delete a study, if there is one; UsageError where a process of this machine is at work on it."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "worker" in trial.user_attrs and (worker := Worker(**trial.user_attrs["worker"])).gone is False:
            raise UsageError(f"--fresh: process {worker.pid} is measuring a trial of this study")
    optuna.delete_study(study_name=name, storage=storage)


def _cause(error: BaseException) -> str:
    cause = getattr(error.__cause__, "orig", None) or error.__cause__ or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def _place() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Return when a process began, in ticks since the system did; empty where only its exit status is left, or less."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
