"""Threads are held on cores of their own while something is timed, nothing else is, and the reason why not is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from autotune import clock, pinning
from autotune.cases import Case
from autotune.clock import Bench, Clock, raced
from autotune.pinning import Conditions, Pinning, Unpinnable, pinned, places
from autotune.search import Outcome
from autotune.timing import Box, Effort
from impls import ChunkTorchConfig, tuned

LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no sched_setaffinity")
TWO = pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="one CPU")
BENCH = Bench("chunk_torch", Case("tiny", 1, 64, 2, 16, 16), "float32", "cpu", 1)
DEFAULT = ChunkTorchConfig()


def topology(folder: Path, cores: list[tuple[int, int]]) -> Path:
    """Write what Linux tells of CPUs: (package, core) of each."""
    for cpu, names in enumerate(cores):
        path = folder / f"cpu{cpu}" / "topology"
        path.mkdir(parents=True)
        for name, x in zip(("physical_package_id", "core_id"), names, strict=True):
            (path / name).write_text(f"{x}\n")
    return folder


MACHINES = {
    "a core each": ([(0, 0), (0, 1), (0, 2)], {0, 1, 2}, 2, (2, 1)),
    "two CPUs a core": ([(0, 0), (0, 1), (0, 0), (0, 1)], {0, 1, 2, 3}, 2, (1, 0)),
    "equal cores of two packages": ([(0, 0), (1, 0)], {0, 1}, 2, (1, 0)),
    "some are forbidden": ([(0, 0), (0, 1), (0, 2)], {0, 2}, 2, (2, 0)),
    "nothing is told": ([], {0, 1}, 2, (1, 0)),
    "too few cores": ([(0, 0), (0, 0)], {0, 1}, 2, "2 threads on 1 physical cores"),
}


@LINUX
@pytest.mark.parametrize("cores, allowed, threads, expected", MACHINES.values(), ids=MACHINES)
def test_a_thread_gets_a_physical_core(tmp_path, monkeypatch, cores, allowed, threads, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    folder = topology(tmp_path, cores)
    if isinstance(expected, tuple):
        assert places(threads, folder) == expected
        return
    with pytest.raises(Unpinnable, match=expected):
        places(threads, folder)


@LINUX
@pytest.mark.parametrize("error", [None, ValueError])
def test_a_thread_is_held_and_given_back_however_it_ends(error):
    before = os.sched_getaffinity(0)
    try:
        with pinned(1) as found:
            assert os.sched_getaffinity(0) == set(found.cpus) and len(found.cpus) == 1 and found.reason is None
            if error:
                raise error
    except ValueError:
        pass
    assert os.sched_getaffinity(0) == before


TEAM = """
import os, torch
from pathlib import Path
from autotune.pinning import pinned
def allowed():
    return sorted(sorted(os.sched_getaffinity(int(x.name))) for x in Path("/proc/self/task").iterdir())
torch.set_num_threads(2)
x = torch.ones(1000, 1000)
x @ x  # the team is there before it is held
before = allowed()
with pinned(2) as found:
    x @ x
    held = allowed()
print(sorted([c] for c in found.cpus) == [c for c in held if len(c) == 1], len(found.cpus), allowed() == before)
"""


@LINUX
@TWO
def test_threads_that_existed_before_are_held_and_given_back():
    run = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["True", "2", "True"], run.stderr


@pytest.mark.parametrize("threads, reason", [(10**4, "physical cores"), (1, "refused")], ids=["many", "refused"])
def test_where_it_is_impossible_the_reason_is_told(monkeypatch, threads, reason):
    def refuse(*_):
        raise OSError("refused")

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    with pinned(threads) as found:
        assert found.cpus == () and reason in found.reason


def test_without_openmp_several_threads_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(pinning, "MAPS", tmp_path / "maps")
    (tmp_path / "maps").write_text("7f00 r-xp 00000000 00:00 0    /lib/libc.so.6\n")
    monkeypatch.setattr(pinning, "places", lambda threads, _: tuple(range(threads)))
    with pinned(2) as found:
        assert found == Pinning((), "no OpenMP library with GOMP_parallel is loaded")


@LINUX
def test_a_trial_is_timed_held_and_compiled_free(monkeypatch):
    timer, before, seen = Clock(BENCH, DEFAULT, Box(1e6)), os.sched_getaffinity(0), {"called": set(), "timed": set()}
    calls, milliseconds = timer.calls, timer.watch.milliseconds

    def watched(kind, function):
        def run(*arguments):
            seen[kind].add(frozenset(os.sched_getaffinity(0)))
            return function(*arguments)

        return run

    timer.calls = lambda config: watched("called", calls(config))
    monkeypatch.setattr(timer.watch, "milliseconds", watched("timed", milliseconds))
    outcome = timer.outcome(ChunkTorchConfig(chunk_size=32))
    (cpus,) = seen["timed"]
    assert cpus == set(outcome.conditions["cpus"]) and len(cpus) == 1
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    assert frozenset(before) in seen["called"] and os.sched_getaffinity(0) == before


def test_a_race_says_what_it_ran_under(monkeypatch):
    monkeypatch.setattr(clock, "FINAL", Effort(least=3, most=3, seconds=0.0))
    (standing,) = raced(BENCH, [], DEFAULT)
    told = standing.conditions.to_json()
    assert len(told["cpus"]) == 1 or told["unpinned"]
    assert told["load_before"] is None or told["load_before"] >= 0 and told["load_after"] >= 0


@pytest.mark.parametrize(
    "change, wrong",
    [({}, False), ({"cpus": "all"}, True), ({"load_after": None}, False), ({"more": 1}, True)],
    ids=["as told", "cpus in words", "no load", "unknown field"],
)
def test_an_entry_of_a_tuned_file_keeps_the_conditions(change, wrong):
    schema = json.loads(Path(tuned.__file__).with_name("tuned.schema.json").read_text())
    of_timing = {"$ref": "#/$defs/entry/properties/timing/properties/conditions", "$defs": schema["$defs"]}
    told = Conditions(Pinning((1, 0), None), 0.5, 1.5).to_json() | change
    assert bool(list(jsonschema.Draft202012Validator(of_timing).iter_errors(told))) == wrong


def test_threads_of_the_host_stay_free_where_a_device_is_timed():
    with clock.held(Bench("chunk_triton", BENCH.case, "float32", "cuda:0", 1)) as found:
        assert found.cpus == () and "device" in found.reason
    assert Conditions(found, None, None).to_json()["unpinned"] == found.reason
