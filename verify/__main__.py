"""Judge implementations of Kimi Delta Attention against the float64 definition."""

import argparse
import contextlib
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from impls.checks import MAX_HEAD_DIM
from impls.table import IMPLEMENTATIONS
from verify import display, records, replay, session
from verify.choice import Choice, UsageError, choose
from verify.claims import KINDS
from verify.models.targets import is_model
from verify.plan import PROFILES, Plan
from verify.properties import PROPERTIES
from verify.recipes import DTYPES

EPILOG = """\
targets    a name from the table (--list), all, cpu (what runs there), or anybody's kernel as package.module:function
           with the signature of flash-linear-attention's chunk_kda. Default: everything in the table that runs on the
           device. A model, alone: kimi_linear, or anybody's as model:package.module:function (folder of a checkpoint ->
           verify.models.targets.Model), layer by layer, from random checkpoints, in float32 on a CPU.
devices    cpu, cuda:N, or interpret: Triton's interpreter, which needs no GPU, with its bfloat16 mended. Default: each
           implementation on the first that it has and this machine offers, yours on cpu. interpret asks each property
           on fewer and smaller recipes, by a budget that the report names; --max-examples N asks on N recipes instead.
exit code  0 pass, 1 a property failed, 2 usage, 3 nothing ran, 4 a mutant survived, 5 nondeterministic, 6 crash,
           130 interrupted

examples   python -m verify                                           our implementations, a minute
           python -m verify mypackage.kernels:chunk_kda               yours
           python -m verify recurrent_torch --property causality,split --dtype bfloat16 --max-examples 500
           python -m verify kimi_linear                                   the model
           python -m verify --explain causality
           python -m verify --replay verify-results/FILE.json         see a failure again
"""


UNWATCHED = 140
"""Columns where nobody watches: a table with names cut off cannot be read in a log."""

SHOWN = 5
"""Failures of one target that are printed in full; every one is kept in a file."""


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    choice: Choice
    named: frozenset[str]
    """Targets that the command line names one by one: each must run."""
    device: str | None
    profile: str
    properties: tuple[str, ...]
    dtypes: tuple[str, ...]
    seed: int
    examples: int | None
    head_dims: tuple[int, ...]
    config: str | None
    contract: str | None
    json: Path | None
    out: Path


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    p = argparse.ArgumentParser(
        prog="python -m verify",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("targets", nargs="*", metavar="TARGET", help="what to judge (see below)")
    _add_domain(p)
    _add_files(p)
    p.add_argument("--list", action="store_true", help="list implementations and properties")
    p.add_argument(
        "--explain", metavar="PROPERTY", help="equation, precondition, tolerance and the bugs that it would have caught"
    )
    p.add_argument("--self-test", action="store_true", help="judge the judge: every planted bug must be found")
    return p


def _add_domain(p: argparse.ArgumentParser) -> None:
    """Add what decides which cases are tried."""
    profiles = "; ".join(f"{x.name}: {x.summary}" for x in PROFILES.values())
    p.add_argument("--profile", choices=PROFILES, default="quick", help=f"how much to try (default quick). {profiles}")
    p.add_argument("--device", help="cpu, cuda:N, or interpret (Triton's interpreter, no GPU needed); see below")
    p.add_argument("--property", metavar="NAME,...", help="only these properties (--list names them)")
    p.add_argument("--dtype", metavar="NAME,...", help=f"input dtypes out of {', '.join(DTYPES)}; default by profile")
    seed = "which recipes are drawn (default 0); equal seeds, equal recipes"
    p.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    dims = "draw K and V out of these, up to 256; default small ones of every kind"
    p.add_argument("--head-dims", metavar="N,...", help=dims)
    p.add_argument("--max-examples", type=int, metavar="N", help="recipes per dtype instead of the profile's number")
    p.add_argument(
        "--contract",
        choices=DTYPES,
        help="assume this operand precision of a package.module:function, whatever the inputs",
    )


def _add_files(p: argparse.ArgumentParser) -> None:
    """Add what is read and written."""
    p.add_argument("--config", metavar="FILE", help="judge one launch configuration: a JSON object of its fields")
    records_help = "write records there, one JSON line per case as it happens"
    p.add_argument("--json", metavar="FILE", type=Path, help=records_help)
    out, out_help = Path("verify-results"), "where failing cases go (default verify-results)"
    p.add_argument("--out", metavar="DIR", type=Path, default=out, help=out_help)
    replay_help = "run one failing case again; name a foreign target on the command line too"
    p.add_argument("--replay", metavar="FILE", type=Path, help=replay_help)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    console = console if console.is_terminal else Console(width=UNWATCHED)
    try:
        return _command(parser().parse_args(argv), console)
    except UsageError as error:
        print(f"python -m verify: {error}", file=sys.stderr)
        return session.USAGE
    except KeyboardInterrupt:
        print("interrupted: records written so far are kept", file=sys.stderr)
        return session.INTERRUPTED
    except Exception:
        traceback.print_exc()
        return session.CRASH


def _command(args: argparse.Namespace, console: Console) -> int:
    if any(is_model(name) for name in args.targets):
        return _model(args, console)
    if args.list:
        return _list(console)
    if args.explain:
        return _explain(args.explain, console)
    if args.replay:
        _alone(args, "replay", "targets")
        return _replay(args, console)
    if args.self_test:
        _alone(args, "self_test", "seed", "json")
        _check_files(args)
        from verify import selftest

        return selftest.run(console, args.seed, args.json)
    return _judge(_options(args), console)


def _model(args: argparse.Namespace, console: Console) -> int:
    try:
        from verify.models import command
    except ModuleNotFoundError as error:
        raise UsageError(f"a model needs {error.name.split('.')[0]}: install kda-forge[model]") from error
    _check_files(args)
    return command.run(args, console)


def _alone(args: argparse.Namespace, mode: str, *taken: str) -> None:
    """Refuse what a mode would leave unheard: every argument other than `mode` and `taken` that is not at its default.

    An argument that repeats its default asks for what happens anyway.
    """
    defaults = vars(parser().parse_args([]))
    given = [name for name, x in vars(args).items() if name not in (mode, *taken) and x != defaults[name]]
    if given:
        heard = " and ".join(map(_flag, taken))
        raise UsageError(f"{_flag(mode)} goes together with {heard} only, not with {', '.join(map(_flag, given))}")


def _flag(name: str) -> str:
    return "TARGET" if name == "targets" else f"--{name.replace('_', '-')}"


def _names(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = tuple(x for x in (text or "").split(",") if x)
    unknown = [x for x in names if x not in known]
    if unknown:
        raise UsageError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")
    return names


def _options(args: argparse.Namespace) -> Options:
    profile = PROFILES[args.profile]
    if args.max_examples is not None and args.max_examples < 1:
        raise UsageError(f"--max-examples must be at least 1, got {args.max_examples}")
    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda", "interpret"):
        raise UsageError(f"--device must be cpu, cuda:N or interpret, got {args.device}")
    choice = choose(args.targets, args.device)
    _check_files(args)
    _check_kinds(args, tuple(choice.devices))
    return Options(
        choice=choice,
        named=frozenset(args.targets),
        device=args.device,
        profile=args.profile,
        properties=_names(args.property, tuple(p.name for p in PROPERTIES), "property"),
        dtypes=_names(args.dtype, DTYPES, "dtype") or profile.dtypes,
        seed=args.seed,
        examples=args.max_examples,
        head_dims=_head_dims(args.head_dims),
        config=args.config,
        contract=args.contract,
        json=args.json,
        out=args.out,
    )


def _head_dims(text: str | None) -> tuple[int, ...]:
    sizes = tuple(text.split(",")) if text is not None else ()
    if wrong := [x for x in sizes if not x.isdecimal() or not 1 <= int(x) <= MAX_HEAD_DIM]:
        raise UsageError(f"--head-dims must be numbers from 1 to {MAX_HEAD_DIM}, got {wrong[0]!r}")
    return tuple(map(int, sizes))


def _check_kinds(args: argparse.Namespace, targets: tuple[str, ...]) -> None:
    """Refuse a launch configuration of somebody else's kernel, and another contract than an implementation's own."""
    foreign = [name for name in targets if ":" in name]
    if args.config and foreign:
        raise UsageError(f"--config is for implementations of the table, got {', '.join(foreign)}")
    if args.contract and (own := [name for name in targets if ":" not in name]):
        raise UsageError(f"--contract is for package.module:function; {', '.join(own)} has a contract of its own")


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files that could not be read or written, before a run of minutes depends on them."""
    if args.config and not Path(args.config).is_file():
        raise UsageError(f"--config {args.config}: no such file")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: expected a folder")
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
        except OSError as error:
            raise UsageError(f"--json {args.json}: {error.strerror}") from error


def _judge(options: Options, console: Console) -> int:
    plans = [_plan(options, name, device) for name, device in options.choice.devices.items()]
    expected = {plan.target: plan.examples * len(plan.dtypes) for plan in plans}
    with _stream(options.json) as stream, display.progress(console, expected) as show:
        if stream:
            records.write(
                stream,
                "run",
                date=records.now(),
                versions=records.versions(),
                device=options.device or "default",
                profile=options.profile,
                seed=options.seed,
                arguments=sys.argv[1:],
            )
            for name, reason in options.choice.absent.items():
                records.write(stream, "not-run", target=name, reason=reason)

        def listen(record: dict) -> None:
            if stream:
                stream.write(records.line(record))
                stream.flush()
            show(record)

        # what is interpreted takes longest: it starts first, and is shown in its place
        batches = [[plan] for plan in sorted(plans, key=lambda plan: plan.device != "interpret")]
        judged = session.run(batches, listen)
        verdicts = [judged[plan.target] for plan in plans]
    heard = [v for v in verdicts if v.code != session.NOTHING or v.target in options.named]
    code = session.exit_code([v.code for v in heard])
    _show(verdicts, options, console)
    for name, reason in options.choice.absent.items():
        console.print(display.not_run(name, reason), soft_wrap=True)
    if options.json:
        with options.json.open("a") as stream:
            records.write(stream, "summary", code=code, targets={v.target: v.code for v in verdicts})
    return code


def _plan(options: Options, name: str, device: str) -> Plan:
    return Plan(
        target=name,
        device=device,
        profile=options.profile,
        dtypes=options.dtypes,
        seed=options.seed,
        examples=options.examples or PROFILES[options.profile].examples,
        budgeted=options.examples is None,
        properties=options.properties,
        config=options.config,
        contract=options.contract,
        head_dims=options.head_dims,
    )


def _stream(path: Path | None):
    return contextlib.nullcontext() if path is None else path.open("w")


def _show(verdicts: list[session.Verdict], options: Options, console: Console) -> None:
    judged = [v for v in verdicts if v.cells]
    if judged:
        console.print(display.verdict_table(judged))
    if not verdicts:
        nothing = f"nothing ran: no implementation in the table runs on {options.device or 'this machine'}"
        console.print(f"{nothing} (--list shows devices)", soft_wrap=True)
    for verdict in verdicts:
        if verdict.broken:
            console.print(display.broken(verdict), soft_wrap=True)
        if verdict.seen:
            console.print(display.counts(verdict, options.choice.devices[verdict.target]), soft_wrap=True)
            console.print(display.terms(verdict), soft_wrap=True)
        if verdict.done and verdict.done["not_asked"]:
            console.print(display.not_asked(verdict), soft_wrap=True)
        if verdict.probes:
            console.print(display.contract(options.contract), soft_wrap=True)
        for line in display.probes(verdict):
            console.print(line, soft_wrap=True)
        commands = [_command_for(options.out, failure) for failure in verdict.failures]
        for failure, command in list(zip(verdict.failures, commands, strict=True))[:SHOWN]:
            console.print(display.failure(failure, command), soft_wrap=True)
        if rest := [failure["property"] for failure in verdict.failures[SHOWN:]]:
            console.print(f"  and {len(rest)} more in {options.out}: {', '.join(rest)}", soft_wrap=True)


def _command_for(out: Path, failure: dict) -> str:
    path = replay.save(out, failure)
    foreign = f"{failure['target']} " if ":" in failure["target"] else ""
    return f"python -m verify {foreign}--replay {shlex.quote(str(path))}"


def _list(console: Console) -> int:
    console.print("[bold]implementations")
    for impl in IMPLEMENTATIONS:
        text = f"  {impl.name:18} {', '.join(impl.devices):10} {', '.join(impl.dtypes)}  {impl.summary}"
        console.print(text, soft_wrap=True)
    console.print("[bold]properties")
    for prop in PROPERTIES:
        console.print(
            f"  {prop.name:22} {prop.kind:10} {prop.explanation.splitlines()[0]}", markup=False, soft_wrap=True
        )
    return session.PASS


def _explain(name: str, console: Console) -> int:
    names = _names(name, tuple(p.name for p in PROPERTIES), "property")
    for prop in (p for p in PROPERTIES if p.name in names):
        console.print(f"{prop.name} ({prop.kind}: {KINDS[prop.kind]})\n", markup=False)
        console.print(prop.explanation, markup=False, soft_wrap=True)
    return session.PASS


def _replay(args: argparse.Namespace, console: Console) -> int:
    try:
        failure = replay.load(args.replay)
    except ValueError as error:
        raise UsageError(str(error)) from error
    own = ":" not in failure["target"] or failure["target"].startswith("mutant:")
    if args.targets != [failure["target"]] and (args.targets or not own):
        raise UsageError(
            f"the file names {failure['target']}: code is imported only when you name it yourself: "
            f"python -m verify {failure['target']} --replay {args.replay}"
        )
    plan = Plan(
        target=failure["target"],
        device=failure["device"],
        profile="quick",
        dtypes=(failure["recipe"]["dtype"],),
        seed=0,
        examples=1,
        properties=(failure["property"].removesuffix(records.INFINITE),),
        config=failure["config"],
        contract=failure["contract"],
        recipe=failure["recipe"],
    )
    verdict = session.run([[plan]], lambda record: None)[plan.target]
    if verdict.broken:
        console.print(display.broken(verdict), soft_wrap=True)
    for found in verdict.failures:
        console.print(display.failure(found, None), soft_wrap=True)
    if verdict.code == session.NOTHING:
        console.print(f"{failure['property']} has nothing to compare on this case now", soft_wrap=True)
    if verdict.code == session.PASS:
        console.print(f"pass: {failure['target']} :: {failure['property']} holds on this case now", soft_wrap=True)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
