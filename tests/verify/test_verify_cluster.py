"""A cluster of two worker processes: what a function does to its worker is a result, not a hang."""

import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="pip install 'kda-forge[fleet]'")

from verify.cluster import Failure, Unreachable, cluster

GPU = {"GPU": 1}
ROOT = Path(__file__).parents[2]

STUTTER = """
import distributed
said, failed = distributed.Event.is_set, []
def is_set(self):
    if not failed:
        failed.append(self.name)
        raise OSError("the scheduler did not answer")
    return said(self)
distributed.Event.is_set = is_set
"""


@pytest.fixture(scope="module")
def pool():
    with cluster(processes=2, resources=GPU) as found:
        yield found


def results(pool, *tasks) -> list:
    """Wait for these; a Failure is told by its kind."""
    found = {}
    while len(found) < len(tasks):
        ended = pool.finished(120.0)
        assert ended, "nothing has ended in two minutes"
        found |= {task.name: value for task, value in ended}
    values = [found[task.name] for task in tasks]
    print(values)  # a test that fails tells what became of each
    return [x.kind if isinstance(x, Failure) else x for x in values]


def test_values_come_back_and_what_is_raised_is_one(pool):
    tasks = [pool.submit(operator.truediv, 1, x, resources=GPU) for x in (1, 2, 0, 4)]
    assert results(pool, *tasks) == [1.0, 0.5, "raised", 0.25] and not pool.tasks


def test_what_fails_before_the_function_is_called_is_tried_again(pool):
    pool.client.run(exec, STUTTER, {})
    assert results(pool, *(pool.submit(abs, -x, resources=GPU) for x in range(4))) == list(range(4))


def test_one_function_runs_at_once_for_a_resource(pool):
    assert pool.slots("GPU") == pool.slots() == 2 and pool.slots("TPU") == 0


def test_who_kills_its_worker_is_called_once_and_the_others_go_on(pool, tmp_path):
    begun = tmp_path / "begun"
    script = f"import os; open({str(begun)!r}, 'a').write('x'); os.kill(os.getpid(), {signal.SIGKILL})"
    tasks = [pool.submit(exec, script, resources=GPU), *(pool.submit(abs, -x, resources=GPU) for x in range(6))]
    assert results(pool, *tasks) == ["died", *range(6)]
    assert begun.read_text() == "x"
    again = [pool.submit(os.getpid, resources=GPU) for _ in range(4)]
    assert os.getpid() not in results(pool, *again)


def test_what_outlasts_its_time_is_ended_with_its_worker(pool):
    hung = pool.submit(exec, "import threading; threading.Event().wait()", seconds=0.1, resources=GPU)
    assert results(pool, hung, pool.submit(abs, -1, resources=GPU)) == ["late", 1]
    assert results(pool, *(pool.submit(abs, -x, resources=GPU) for x in range(4))) == list(range(4))


def test_what_is_cancelled_never_comes(pool):
    never, other = pool.submit(abs, -1, resources={"TPU": 1}), pool.submit(abs, -2)
    pool.cancel(never)
    assert results(pool, other) == [2] and pool.finished(0.0) == []


def test_waiting_ends_when_the_time_is_over(pool):
    never = pool.submit(abs, -1, resources={"TPU": 1})
    begun = time.monotonic()
    assert pool.finished(0.2) == [] and time.monotonic() - begun < 60
    pool.cancel(never)


def test_what_no_worker_can_run_ends(pool, monkeypatch):
    monkeypatch.setattr("verify.cluster.VACANT", 0.0)
    [(task, failure)] = [pool.submit(abs, -1, resources={"TPU": 1})] and pool.finished(60.0)
    assert failure == Failure("lost", "no worker with TPU=1 is left")


def test_workers_without_this_project_are_refused(pool, monkeypatch):
    monkeypatch.setattr("verify.cluster.__package__", "nobody_has_this")
    there = pool.client.scheduler.address
    with pytest.raises(Unreachable, match="not installed for its workers tcp://"), cluster(there):
        pass


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:1", "ftp://host"])
def test_what_is_no_scheduler_is_refused(address, monkeypatch):
    monkeypatch.setattr("verify.cluster.ANSWER", 0.5)
    with pytest.raises(Unreachable, match="expected the address of a dask scheduler"), cluster(address):
        pass


def test_dask_is_imported_only_where_a_scheduler_is_named():
    script = "import autotune.__main__, sys; sys.exit('distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
