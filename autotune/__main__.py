"""Time implementations of Kimi Delta Attention on one device, and choose how they run there."""

import argparse
import os
import sys
import traceback

from autotune import bench, export, merge, show, space, static, tune, yardstick
from autotune.outcomes import CRASH, INTERRUPTED, PASS, USAGE, UsageError

COMMANDS = {
    "bench": bench,
    "space": space,
    "static": static,
    "tune": tune,
    "yardstick": yardstick,
    "show": show,
    "merge": merge,
    "export": export,
}
"""Modules with SUMMARY, configure(parser) and run(arguments) -> exit code."""


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    p = argparse.ArgumentParser(
        prog="python -m autotune",
        description=__doc__,
        epilog="python -m autotune COMMAND --help says more about a command.",
    )
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        own = commands.add_parser(
            name, help=module.SUMMARY, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(own)
        own.set_defaults(run=module.run)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASS
    except UsageError as error:
        print(f"python -m autotune: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASH


if __name__ == "__main__":
    sys.exit(main())
