"""The command line of the judge: what can be asked, and what of it is refused before anything runs."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from impls.checks import MAX_HEAD_DIM
from verify import captured
from verify.choice import Choice, UsageError, adapter_target, check_device, choose, meant, own
from verify.plan import PROFILES, RESTARTS
from verify.properties import PROPERTIES
from verify.recipes import DTYPES

EPILOG = """\
targets    a name from the table (--list), all, cpu (what runs there), or anybody's kernel as package.module:function
           with the signature of flash-linear-attention's chunk_kda, as a class through --adapter FILE:Class, or by a
           name of the entry-point group kda_verify.implementations; fla, transformers_kimi_linear_chunk and others
           (--list) where their packages are installed. Default: everything in the table that runs on the device.
           A model, alone: kimi_linear, or anybody's as model:package.module:function (folder of a checkpoint ->
           verify.models.targets.Model), layer by layer, from random checkpoints, in float32 on a CPU.
devices    cpu, cuda:N, or interpret: Triton's interpreter, which needs no GPU, with its bfloat16 mended. Default: each
           implementation on the first that it has and this machine offers, yours on cpu. interpret asks each property
           on fewer and smaller recipes, by a budget that the report names; --max-examples N asks on N recipes instead.
commands   merge FILE... -o FILE    join the records of shards; every shard must be there, complete, and of one kind
           diff OLD NEW             what is worse, better or gone between two files of records
           calibrate                measure what right implementations reach, and write the limits
           peers                    judge the peers that are installed, and write PEERS.md
exit code  0 pass, 1 a property failed, 2 usage, 3 nothing ran, 4 a mutant survived, 5 nondeterministic, 6 crash,
           130 interrupted

examples   python -m verify                                           our implementations, a minute
           python -m verify mypackage.kernels:chunk_kda               yours
           python -m verify recurrent_torch --property causality,split --dtype bfloat16 --max-examples 500
           python -m verify --inputs captured.safetensors                 on the inputs of a trained layer
           python -m verify chunk_torch --profile ci --workers 8 --json run.jsonl --resume
           python -m verify kimi_linear                                   the model
           python -m verify --explain causality
           python -m verify --replay verify-results/FILE.json         see a failure again
"""


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
    inputs: str | None
    """FILE#digest of captured inputs."""
    config: str | None
    contract: str | None
    adapter: tuple[str, str] | None
    """The target's name, and the file of its adapter class."""
    json: Path | None
    out: Path
    shard: tuple[int, int]
    workers: int | None
    scheduler: str | None
    timeout: float
    restarts: int
    resume: bool
    strict: bool
    database: str | None
    junit: Path | None
    html: Path | None


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    p = argparse.ArgumentParser(
        prog="python -m verify",
        description="Judge implementations of Kimi Delta Attention against the float64 definition.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("targets", nargs="*", metavar="TARGET", help="what to judge (see below)")
    _add_domain(p)
    _add_files(p)
    _add_scale(p)
    p.add_argument("--list", action="store_true", help="list implementations and properties")
    p.add_argument(
        "--explain", metavar="PROPERTY", help="equation, precondition, tolerance and the bugs that it would have caught"
    )
    p.add_argument("--self-test", action="store_true", help="judge the judge: every planted bug must be found")
    return p


def _add_domain(p: argparse.ArgumentParser) -> None:
    """Add what decides which cases are tried."""
    profiles = "; ".join(f"{x.name}: {x.summary}" for x in PROFILES.values())
    p.add_argument("--profile", metavar="NAME", default="quick", help=f"how much to try (default quick). {profiles}")
    p.add_argument("--device", help="cpu, cuda:N, or interpret (Triton's interpreter, no GPU needed); see below")
    p.add_argument("--property", metavar="NAME,...", help="only these properties (--list names them)")
    p.add_argument("--dtype", metavar="NAME,...", help=f"input dtypes out of {', '.join(DTYPES)}; default by profile")
    seed = "which recipes are drawn (default 0); equal seeds, equal recipes"
    p.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    dims = "draw K and V out of these, up to 256; default small ones of every kind"
    p.add_argument("--head-dims", metavar="N,...", help=dims)
    inputs = "judge on captured q, k, v, g, beta instead of made ones: python -m kimi_linear.synthetic capture --help"
    p.add_argument("--inputs", metavar="FILE", type=Path, help=inputs)
    p.add_argument("--max-examples", type=int, metavar="N", help="recipes per dtype instead of the profile's number")
    contract = "assume this operand precision of somebody's kernel, whatever the inputs"
    p.add_argument("--contract", choices=DTYPES, help=contract)
    adapter = "judge a kernel through a class of a file: python -m pydoc verify.adapters"
    p.add_argument("--adapter", metavar="FILE:Class", help=adapter)
    strict = "a term of the recurrence that no case exercised is a failure"
    p.add_argument("--strict", action="store_true", help=strict)


def _add_files(p: argparse.ArgumentParser) -> None:
    """Add what is read and written."""
    p.add_argument("--config", metavar="FILE", help="judge one launch configuration: a JSON object of its fields")
    records_help = "write records there, one JSON line per case as it happens"
    p.add_argument("--json", metavar="FILE", type=Path, help=records_help)
    resume = "go on where the run that wrote --json FILE was killed: finished cases are not judged again"
    p.add_argument("--resume", action="store_true", help=resume)
    p.add_argument("--junit", metavar="FILE", type=Path, help="write a JUnit XML report there")
    p.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page there")
    out, out_help = Path("verify-results"), "where failing cases go (default verify-results)"
    p.add_argument("--out", metavar="DIR", type=Path, default=out, help=out_help)
    replay_help = "run one failing case again; name a foreign target on the command line too"
    p.add_argument("--replay", metavar="FILE", type=Path, help=replay_help)
    database = "judge the cases first that failed before, and keep new ones: redis://HOST:PORT/N, or a folder"
    p.add_argument("--database", metavar="URL", help=database)


def _add_scale(p: argparse.ArgumentParser) -> None:
    """Add where and by how many it is done."""
    p.add_argument("--workers", type=int, metavar="N", help="processes of this machine that judge side by side")
    p.add_argument("--shard", metavar="I/N", help="judge the I-th of N parts; `verify merge` joins their records")
    scheduler = "judge on the workers of a dask cluster (tcp://HOST:8786), or of one of our own here (local)"
    p.add_argument("--scheduler", metavar="ADDRESS", help=scheduler)
    timeout = "seconds of silence after which a worker counts as hung (default 600)"
    p.add_argument("--timeout", type=float, default=600.0, metavar="N", help=timeout)
    restarts = f"processes that go on with a target behind a case that ended or hung one (default {RESTARTS})"
    p.add_argument("--restarts", type=int, default=RESTARTS, metavar="N", help=restarts)


def alone(args: argparse.Namespace, mode: str, *taken: str) -> None:
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


def names(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Split a list of names. Raises UsageError for one that is not known, with the nearest."""
    given = tuple(x for x in (text or "").split(",") if x)
    if unknown := [x for x in given if x not in known]:
        raise UsageError(f"unknown {what} {', '.join(unknown)}{meant(unknown[0], known)}; known are {', '.join(known)}")
    return given


def options(args: argparse.Namespace) -> Options:
    """Check the command line of a judgement. Raises UsageError."""
    (profile,) = names(args.profile, tuple(PROFILES), "profile") or (None,)
    if profile is None:
        raise UsageError(f"--profile must be one of {', '.join(PROFILES)}")
    if args.device is not None:
        check_device(args.device)
    choice = choose(args.targets, args.device, args.adapter)
    check_files(args)
    _check_kinds(args, tuple(choice.devices))
    _check_scale(args)
    return Options(
        choice=choice,
        named=frozenset(choice.devices if args.adapter else args.targets),
        device=args.device,
        profile=profile,
        properties=names(args.property, tuple(p.name for p in PROPERTIES), "property"),
        dtypes=names(args.dtype, DTYPES, "dtype") or PROFILES[profile].dtypes,
        seed=args.seed,
        examples=args.max_examples,
        head_dims=_head_dims(args.head_dims),
        inputs=_inputs(args.inputs),
        config=args.config,
        contract=args.contract,
        adapter=_adapter(args.adapter),
        json=args.json,
        out=args.out,
        shard=_shard(args.shard),
        workers=args.workers,
        scheduler=args.scheduler,
        timeout=args.timeout,
        restarts=args.restarts,
        resume=args.resume,
        strict=args.strict,
        database=args.database,
        junit=args.junit,
        html=args.html,
    )


def _head_dims(text: str | None) -> tuple[int, ...]:
    sizes = tuple(text.split(",")) if text is not None else ()
    if wrong := [x for x in sizes if not x.isdecimal() or not 1 <= int(x) <= MAX_HEAD_DIM]:
        raise UsageError(f"--head-dims must be numbers from 1 to {MAX_HEAD_DIM}, got {wrong[0]!r}")
    return tuple(map(int, sizes))


def _inputs(path: Path | None) -> str | None:
    try:
        return None if path is None else captured.named(path)
    except captured.CapturedError as error:
        raise UsageError(f"--inputs {error}") from error


def _adapter(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    target, file = adapter_target(text), Path(text.rpartition(":")[0])
    if not file.is_file():
        raise UsageError(f"--adapter {text}: no file {file}")
    return target, str(file.resolve())


def _shard(text: str | None) -> tuple[int, int]:
    """Read I/N into (I - 1, N)."""
    if text is None:
        return 0, 1
    part, slash, count = text.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise UsageError(f"--shard must be I/N with 1 <= I <= N, got {text}")
    return int(part) - 1, int(count)


def _check_scale(args: argparse.Namespace) -> None:
    if args.max_examples is not None and args.max_examples < 1:
        raise UsageError(f"--max-examples must be at least 1, got {args.max_examples}")
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {args.workers}")
    if not args.timeout > 0:
        raise UsageError(f"--timeout must be positive, got {args.timeout:g}")
    if args.restarts < 0:
        raise UsageError(f"--restarts must be at least 0, got {args.restarts}")
    if args.resume and not args.json:
        raise UsageError("--resume needs --json FILE: the records of the run that goes on")


def _check_kinds(args: argparse.Namespace, targets: tuple[str, ...]) -> None:
    """Refuse a launch configuration of somebody else's kernel, and another contract than an implementation's own."""
    foreign = [name for name in targets if not own(name)]
    if args.config and foreign:
        raise UsageError(f"--config is for implementations of the table, got {', '.join(foreign)}")
    if args.contract and (ours := [name for name in targets if own(name)]):
        raise UsageError(f"--contract is for package.module:function; {', '.join(ours)} has a contract of its own")


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that could not be read or written, before a run of minutes depends on them."""
    if args.config and not Path(args.config).is_file():
        raise UsageError(f"--config {args.config}: no such file")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: expected a folder")
    for flag in ("json", "junit", "html"):
        if path := getattr(args, flag):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                raise UsageError(f"--{flag} {path}: {error.strerror}") from error
