"""The process that judges: reads plans from standard input, writes one JSON record a line to standard output.

Targets run here and nowhere else, so that a crash, a hang or a poisoned device is a result and not the end of the run.
What a target prints goes to standard error, and cannot be mistaken for a record.
"""

import json
import os
import sys
import traceback

from verify import records
from verify.plan import Plan


def main() -> int:
    """Judge the plans one by one; an error of our own becomes a crash record, and the next plan follows. Returns 0."""
    # what a user has tuned may differ from shape to shape, and claims about bits hold within one configuration
    os.environ.setdefault("KDA_TUNED", "0")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for data in json.load(sys.stdin):
        plan = Plan.from_json(data)
        try:
            _judge(plan, lines)
        except Exception as error:
            usage = type(error).__name__ == "TargetError"
            kind, reason = ("usage", str(error)) if usage else ("crash", f"{type(error).__name__}: {error}")
            records.write(lines, kind, target=plan.target, reason=reason, trace=traceback.format_exc())
    return 0


def _judge(plan: Plan, lines) -> None:
    # imported here, after standard output has been moved: packages that print while they load must not break the
    # records
    import torch

    from verify.models.targets import is_model

    if is_model(plan.target):
        from verify.models.judge import judge
    else:
        from verify.runner import judge
    torch.set_num_threads(1)
    judge(plan, lambda kind, **fields: records.write(lines, kind, **fields))


if __name__ == "__main__":
    sys.exit(main())
