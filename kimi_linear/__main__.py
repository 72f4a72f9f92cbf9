"""Run Kimi Linear from checkpoints in the released layout."""

import argparse
import os
import sys
import traceback

from kimi_linear.chat import ChatError
from kimi_linear.commands import bench, generate, init, inspect
from kimi_linear.commands.arguments import BROKEN, CRASH, DONE, INTERRUPTED, USAGE, UsageError
from kimi_linear.config import ConfigError
from kimi_linear.shards import CheckpointError
from kimi_linear.tokenizer import TokenizerError

COMMANDS = {"init": init, "generate": generate, "inspect": inspect, "bench": bench}
"""Modules with SUMMARY, configure(parser) and run(arguments) -> exit code."""
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
    try:
        return arguments.run(arguments)
    except (ConfigError, CheckpointError, TokenizerError, ChatError) as error:
        print(f"python -m kimi_linear: {error}", file=sys.stderr)
        return BROKEN
    except UsageError as error:
        print(f"python -m kimi_linear: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASH


if __name__ == "__main__":
    sys.exit(main())
