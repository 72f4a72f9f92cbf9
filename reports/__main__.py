"""Build a page of results: `python -m reports --help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reports import claims, collect, load

DONE, USAGE = 0, 2
EPILOG = """\
exit code  0 done; 1 a command of collect failed; 2 usage, or a file that is no result of a known kind and version: then
           nothing is written; 7 the time of collect was over before everything was done; 130 interrupted

examples   python -m reports build results --out report
           python -m reports build results verify.jsonl --out report --markdown --png slides
           python -m reports collect --device cpu --minutes 20
           python -m reports claims results
"""


class UsageError(Exception):
    """Say what is wrong with the command line."""


def parser() -> argparse.ArgumentParser:
    """Build the command line. argparse exits with 2 where it is wrong, as UsageError does."""
    wide = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        prog="python -m reports", description="Show results.", epilog=EPILOG, formatter_class=wide
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("build", help="build one page of results", epilog=EPILOG, formatter_class=wide)
    p.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="files, or folders of .json and .jsonl files"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="write report.html there")
    p.add_argument("--markdown", action="store_true", help="write report.md there, too: for a pull request")
    p.add_argument("--png", type=Path, metavar="DIR", help="write every picture there, too: for slides")
    p.add_argument("--dark", action="store_true", help="with --png: every picture in dark colours, too")
    p.set_defaults(run=build)
    p = commands.add_parser(
        "collect", help="verify, tune and benchmark within a time box", epilog=EPILOG, formatter_class=wide
    )
    collect.configure(p)
    p = commands.add_parser("claims", help="the paper's claims beside ours", epilog=EPILOG, formatter_class=wide)
    claims.configure(p)
    return made


def build(args: argparse.Namespace) -> int:
    """Build the page; everything is read and drawn before the first file is written."""
    if args.dark and not args.png:
        raise UsageError("--dark goes with --png: the page is dark for who reads it so")
    results = load.read(args.results)
    try:
        from reports import pages
    except ImportError as error:
        raise UsageError(f"build needs {error.name}: pip install -e '.[reports]'") from error
    try:
        written = pages.build(results, args.out, args.markdown, args.png, args.dark)
    except OSError as error:
        raise UsageError(f"cannot write: {error}") from error
    print(*written, sep="\n")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (UsageError, collect.CollectError, load.ResultError) as error:
        print(f"reports: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
