"""How a command ends: what it raises becomes a line of standard error and an exit code, never a bare traceback's 1."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping

from kimi_linear.commands.arguments import CRASH, DONE, INTERRUPTED


def ended(prog: str, run: Callable[[], int], codes: Mapping[type[Exception], int], interrupted: str) -> int:
    """Run a command, and return its exit code; `codes` are those of errors that a line explains.

    A reader of standard output that has seen enough ends it well. `interrupted` is what Ctrl-C is answered with.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
        if code is None:
            traceback.print_exc()
            return CRASH
        print(f"{prog}: {error}", file=sys.stderr)
        return code
