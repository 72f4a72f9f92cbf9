"""Memory of NaN reaches whoever allocates: torch under any name, compiled code, our pages; and ends with the call."""

import platform
import subprocess
import sys

import pytest
import torch
from torch._C._dynamo.guards import _empty_strided_cpu

from impls import pages
from verify import children
from verify.poison import free_blocks, poisoned_memory

EMPTY = torch.empty
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc only")
ALLOCATIONS = {
    "a name of its own": lambda n: EMPTY(n),
    "C++ behind an operator": lambda n: torch.Tensor(n),
    "compiled code": lambda n: _empty_strided_cpu((n,), (1,), torch.float32),
    "our pages": lambda n: pages.room((n,), torch.float32, torch.device("cpu")),
}


@GLIBC
@pytest.mark.parametrize("size", [10**3, 10**5, 10**7])
@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_what_is_allocated_holds_nan(allocate, size):
    before = torch.ones(size)
    del before  # a block that holds ones is free now
    with poisoned_memory("cpu"):
        assert allocate(size).isnan().all()


@GLIBC
def test_pages_that_were_left_by_another_tensor_hold_nan():
    room = ALLOCATIONS["our pages"]
    room(2 * 10**6).fill_(1.0)
    assert (room(2 * 10**6) == 1.0).all()
    with poisoned_memory("cpu"):
        assert room(2 * 10**6).isnan().all()


@GLIBC
@pytest.mark.parametrize("error", [None, ValueError])
def test_poisoning_ends_with_the_call_however_it_ends(error):
    mapped = pages._mapped
    try:
        with poisoned_memory("cpu"):
            if error:
                raise error
    except ValueError:
        pass
    assert pages._mapped is mapped
    assert not EMPTY(10**7).isnan().any()  # mapped anew: zeros


SMALL = """
import random, torch
from verify.poison import poisoned_memory
empty, dice, kept, stale = torch.empty, random.Random(0), [], 0
for _ in range(3000):
    size = dice.randrange(1, 300)
    kept.append(torch.ones(size))
    at = dice.randrange(len(kept))
    del kept[at : at + dice.randrange(4)]
    with poisoned_memory("cpu"):
        x = empty(size)
    stale += not x.isnan().all()
    kept.append(x)
print(stale)
"""


@GLIBC
def test_in_a_worker_small_blocks_hold_nan_too():
    run = subprocess.run([sys.executable, "-c", SMALL], env=children.environment("cpu"), capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("0\n", 0), run.stderr


def segment(device: int, stream: int, pool: tuple[int, int], *blocks: tuple[int, str]) -> dict:
    held = [{"size": size, "state": state} for size, state in blocks]
    return {"device": device, "stream": stream, "segment_pool_id": pool, "blocks": held}


def test_free_blocks_of_one_device_and_stream_are_chosen():
    mine = segment(1, 7, (0, 0), (512, "inactive"), (2048, "active_allocated"), (1024, "inactive"))
    others = [segment(0, 7, (0, 0), (1, "inactive")), segment(1, 8, (0, 0), (2, "inactive"))]
    graph = segment(1, 7, (0, 1), (3, "inactive"))
    assert free_blocks([mine, *others, graph], 1, 7) == [1024, 512]
