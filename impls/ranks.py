"""Make sure that all ranks of a job choose alike: those that run with other configurations disagree in bits, or hang.

    from impls.ranks import check_same

    torch.distributed.init_process_group()
    check_same()  # once, when the environment and the files are as they will be
"""

import torch
import torch.distributed as dist

from impls.tuned import digest

FAILED = bytes(32)
"""What a rank shows that cannot tell its digest: it takes part, or the others would wait for it."""


def check_same(group: "dist.ProcessGroup | None" = None, device: str | None = None) -> str:
    """Compare what tuned files the ranks of a process group can use, and return their digest (`tuned.digest`).

    Every rank of the group must call it: one collective operation of 32 bytes per rank, in which a rank that never
    comes ends in the group's time-out. device: cpu or cuda:N that the ops run on; this rank's GPU, if there is one,
    where None. Raises RuntimeError on every rank, naming the ranks and their digests, where they differ, and on all
    ranks where one fails to read its own; ValueError without a process group, and on a rank that is not part of it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed must be initialised: expected a process group, got none")
    if dist.get_rank(group) < 0:
        raise ValueError(f"group must contain this rank, {dist.get_rank()}")
    failure = None
    try:
        own = bytes.fromhex(digest(device or _device()))
    except Exception as error:  # whatever it is, the others are told before it is raised
        own, failure = FAILED, error
    told = _gathered(own, group)
    if failure is not None:
        raise RuntimeError("this rank cannot tell which tuned files it uses") from failure
    if len(set(told)) > 1:
        raise RuntimeError(_difference(told, group))
    return own.hex()


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _gathered(own: bytes, group: "dist.ProcessGroup | None") -> list[bytes]:
    """Return every rank's bytes, in the order of the group, on a device that its backend takes."""
    here = "cpu" if "cpu" in dist.get_backend_config(group) else "cuda"
    mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(here)
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    return [bytes(x.tolist()) for x in everybody]


def _difference(told: list[bytes], group: "dist.ProcessGroup | None") -> str:
    ranks: dict[bytes, list[int]] = {}
    for rank, x in enumerate(told):
        ranks.setdefault(x, []).append(rank if group is None else dist.get_global_rank(group, rank))
    each = (
        f"{', '.join(map(str, those))}: {'unknown, an error there' if x == FAILED else x.hex()[:16]}"
        for x, those in ranks.items()
    )
    return (
        f"ranks would run with different tuned files, by rank and digest {'; '.join(each)}: give all of them the same "
        "KDA_CONFIG_DIR, user's cache and version of this package (python -m autotune show says what each one finds)"
    )
