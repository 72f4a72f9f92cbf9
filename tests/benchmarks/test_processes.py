"""What is asked by line is answered by a process of its own; one that ends is an error, and no hang."""

import pytest
import torch
from processes import apart

PROGRAM = """
import os, sys
print("ready", flush=True)
for line in sys.stdin:
    if line == "end\\n":
        sys.exit(3)
    print(len(line.strip()) + int(os.environ["OMP_NUM_THREADS"]) / 16, flush=True)
"""


def test_lines_are_answered_by_a_process_with_as_many_threads():
    with apart(PROGRAM) as ask:
        assert [ask(""), ask("four")] == [x + torch.get_num_threads() / 16 for x in (0, 4)]


def test_a_process_that_ends_is_an_error_with_its_status():
    with pytest.raises(RuntimeError, match="an entrant ended with status 3"), apart(PROGRAM, "an entrant") as ask:
        ask("end")
    with pytest.raises(RuntimeError, match="ended with status 5"), apart("raise SystemExit(5)"):
        pass
