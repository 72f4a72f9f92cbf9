"""The ledger of a study: two workers never hold a point, a dead one's comes back, nothing that was told is lost."""

import subprocess
from dataclasses import replace

import pytest
from optuna.distributions import IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from autotune import ledger, storage
from autotune.ledger import SILENCE, Ledger, Worker
from autotune.outcomes import UsageError

FIELDS = {"a": IntDistribution(0, 3), "b": IntDistribution(0, 3)}
ONE, OTHER = {"a": 1, "b": 2}, {"a": 2, "b": 1}
POINT = (1, 2)


@pytest.fixture(params=["journal", "sqlite"])
def worker(request, tmp_path):
    """Make workers that share a study."""
    url = {"journal": None, "sqlite": f"sqlite:///{tmp_path}/study.db"}[request.param]
    return lambda **about: Ledger(storage.opened(url, tmp_path / "x.journal"), "study", FIELDS, **about)


def ended() -> Worker:
    """Describe a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return replace(Worker.here(), pid=process.pid)


def elsewhere() -> Worker:
    return replace(Worker.here(), host="elsewhere", place="another boot")


def states(found: Ledger) -> list[TrialState]:
    return [trial.state for trial in found.study.get_trials()]


def test_a_point_is_claimed_once(worker):
    first, second = worker(), worker()
    assert first.claim(ONE, "first") and not second.claim(ONE, "first") and second.claim(OTHER, "first")
    first.read()
    assert {point: x.token for point, x in first.busy.items()} == {POINT: first.me.token, (2, 1): second.me.token}


@pytest.mark.parametrize("method", ["add_trial", "get_trials"])
def test_of_two_claims_at_once_the_one_that_was_visible_first_holds(worker, monkeypatch, method):
    first, second, held = worker(), worker(), []
    real = getattr(first.study, method)

    def overtaken(*arguments, **keywords):
        if not held:
            held.append(None)
            held[0] = second.claim(ONE, "first")
        return real(*arguments, **keywords)

    monkeypatch.setattr(first.study, method, overtaken)
    assert [first.claim(ONE, "first"), *held] == ([False, True] if method == "add_trial" else [True, False])
    assert sorted(states(first)) == sorted([TrialState.RUNNING, TrialState.FAIL])


def test_what_was_told_meanwhile_is_not_claimed(worker):
    first, second = worker(), worker()
    assert second.claim(ONE, "first")
    second.tell(ONE, 0.5, "told", violated=False)
    assert not first.claim(ONE, "first")
    first.read()
    assert first.known == {POINT: "told"} and not first.busy


def test_the_point_of_a_process_that_ended_comes_back_at_once(worker):
    assert worker(me=ended()).claim(ONE, "first")
    found = worker()
    assert not found.busy and states(found) == [TrialState.FAIL] and found.claim(ONE, "first")


def test_a_process_number_that_is_used_again_is_another_process(worker):
    assert worker(me=replace(Worker.here(), born="1")).claim(ONE, "first")
    assert not worker().busy


def test_a_worker_elsewhere_lives_as_long_as_it_gives_signs_of_life(worker):
    now = [0.0]
    far, near = worker(me=elsewhere()), worker(now=lambda: now[0])
    assert far.claim(ONE, "first")
    for seconds, beats, there in ((0, 0, True), (0.9, 0, True), (0.2, 1, True), (0.9, 0, True), (0.2, 0, False)):
        now[0] += seconds * SILENCE
        far._beat(Ticks(beats))
        near.read()
        assert bool(near.busy) == there
    assert near.claim(ONE, "first")


class Ticks:
    """Stand for the event that a heartbeat waits for: so many beats, then still."""

    def __init__(self, beats: int):
        self.left = beats

    def wait(self, seconds: float) -> bool:
        self.left -= 1
        return self.left < 0


def test_what_a_silent_worker_tells_in_the_end_is_dropped(worker):
    now = [0.0]
    far, near = worker(me=elsewhere()), worker(now=lambda: now[0])
    far.claim(ONE, "first")
    near.read()
    now[0] = SILENCE
    near.read()
    assert near.claim(ONE, "first")
    far.tell(ONE, 0.7, "late", violated=False)
    near.tell(ONE, 0.5, "told", violated=False)
    far.read()
    assert far.known == near.known == {POINT: "told"}
    assert sorted(states(near)) == sorted([TrialState.FAIL, TrialState.COMPLETE])


def test_an_outcome_whose_worker_died_before_the_trial_ended_is_kept(worker, monkeypatch):
    dying = worker(me=ended())
    dying.claim(ONE, "first")
    monkeypatch.setattr(dying.study, "tell", lambda *arguments: None)
    dying.tell(ONE, 0.5, "told", violated=True)
    found = worker()
    assert found.known == {POINT: "told"} and not found.busy and not found.claim(ONE, "first")
    [trial] = found.study.get_trials(states=(TrialState.COMPLETE,))
    assert (trial.value, trial.constraints) == (0.5, {"failed": 1.0})


def test_who_leaves_gives_up_what_is_held_and_nothing_else(worker):
    first, second = worker(), worker()
    assert first.claim(ONE, "first") and second.claim(OTHER, "first")
    first.release()
    second.read()
    assert list(second.busy) == [(2, 1)] and not first.holding and second.holding


def test_a_storage_that_goes_away_is_one_line(worker, monkeypatch):
    def lost(*arguments, **keywords):
        raise StorageInternalError("lost") from OSError("the server closed the connection\nunexpectedly")

    found = worker()
    monkeypatch.setattr(found.study, "get_trials", lost)
    with pytest.raises(UsageError, match="any more: the server closed the connection$"):
        found.read()


def test_where_processes_cannot_be_told_apart_signs_of_life_decide(monkeypatch):
    monkeypatch.setattr(ledger, "_place", lambda: "")
    assert Worker.here().gone is None
