"""Continue a text. The answer goes to standard output as it is made, everything else to standard error.

Started by torchrun, the ranks share one model: each reads and holds its part of the heads, experts, columns and words.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kimi_linear.chat import ChatTemplate
from kimi_linear.commands.arguments import (
    BROKEN,
    DONE,
    UsageError,
    add_device,
    add_dtype,
    bar,
    check_device,
    console,
    dtype_of,
    launched,
    numbers,
    size,
)
from kimi_linear.config import KimiConfig
from kimi_linear.model import KimiLinear
from kimi_linear.tokenizer import Tokenizer

SUMMARY = "continue a text, streamed"
EPILOG = """\
prompts    --prompt is taken as it is; with --chat it is what a user says, and the checkpoint's own template is put
           around it. --prompt - reads standard input. Without a tokenizer --ids takes the numbers, and prints numbers.
           Several --prompt are continued together and printed one after the other.

examples   python -m kimi_linear generate --model DIR --prompt "Once upon a time" --max-new-tokens 64
           python -m kimi_linear generate --model DIR --chat --prompt "Why is the sky blue?" --temperature 0.6 --seed 1
           python -m kimi_linear generate --model DIR --ids 1,2,3 --json
           torchrun --nproc-per-node 2 -m kimi_linear generate --model DIR --prompt "Once upon a time"
           torchrun --nproc-per-node 8 -m kimi_linear generate --model DIR --device cuda --prompt - < question.txt

ranks      Under torchrun --device is cpu (gloo) or cuda (NCCL, each rank its own GPU). Heads, experts, intermediate
           columns and the vocabulary must be divisible by the number of ranks. Rank 0 speaks; it says how many bytes
           each of them has read. Ranks that find different tuned configurations or checkpoints are refused. Where a
           rank ends or hangs the others end too, after --rank-timeout seconds at most, and name it: exit code 1.
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--model", required=True, type=Path, metavar="DIR", help="a checkpoint's folder")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="- for standard input; again for several")
    p.add_argument("--ids", action="append", metavar="N,...", help="ids instead of a text")
    p.add_argument("--chat", action="store_true", help="the prompt is what a user says")
    p.add_argument("--system", metavar="TEXT", help="with --chat: what comes before it")
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0, the likeliest id")
    p.add_argument("--top-k", type=int, metavar="N", help="of the so many likeliest ids")
    p.add_argument("--top-p", type=float, metavar="X", help="of the likeliest ids with this probability together")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    add_device(p)
    add_dtype(p, "load in this dtype (default as stored)")
    p.add_argument("--compile", action="store_true", help="compile the decoding step: a minute before the first id")
    p.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    p.add_argument("--rank-timeout", type=float, metavar="S", help="under torchrun: wait so long (default 600)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _check(args)
    if not launched():
        return _answered(args, None)
    from kimi_linear.parallel.job import TIMEOUT, JobError, joined

    try:
        with joined(args.device, args.rank_timeout or TIMEOUT) as job, _voice(job):
            return _answered(args, job)
    except JobError as error:
        print(f"python -m kimi_linear, rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
        return BROKEN


def _voice(job):
    """Let rank 0 speak, and the others be quiet but for errors."""
    return contextlib.nullcontext() if job.first else contextlib.redirect_stdout(io.StringIO())


def _answered(args: argparse.Namespace, job) -> int:
    """Answer alone, or as a rank of a job."""
    if job is not None:
        job.agree("their arguments", _asked(args))
    config = KimiConfig.read(args.model)
    tokenizer = None if args.ids else Tokenizer.read(args.model)
    prompts = [numbers("--ids", text) for text in args.ids] if args.ids else _encoded(args, tokenizer, job)
    model = _loaded(args, config, job)
    if args.compile:
        model.compile_decode()
    stops = {*config.stop_ids, *([tokenizer.eos_id] if tokenizer and tokenizer.eos_id is not None else [])}
    begun = time.perf_counter()
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    made: list[list[int]] = [[] for _ in prompts]
    try:
        steps = _collected(model.stream(prompts, stop=sorted(stops), **options), made)
    except ValueError as error:  # an option or a prompt that is none
        raise UsageError(str(error)) from error
    first = _shown(args, tokenizer, steps, made, stops)
    if job is None or job.first:
        _summary(prompts, made, first - begun, time.perf_counter() - first)
    return DONE


def _asked(args: argparse.Namespace) -> str:
    """Return the arguments as they were given; a checkpoint may lie elsewhere on another machine."""
    given = {name: x for name, x in vars(args).items() if x not in (None, False) and name not in ("run", "model")}
    return ", ".join(f"{name}={x}" for name, x in sorted(given.items()))


def _loaded(args: argparse.Namespace, config: KimiConfig, job) -> KimiLinear:
    """Read the model, or this rank's share of it, and say what was read by whom."""
    options = {"config": config, "dtype": dtype_of(args.dtype)}
    if job is None:
        with bar("reading weights") as progress:
            return KimiLinear.from_pretrained(args.model, device=args.device, progress=progress, **options)
    from kimi_linear.parallel.plan import load

    read = [0]

    def count(done: int, total: int) -> None:
        read[0] = done

    model = load(args.model, job, progress=count, **options)
    each = [f"rank {rank} {size(done)}" for rank, done in enumerate(job.everybody(read[0]))]
    if job.first:
        console(stderr=True).print(f"weights read: {', '.join(each)}", soft_wrap=True)
    return model


def _check(args: argparse.Namespace) -> None:
    if bool(args.prompt) == bool(args.ids):
        raise UsageError("expected --prompt or --ids, one of them")
    if (args.ids and args.chat) or (args.system and not args.chat):
        raise UsageError("--chat goes with --prompt, and --system with --chat")
    if args.rank_timeout is not None and not (launched() and args.rank_timeout > 0):
        raise UsageError(f"--rank-timeout is a number of seconds above 0 under torchrun, got {args.rank_timeout}")
    check_device(args.device)


def _encoded(args: argparse.Namespace, tokenizer: Tokenizer, job) -> list[list[int]]:
    """Return the prompts' ids; standard input, which ranks have in common, is read by the first one for all."""
    first = job is None or job.first
    texts = [(sys.stdin.read() if first else None) if text == "-" else text for text in args.prompt]
    texts = texts if job is None else job.everybody(texts)[0]
    if not args.chat:
        return [tokenizer.encode(text) for text in texts]
    template = ChatTemplate.read(args.model)
    system = [{"role": "system", "content": args.system}] if args.system else []
    whole = [template.render([*system, {"role": "user", "content": text}]) for text in texts]
    return [tokenizer.encode(text, special=True) for text in whole]


def _collected(steps, made: list[list[int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield steps on, and collect their ids."""
    for pairs in steps:
        for row, chosen in pairs:
            made[row].append(chosen)
        yield pairs


def _shown(args: argparse.Namespace, tokenizer: Tokenizer | None, steps, made, stops) -> float:
    """Print what is made, while it is made where it is one text; return when the first id was there."""
    pairs = next(steps)
    first = time.perf_counter()
    if args.json or len(made) > 1:
        for _ in steps:
            pass
        for row, ids in enumerate(made):
            text = None if tokenizer is None else tokenizer.decode([i for i in ids if i not in stops])
            whole = json.dumps({"prompt": row, "ids": ids, "text": text}, ensure_ascii=False)
            print(whole if args.json else text if text is not None else ",".join(map(str, ids)))
        return first
    ids = (chosen for whole in ([pairs], steps) for step in whole for _, chosen in step if chosen not in stops)
    for part in map("{} ".format, ids) if tokenizer is None else tokenizer.decode_stream(ids):
        print(part, end="", flush=True)
    print()
    return first


def _summary(prompts, made, to_first: float, rest: float) -> None:
    read, count = sum(map(len, prompts)), sum(map(len, made)) - len(made)
    rate = f", then {count} in {rest:.2f} s: {count / rest:.1f} a second" if count > 0 else ""
    console(stderr=True).print(f"{read} ids read, the first made in {to_first:.2f} s{rate}", soft_wrap=True)
