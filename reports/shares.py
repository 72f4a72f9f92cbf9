"""Share a time box out over the steps of a collection: nobody's overrun is paid by those that come behind.

Every step has a need, in seconds on two quiet cores. What is left beyond the needs of all is to spare: the tuner and
the benchmarks that are told their minutes share it by weight, what ends by itself may overrun into half of it. Where
the needs do not fit, those that do are run and the others passed over: the next call begins with them.
"""

from collections.abc import Mapping, Sequence

from reports.steps import Step

SLOWEST = 4.0
"""How many times slower than two quiet cores a machine is believed to be at most; a quicker one has more to spare."""
OVERRUN = 2.0
"""How many times its need a step may take that ends by itself, where nothing is to spare."""
HEADROOM = 0.5
"""Share of the needs of what comes behind and ends by itself that is kept for its overruns."""
AGAIN = 1.5
"""How much longer than it took until it was cut off a step is taken to need."""
MARGIN = 0.95
"""Share of its time that a step is told: starting and writing take the rest."""


def pace(done: Sequence[Step], records: Mapping[str, dict], load: float = 0.0) -> float:
    """Return how many times slower than two quiet cores this machine is.

    By the steps that ended by themselves; before any by the load: runnable processes of others for each core.
    """
    known = [step for step in done if not step.clocked and not step.resumes]
    expected = sum(step.needs for step in known)
    took = sum(records[step.name]["seconds"] for step in known)
    return min(max(took / expected if known else 1 + load, 1.0), SLOWEST)


def need(step: Step, slow: float, record: Mapping | None) -> float:
    """Return the seconds a step needs on a machine so many times slower, knowing what became of it before."""
    wanted = step.needs * slow
    if record and record["outcome"] == "cut off" and not (step.clocked or step.resumes):
        return max(wanted, AGAIN * record["seconds"])
    return wanted


def share(needs: Mapping[Step, float], left: float) -> float | None:
    """Return the seconds of the first of the steps that wait; None where it is to be passed over.

    needs: what each of them needs, in their order. left: seconds of the box.
    """
    step, own = next(iter(needs.items()))
    if own > left:
        return None
    spare = left - sum(needs.values())
    if spare <= 0:
        return own if step.clocked else min(OVERRUN * own, left)
    if not step.clocked:
        return min(max(OVERRUN * own, own + spare / 2), own + spare)
    kept = HEADROOM * sum(seconds for x, seconds in needs.items() if not x.clocked)
    return own + max(0.0, spare - kept) * step.weight / sum(x.weight for x in needs if x.clocked)


def told(step: Step, seconds: float, slow: float) -> float:
    """Return the minutes that a step is told of its share: what it takes behind them must fit, too."""
    behind = max(0.0, step.after * slow - step.leaves)
    return max(MARGIN * seconds - behind, 0.1 * seconds) / 60
