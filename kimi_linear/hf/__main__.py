"""Run transformers' own command line with its KDA models on our ops: serve, chat, and whatever else it has.

    python -m kimi_linear.hf [--absorbed-mla] serve DIR --port 8000

is `transformers serve DIR --port 8000` after `kimi_linear.hf.enable()`. What was enabled goes to stderr.
"""

import sys

from kimi_linear import hf

FLAG = "--absorbed-mla"
USAGE = 2


def main() -> int:
    """Enable, and hand the rest of the arguments over; returns the exit code, 2 where nothing can be enabled."""
    absorbed, arguments = sys.argv[1:2] == [FLAG], sys.argv[1:]
    if arguments[:1] in ([], ["--help"], ["-h"]):
        print(__doc__)
        return 0 if arguments else USAGE
    try:
        told = hf.enable(absorbed_mla=absorbed)
        from transformers.cli.transformers import main as transformers
    except (ImportError, RuntimeError) as error:
        print(f"python -m kimi_linear.hf: {error}", file=sys.stderr)
        return USAGE
    print(told, file=sys.stderr, flush=True)
    sys.argv = ["transformers", *arguments[absorbed:]]
    return transformers() or 0


if __name__ == "__main__":
    sys.exit(main())
