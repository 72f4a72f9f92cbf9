"""Judge on the workers of a dask cluster: each part of a target goes to one, in a process of its own there.

    dask scheduler
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 1 --resources GPU=1      (one worker for a GPU)

What a target does to its process is a verdict. What becomes of a worker is nobody's fault but the machine's: its part
goes to another one, twice.
"""

from collections import Counter

from verify import cluster, sources
from verify.choice import UsageError
from verify.plan import Plan
from verify.session import Listener, Verdict, run

LOCAL = "local"
PIECES = 4
"""Parts for each worker: those that are quick take more of them, and a cluster that is lost has finished some."""
AGAIN = 2
"""Times that a part is begun anew whose worker died."""
DAY = 86400.0


def judged(plan: dict, silence: float, expected: str) -> list[dict]:
    """Judge one part, on a worker; returns its records. Raises RuntimeError where the worker has other sources."""
    if (here := sources.digest()) != expected:
        raise RuntimeError(f"this worker has other sources: {here} for {expected}")
    found: list[dict] = []
    run([[Plan.from_json(plan)]], found.append, silence=silence)
    return found


def run_on(
    address: str, batches: list[list[Plan]], listen: Listener, workers: int, silence: float
) -> dict[str, Verdict]:
    """Do what `session.run` does on a cluster, or on so many processes of one of our own. Raises UsageError."""
    verdicts = {plan.target: Verdict(plan.target) for batch in batches for plan in batch}
    resource = "GPU" if any(plan.device.startswith("cuda") for batch in batches for plan in batch) else None
    try:
        with cluster.cluster(None if address == LOCAL else address, workers) as pool:
            if not pool.slots(resource, cluster.ANSWER):
                offered = f" that offers {resource}=1: dask worker ADDRESS --resources {resource}=1" if resource else ""
                raise UsageError(f"--scheduler {address}: no worker{offered}")
            _collect(pool, [plan for batch in batches for plan in batch], verdicts, listen, resource, silence)
    except cluster.Unreachable as error:
        raise UsageError(f"--scheduler {address}: {error}") from error
    return verdicts


def slots(address: str, workers: int) -> int:
    """Return how many parts a cluster can be given to keep it busy. Raises UsageError."""
    if address == LOCAL:
        return PIECES * workers
    try:
        with cluster.cluster(address) as pool:
            return PIECES * max(1, pool.slots(None, cluster.ANSWER))
    except cluster.Unreachable as error:
        raise UsageError(f"--scheduler {address}: {error}") from error


def _collect(
    pool: cluster.Pool,
    plans: list[Plan],
    verdicts: dict[str, Verdict],
    listen: Listener,
    resource: str | None,
    silence: float,
) -> None:
    flying, deaths = {}, Counter()

    def submit(plan: Plan) -> None:
        asked = plan.to_json(), silence, sources.digest()
        resources = {resource: 1} if resource and plan.device.startswith("cuda") else None
        flying[pool.submit(judged, *asked, seconds=DAY, resources=resources)] = plan

    for plan in plans:
        submit(plan)
    while flying:
        for task, result in pool.finished():
            plan = flying.pop(task)
            if isinstance(result, cluster.Failure):
                deaths[plan.target, plan.shard] += 1
                if result.kind == "died" and deaths[plan.target, plan.shard] <= AGAIN:
                    submit(plan)
                    continue
                result = [_lost(plan, result)]
            for record in result:
                verdicts[record["target"]].add(record)
                listen(record)


def _lost(plan: Plan, failure: cluster.Failure) -> dict:
    reason = f"on the cluster: {failure.message}"
    return {"schema": 1, "kind": "crash", "target": plan.target, "reason": reason, "trace": ""}
