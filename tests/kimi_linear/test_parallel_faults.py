"""A rank that ends, hangs or differs ends the job: the others say which one, and wait for nobody longer than agreed."""


import pytest
import torch
from ranks import LIMIT, done, port, run, start

from kimi_linear import preset, write_random

COMMAND = """
import os, signal, sys
from datetime import timedelta
from torch.distributed import distributed_c10d
from kimi_linear import KimiLinear
from kimi_linear.__main__ import end, main
from kimi_linear.parallel import job

decode, steps = KimiLinear.decode, []

def hooked(model, ids, cache):
    steps.append(ids)
    if len(steps) == 2:
        {hurry}
    if os.environ["RANK"] == "1" and len(steps) == 3:
        {fault}
    return decode(model, ids, cache)

def impatient():
    "From now on wait for seconds only; the ranks have long met, however busy the machine is."
    job.ROLL_CALL = 1
    distributed_c10d._set_pg_timeout(timedelta(seconds=3), distributed_c10d.group.WORLD)

KimiLinear.decode = hooked
end(main(sys.argv[1:]))
"""
"""The command, with what befalls rank 1 in its third step."""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
ROLL = """
import os, signal
from kimi_linear.__main__ import end
from kimi_linear.parallel import RankLost, joined

code = 0
try:
    with joined(timeout=120) as job:
        job.everybody(1)
        if job.share.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        job.everybody(2)
except RankLost as error:
    print(error)
    code = 1
end(code)
"""
OTHERWISE = """
import os, sys
from kimi_linear.__main__ import end, main

end(main([*sys.argv[1:], "--seed", os.environ["RANK"]]))
"""
DIFFERING = """
import os
from kimi_linear.__main__ import end
from kimi_linear.parallel import JobError, joined, load

try:
    with joined(timeout=120) as job:
        load(os.environ["FOLDER"], job)
except JobError as error:
    print(error)
end(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "1"
    write_random(preset("tiny", layers=2), folder, dtype=torch.float32)
    return folder


def generate(folder, *options: str) -> list[str]:
    return ["generate", "--model", str(folder), "--ids", "1,2,3", "--max-new-tokens", "200", *options]


def command(fault: str, hurry: str = "pass") -> str:
    return COMMAND.format(fault=fault, hurry=hurry)


def test_a_rank_that_is_killed_ends_the_job_and_is_named(folder):
    first, second = run(["-c", command(KILLED), *generate(folder)])
    assert (first.code, second.code) == (1, -9)
    assert "python -m kimi_linear, rank 0: rank 1 (process " in first.err
    assert "has ended: killed, or crashed" in first.err


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_reason(folder):
    first, second = run(["-c", command("raise MemoryError('no room')"), *generate(folder)])
    assert first.code == 1 and "has ended: MemoryError: no room" in first.err
    assert second.code == 6 and "MemoryError: no room" in second.err


def test_a_rank_that_hangs_is_named_after_the_time_out(folder):
    program = command("os.kill(os.getpid(), signal.SIGSTOP)", "impatient()")
    processes = start(["-c", program, *generate(folder)], 2)
    try:
        _, err = processes[0].communicate(timeout=LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert "rank 1 (process " in err and "did not answer within the time-out, nor 1 s after it" in err


def test_all_others_name_the_one_that_is_lost():
    *others, lost = run(["-c", ROLL], 3)
    assert lost.code == -9
    for end in others:
        assert end.code == 1 and end.out.startswith("rank 2 (process ") and "killed" in end.out, end


@pytest.mark.slow
def test_torchrun_ends_too_and_names_it(folder, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(command(KILLED))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port()]
    [end] = run([*torchrun, str(script), *generate(folder)], 1)
    assert end.code != 0
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in end.err


def test_ranks_with_different_tuned_configurations_are_refused(folder, differently_tuned):
    ends = run(["-m", "kimi_linear", *generate(folder)], KDA_CONFIG_DIR=f"{differently_tuned}/{{rank}}")
    for rank, end in enumerate(ends):
        assert (end.code, end.out) == (1, "")
        assert f"rank {rank}: ranks would run with different tuned files, by rank and digest 0: " in end.err


@pytest.mark.slow
def test_ranks_with_different_arguments_are_refused(folder):
    for end in run(["-c", OTHERWISE, *generate(folder)]):
        assert end.code == 1 and "the ranks differ in their arguments: rank 0: device=cpu, " in end.err
        assert "seed=1" in end.err.partition("rank 1: device")[2]


def test_ranks_that_find_different_checkpoints_are_refused(folder):
    write_random(preset("tiny", layers=3), folder.with_name("0"), dtype=torch.float32)
    for told in done(run(["-c", DIFFERING], FOLDER=f"{folder.parent}/{{rank}}")):
        assert told.startswith("the ranks differ in the checkpoint: rank 0: ") and "; rank 1: " in told


def test_ranks_that_do_not_come_are_not_waited_for_longer_than_agreed(folder):
    [end] = run(["-m", "kimi_linear", *generate(folder, "--rank-timeout", "2")], 1, WORLD_SIZE="2")
    assert end.code == 1 and "rank 0: not all of 2 ranks came to 127.0.0.1:" in end.err


def test_a_time_out_without_ranks_is_refused(folder, capsys):
    from kimi_linear.__main__ import main

    assert main(generate(folder, "--rank-timeout", "5")) == 2
    assert "--rank-timeout is a number of seconds above 0 under torchrun, got 5.0" in capsys.readouterr().err


def test_other_commands_are_not_run_by_ranks(folder, capsys, monkeypatch):
    from kimi_linear.__main__ import main

    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", "--model", str(folder)]) == 2
    assert "torchrun starts ranks of generate only" in capsys.readouterr().err


