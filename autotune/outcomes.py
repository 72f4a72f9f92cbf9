"""How a command can end: exit codes, those of verify where both have the case, and the exceptions behind them."""

from verify.session import CRASH, FAILED, INTERRUPTED, NOTHING, PASS, USAGE

UNFINISHED = 7
"""The time box ran out: what is missing is listed, and the same command goes on from there."""

ORDER = (CRASH, FAILED, UNFINISHED, NOTHING, PASS)
MEANINGS = {
    PASS: "everything asked for was measured",
    FAILED: "one of ours failed verification or raised on a case",
    USAGE: "usage",
    NOTHING: "nothing could be timed",
    CRASH: "crash",
    UNFINISHED: "the time box ran out",
    INTERRUPTED: "interrupted",
}


class UsageError(Exception):
    """The command line asks for something that does not exist; the message says what was expected."""


class BoxOver(Exception):
    """The time box ran out in the middle of something that is worth nothing unfinished."""


class DeviceLost(Exception):
    """A call left the device in a state in which nothing runs any more: only a new process can go on.

    `implementation` names the row whose call it was.
    """

    def __init__(self, implementation: str, message: str):
        super().__init__(message)
        self.implementation = implementation


def worst(codes: set[int]) -> int:
    """Return the exit code of several outcomes: 6 > 1 > 7 > 3 > 0."""
    return next((code for code in ORDER if code in codes), PASS)
