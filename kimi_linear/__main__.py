"""Run Kimi Linear from checkpoints in the released layout."""

import argparse
import os
import sys

from kimi_linear.chat import ChatError
from kimi_linear.commands import bench, generate, init, inspect
from kimi_linear.commands.arguments import BROKEN, USAGE, UsageError, launched
from kimi_linear.commands.ending import ended
from kimi_linear.config import ConfigError
from kimi_linear.shards import CheckpointError
from kimi_linear.tokenizer import TokenizerError

COMMANDS = {"init": init, "generate": generate, "inspect": inspect, "bench": bench}
"""Modules with SUMMARY, configure(parser) and run(arguments) -> exit code."""
CODES = {UsageError: USAGE} | dict.fromkeys((ConfigError, CheckpointError, TokenizerError, ChatError), BROKEN)
EPILOG = """\
python -m kimi_linear COMMAND --help says more about a command.

exit code  0 done; 1 a checkpoint, tokenizer or template that cannot be used; 2 usage; 6 crash; 130 interrupted

examples   python -m kimi_linear init --preset tiny --out /data/tiny
           python -m kimi_linear inspect --model /data/tiny
           python -m kimi_linear generate --model /data/tiny --prompt "Once upon a time"
"""


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m kimi_linear", description=__doc__, epilog=EPILOG, formatter_class=form)
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        own = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__, formatter_class=form)
        module.configure(own)
        own.set_defaults(run=module.run)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    return ended("python -m kimi_linear", lambda: _run(arguments), CODES, "interrupted")


def _run(arguments: argparse.Namespace) -> int:
    if launched() and arguments.run is not generate.run:
        raise UsageError("torchrun starts ranks of generate only: run this command without it")
    return arguments.run(arguments)


def end(code: int) -> None:
    """End the process; a rank at once.

    DTensor's caches keep the process group: gloo's threads, still letting go of a tensor, ended the interpreter on its
    way out with SIGABRT in 4 of 20 runs on two busy cores.
    """
    if not launched():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
