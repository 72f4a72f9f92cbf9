"""A command ends with a line and a code, whatever happens to it: errors, Ctrl-C, a reader who has seen enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_linear.commands.ending import ended

ROOT = Path(__file__).parents[2]


class Foreseen(ValueError):
    pass


def raising(error: BaseException):
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (lambda: 7, 7, ""),
        (raising(Foreseen("no such thing")), 2, "prog: no such thing\n"),
        (raising(KeyboardInterrupt()), 130, "stopped\n"),
    ],
    ids=["its own code", "a foreseen error", "Ctrl-C"],
)
def test_an_end_is_a_code_and_a_line(capsys, run, code, said):
    assert ended("prog", run, {Foreseen: 2}, "stopped") == code
    assert capsys.readouterr().err == said


def test_an_error_that_nobody_foresaw_keeps_its_traceback(capsys):
    assert ended("prog", raising(ValueError("what")), {Foreseen: 2}, "stopped") == 6
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_reader_who_has_seen_enough_ends_it_well():
    call = "ended('', lambda: print('x') or 7, {}, '')"
    script = f"import sys; from kimi_linear.commands.ending import ended; sys.exit({call})"
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")
