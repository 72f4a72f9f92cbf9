"""Several processes run one study from a recorded table, on a journal and on a real PostgreSQL server.

This file is also what the processes run: it says which point it is measuring, and goes on when it is told to.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from multiprocessing.connection import wait
from pathlib import Path

import optuna
import pytest

from autotune import storage
from autotune.arguments import implementation_of, problem_of
from autotune.outcomes import UsageError
from autotune.replay import Recorded
from autotune.search import Search
from autotune.space import Setting, space_of

TABLE = Path(__file__).with_name("trials-chunk-torch-4096.json")
SETTING = Setting(problem_of("T=4096,H=16", "float32"))
SPACE = space_of(implementation_of("chunk_torch"), SETTING, {"compile": False})
BUDGET, MOMENT = 120.0, 120.0
"""Recorded seconds, half of what all points took; seconds in which one of the processes must say something."""
PASSWORD = "correct-horse"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))


def work(url: str, journal: str) -> None:
    table, points = Recorded(TABLE), list(SPACE.points())
    with Search(SPACE, Path(journal), "fleet", url=url or None, first=(table.default,)) as search:
        while (config := search.next(BUDGET)) is not None:
            print("measuring", points.index(config), flush=True)
            if not sys.stdin.readline():
                return
            search.tell(config, table.outcome(config))
    print("done", len(search.outcomes), flush=True)


@pytest.fixture(scope="module")
def server():
    """Start a PostgreSQL server on a free port of this machine; returns its URL. It refuses to run as root."""
    user = "postgres" if os.getuid() == 0 else None
    if not BINARIES:
        pytest.skip("no PostgreSQL server under /usr/lib/postgresql (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="PostgreSQL's driver: pip install 'kda-forge[fleet]'")
    folder = Path(tempfile.mkdtemp(prefix="kda-forge-postgresql-"))
    (folder / "password").write_text(PASSWORD)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)

    def run(command: str, *arguments: str) -> None:
        output = folder.with_suffix(".log")
        with output.open("a") as log:
            called = [BINARIES[-1] / command, "-D", folder / "data", *arguments]
            subprocess.run(called, user=user, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(folder.with_suffix(".log").unlink)
        secret = "-A", "scram-sha-256", f"--pwfile={folder}/password"
        run("initdb", "-U", "kda", *secret, "--locale=C", "-E", "UTF8", "--no-sync")
        run("pg_ctl", "-w", "-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off", "start")
        stack.callback(run, "pg_ctl", "-w", "-m", "immediate", "stop")
        yield f"postgresql+psycopg://kda:{PASSWORD}@127.0.0.1:{port}/postgres"


@pytest.fixture(params=[("journal", 2), ("postgresql", 4)], ids=lambda x: x[0])
def shared(request):
    """Return the URL of a storage, empty for the journal of a file, and how many processes share it."""
    name, count = request.param
    return request.getfixturevalue("server") if name == "postgresql" else "", count


def start(url: str, journal: Path) -> subprocess.Popen:
    called = [sys.executable, __file__, url, str(journal)]
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    return subprocess.Popen(called, env=os.environ | root, **pipes)


def test_no_trial_runs_twice_and_that_of_a_killed_worker_is_another_ones(shared, tmp_path):
    url, count = shared
    journal = tmp_path / "x.journal"
    processes = [start(url, journal) for _ in range(count)]
    by_pipe, begun, done = {x.stdout: x for x in processes}, defaultdict(list), {}
    victim, lost, held = processes[0], None, []
    while by_pipe:
        ready = wait(list(by_pipe), MOMENT)
        assert ready, "the workers have stopped"
        for pipe in ready:
            process, (said, number) = by_pipe[pipe], (pipe.readline().decode().split() or ("ended", 0))
            if said == "measuring":
                begun[int(number)].append(process)
                held.append(process)
                mine = [n for n, x in begun.items() if victim in x]
                if lost is None and len(mine) == 3 and len(set().union(*begun.values())) == count:
                    lost = mine[-1]
                    victim.kill()  # -9, in the middle of its third trial, when everybody is at work
                going = [x for x in held if x is not victim] if lost is not None else [victim] * (len(mine) < 3)
                for x in set(going) & set(held):
                    x.stdin.write(b"go on\n")
                    held.remove(x)
                continue
            if said == "done":
                done[process] = int(number)
            del by_pipe[pipe]
    points = list(SPACE.points())
    assert {number: len(x) for number, x in begun.items()} == {n: 1 + (n == lost) for n in range(len(points))}
    assert begun[lost][0] is victim and begun[lost][1] is not victim
    assert list(done.values()) == [len(points)] * (count - 1) and set(done) == set(processes) - {victim}
    assert all(any(process in x for x in begun.values()) for process in processes)
    assert [process.wait(MOMENT) for process in processes] == [-9] + [0] * (count - 1)
    kept, table = Search(SPACE, journal, "fleet", url=url or None), Recorded(TABLE)
    assert kept.outcomes == {point: table.outcome(point) for point in points} and not kept.busy
    told = kept.ledger.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(told) == len(points)


def test_a_wrong_password_is_refused_and_not_shown(server, tmp_path):
    with pytest.raises(UsageError, match="password authentication failed") as refused:
        storage.opened(server.replace(PASSWORD, "battery-staple"), tmp_path / "x.journal")
    assert "battery" not in str(refused.value)


if __name__ == "__main__":
    work(*sys.argv[1:])
