"""The ranks of a job: join those that torchrun has started, see that they agree, and say which one is lost."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from impls.ranks import check_same
from kimi_linear.share import Share

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""
HOW = "start it with torchrun --nproc-per-node 2 or more"
TIMEOUT = 600.0
"""Seconds that a rank waits for another one, where nothing else is asked for."""
ROLL_CALL = 10.0
"""Seconds within which a rank answers that has not ended, once another one has lost contact."""
BREATH = 0.02
"""Seconds between two looks at who has ended."""
SETTLED = 0.1
"""Seconds in which gloo's threads let go of the last tensors, for which they need the interpreter: DTensor keeps them
beyond the process group, and one that comes too late ended 4 of 20 programs with SIGABRT on two busy cores."""
CONTACT = "contact lost"
"""What a rank leaves behind that did not go for a reason of its own."""


class JobError(RuntimeError):
    """Ranks that do not come together, or do not agree; the message is for people."""


class RankLost(JobError):
    """A rank that has ended, or does not answer: the message names it."""


@dataclass(frozen=True)
class Job:
    """This rank of a job."""

    share: Share
    """Which one it is, and of how many."""
    device: str
    """cpu, or this rank's own cuda:N."""
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Tell whether this is the rank that speaks for all."""
        return self.share.rank == 0

    def everybody(self, value: Any) -> list[Any]:
        """Return what every rank brings, in their order: all of them must call it."""
        told = [None] * self.share.ranks
        dist.all_gather_object(told, value)
        return told

    def agree(self, what: str, value: str) -> None:
        """Raise JobError on every rank, with what each of them brings, where that is not the same."""
        told = self.everybody(value)
        if len(set(told)) > 1:
            each = "; ".join(f"rank {rank}: {x}" for rank, x in enumerate(told))
            raise JobError(f"the ranks differ in {what}: {each}")


@contextlib.contextmanager
def joined(device: str = "cpu", timeout: float = TIMEOUT) -> Iterator[Job]:
    """Join the other processes that torchrun has started, and leave them at the end.

    device: cpu, with gloo between the ranks, or cuda, with NCCL and the GPU of this rank's number on its machine.
    timeout: seconds after which a rank that is waited for counts as lost. Raises JobError without torchrun, for one
    process alone, a device that a rank does not have, ranks that do not come, and on every rank where they have
    different tuned configurations (`impls.ranks.check_same`). From the block RankLost comes out of every rank that was
    waiting for one that has ended or does not answer, and names it: none waits longer than `timeout`, and then for
    ROLL_CALL seconds at most.
    """
    share, device = _place(device)
    watch = _met(share, device, timeout)
    try:
        try:
            _checked(device)
            yield Job(share, device, init_device_mesh(device.partition(":")[0], (share.ranks,)))
        except BaseException as error:
            watch.leave(error)
            if not lost_contact(error):
                raise
            raise RankLost(watch.verdict(min(timeout, ROLL_CALL))) from error
    finally:
        dist.destroy_process_group()
        time.sleep(SETTLED)


def _place(device: str) -> tuple[Share, str]:
    """Return which rank this is, and its device."""
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise JobError(f"several ranks need a launcher, which sets {', '.join(missing)}: {HOW}")
    rank, ranks, local = (int(os.environ[name]) for name in VARIABLES[:3])
    if ranks < 2:
        raise JobError(f"a job of ranks needs 2 or more, got {ranks}: leave torchrun out, or {HOW}")
    if device not in ("cpu", "cuda"):
        raise JobError(f"the device of ranks must be cpu or cuda, each takes the GPU of its number, got {device}")
    if device == "cpu":
        return Share(rank, ranks), device
    if local >= torch.cuda.device_count():
        raise JobError(f"rank {rank} needs GPU {local} of its machine, which has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return Share(rank, ranks), f"cuda:{local}"


def _met(share: Share, device: str, timeout: float) -> "Watch":
    """Make the process group, and return what this rank knows of the others."""
    limit = timedelta(seconds=timeout)
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
        backend = "gloo" if device == "cpu" else "nccl"
        group = dist.PrefixStore("kimi_linear", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=ranks, timeout=limit)
        told: list = [None] * ranks
        dist.all_gather_object(told, (socket.gethostname(), os.getpid()))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise JobError(f"not all of {share.ranks} ranks came to {where}: {error}") from error
    return Watch(store, share, told)


def _checked(device: str) -> None:
    try:
        check_same(device=device)
    except RuntimeError as error:
        if lost_contact(error):
            raise
        raise JobError(f"{error}" + (f": {error.__cause__}" if error.__cause__ else "")) from error


def lost_contact(error: BaseException) -> bool:
    """Tell whether an error says that another rank could not be reached, or was waited for in vain."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)


class Watch:
    """What a rank knows of the others when it has lost contact: their processes, and what they have left behind."""

    def __init__(self, store: dist.Store, share: Share, everyone: list[tuple[str, int]]):
        self.store, self.share, self.everyone = store, share, everyone

    def leave(self, error: BaseException) -> None:
        """Leave the reason behind why this rank ends."""
        why = CONTACT if lost_contact(error) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store may have ended first
            self.store.set(f"left/{self.share.rank}", why)

    def verdict(self, limit: float) -> str:
        """Return who has ended, and why where that is known, or who does not answer within so many seconds."""
        until = time.monotonic() + limit
        while True:
            others = [rank for rank in range(self.share.ranks) if rank != self.share.rank]
            left = {rank: self._left(rank) for rank in others}
            ended = [rank for rank in others if left[rank] != CONTACT and (left[rank] or self._gone(rank))]
            if ended or time.monotonic() > until or all(left.values()):
                break
            time.sleep(BREATH)
        if ended:
            return "; ".join(f"{self._named(rank)} has ended: {left[rank] or 'killed, or crashed'}" for rank in ended)
        if silent := [self._named(rank) for rank in others if not left[rank]]:
            return f"{', '.join(silent)} did not answer within the time-out, nor {limit:g} s after it"
        return "the ranks have lost contact with each other, and none has ended"

    def _left(self, rank: int) -> str:
        """Return what a rank has left behind, '' while there is nothing."""
        try:
            return self.store.get(f"left/{rank}").decode() if self.store.check([f"left/{rank}"]) else ""
        except RuntimeError:
            return ""

    def _gone(self, rank: int) -> bool:
        """Tell whether a rank's process on this machine has ended, buried or not."""
        host, process = self.everyone[rank]
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _named(self, rank: int) -> str:
        host, process = self.everyone[rank]
        return f"rank {rank} (process {process} on {host})"
