"""Continue a text. The answer goes to standard output as it is made, everything else to standard error."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kimi_linear.chat import ChatTemplate
from kimi_linear.commands.arguments import (
    DONE,
    UsageError,
    add_device,
    add_dtype,
    bar,
    check_device,
    console,
    dtype_of,
    numbers,
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


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _check(args)
    config = KimiConfig.read(args.model)
    tokenizer = None if args.ids else Tokenizer.read(args.model)
    prompts = [numbers("--ids", text) for text in args.ids] if args.ids else _encoded(args, tokenizer)
    with bar("reading weights") as progress:
        model = KimiLinear.from_pretrained(
            args.model, config=config, dtype=dtype_of(args.dtype), device=args.device, progress=progress
        )
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
    _summary(prompts, made, first - begun, time.perf_counter() - first)
    return DONE


def _check(args: argparse.Namespace) -> None:
    if bool(args.prompt) == bool(args.ids):
        raise UsageError("expected --prompt or --ids, one of them")
    if (args.ids and args.chat) or (args.system and not args.chat):
        raise UsageError("--chat goes with --prompt, and --system with --chat")
    check_device(args.device)


def _encoded(args: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    texts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
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
