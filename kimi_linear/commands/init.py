"""Write a checkpoint with random weights, in the released layout: config.json, safetensors shards and their index.

A tokenizer comes with it, of single bytes and pairs of bytes, that has the preset's number of ids. For tests, timings
and parity: it generates noise.
"""

import argparse
import base64
import itertools
import json
from pathlib import Path

from kimi_linear.commands.arguments import (
    DONE,
    UsageError,
    add_baseline,
    add_dtype,
    add_preset,
    bar,
    console,
    dtype_of,
    preset_of,
    size,
)
from kimi_linear.config import KimiConfig
from kimi_linear.initial import SHARD_BYTES, write_random
from kimi_linear.tokenizer import RANKS, RESERVED, SETTINGS

SUMMARY = "write a random checkpoint"
EPILOG = """\
examples   python -m kimi_linear init --preset tiny --out /data/tiny
           python -m kimi_linear init --preset small-1b --baseline mla --dtype bfloat16 --out /data/small-mla
           python -m kimi_linear init --preset tiny --layers 8 --ratio 7:1 --seed 3 --dtype float32 --out /data/seven
"""
SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
           17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}  # fmt: skip
"""Names of special ids, counted from the first one as in the released tokenizer."""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    add_preset(p, required=True)
    add_baseline(p)
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder without a checkpoint")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds write equal files (default 0)")
    add_dtype(p, "of the tensors (default bfloat16, as released)")
    p.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="of a shard at most (default 5e9)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.shard_bytes < 1 or args.seed < 0:
        raise UsageError(f"--shard-bytes must be at least 1 and --seed at least 0, got {args.shard_bytes}, {args.seed}")
    config = preset_of(args)
    with bar("writing") as progress:
        try:
            paths = write_random(
                config,
                args.out,
                seed=args.seed,
                dtype=dtype_of(args.dtype),
                shard_bytes=args.shard_bytes,
                progress=progress,
            )
        except FileExistsError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise UsageError(f"--out {args.out} cannot be written: {error.strerror or error}") from error
    write_tokenizer(config, args.out)
    total = sum(path.stat().st_size for path in paths)
    console().print(f"{args.out}: {len(paths)} shard{'s' * (len(paths) > 1)}, {size(total)}", soft_wrap=True)
    return DONE


def write_tokenizer(config: KimiConfig, folder: Path) -> None:
    """Write tiktoken.model and tokenizer_config.json of as many ids as the model has, where it has 512 or more."""
    count = config.vocab_size - RESERVED
    if count < 256:
        return
    tokens = itertools.chain.from_iterable(itertools.product(range(256), repeat=n) for n in (1, 2, 3))
    lines = (f"{base64.b64encode(bytes(x)).decode()} {i}" for i, x in enumerate(itertools.islice(tokens, count)))
    (folder / RANKS).write_text("\n".join(lines) + "\n")
    names = {str(count + i): {"content": name, "special": True} for i, name in SPECIAL.items()}
    settings = {"added_tokens_decoder": names, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
