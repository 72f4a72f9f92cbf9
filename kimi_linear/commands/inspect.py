"""Show what a checkpoint or a preset is: layers, parameters, what is remembered of a sequence, and its kernels.

Of each kernel it says which tuned configuration it would run with. Of a checkpoint headers are read, no weights; what
is wrong with it is listed.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from impls import chosen, tuned
from kimi_linear.cache import Cache
from kimi_linear.checkpoint import Checkpoint
from kimi_linear.commands.arguments import (
    BROKEN,
    DONE,
    UsageError,
    add_baseline,
    add_device,
    add_preset,
    check_device,
    console,
    preset_of,
    refuse_preset,
    size,
)
from kimi_linear.config import KDA, MLA, KimiConfig
from kimi_linear.layout import stored
from kimi_linear.model import PREFILL_TOKENS

SUMMARY = "show layers, parameters, cache sizes and kernels"
EPILOG = """\
exit code  0 complete; 1 something is wrong with the checkpoint; 2 usage

examples   python -m kimi_linear inspect --model DIR
           python -m kimi_linear inspect --preset kimi-linear-48b-a3b --json
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.epilog = EPILOG
    p.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder")
    add_preset(p)
    add_baseline(p)
    add_device(p, "whose kernels to look up: ")
    p.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    refuse_preset(args)
    check_device(args.device)
    if not args.model and not args.preset:
        raise UsageError("expected --model or --preset")
    checkpoint = Checkpoint(args.model) if args.model else None
    config = checkpoint.config if checkpoint else preset_of(args)
    found = described(config) | {"kernels": kernels(config, args.device)}
    if checkpoint:
        found |= {"bytes": checkpoint.bytes, "shards": len(checkpoint.shards), "problems": checkpoint.problems()}
    print(json.dumps(found, indent=1)) if args.json else _print(found, args.model or args.preset)
    return BROKEN if found.get("problems") else DONE


def described(config: KimiConfig) -> dict:
    """Return layers, parameters by kind, and bytes of the cache, in JSON values."""
    dtype, by_kind = getattr(torch, config.dtype), {}
    for each in stored(config):
        kind = _kind(each.name, config)
        by_kind[kind] = by_kind.get(kind, 0) + each.elements
    total, routed = sum(by_kind.values()), by_kind.get("routed experts", 0)
    one, two = (Cache(config, 1, tokens, dtype=dtype, device="meta").bytes() for tokens in (1, 2))
    return {
        "layers": "".join({KDA: "K", MLA: "M"}[kind] for kind in config.layers),
        "dtype": config.dtype,
        "parameters": total,
        "active": total - by_kind["embedding"] - routed + routed * config.experts_per_token // config.experts,
        "by_kind": by_kind,
        "cache_bytes": {"constant": 2 * one - two, "per_token": two - one},
    }


def _kind(name: str, config: KimiConfig) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "norms")
    layer, part = int(name.split(".")[2]), name.split(".")[3]
    if part == "self_attn":
        return config.layers[layer]
    return "norms" if part.endswith("layernorm") else "routed experts" if ".experts." in name else "other MLPs"


def kernels(config: KimiConfig, device: str) -> list[dict]:
    """Return what would run KDA in prefill and in decoding on a device, and where its configuration comes from."""
    found, K = [], config.kda_head_dim
    for form, tokens in (("chunk", PREFILL_TOKENS), ("recurrent", 1)) if config.count(KDA) else ():
        row = chosen(form=form, device=device, dtype=config.dtype, K=K, V=K)
        shape = tuned.Shape(tokens, 1, config.kda_heads, K, K, config.dtype, form == "chunk")
        told = tuned.looked_up(row.name, device, shape)
        found.append(
            {
                "of": "prefill" if form == "chunk" else "decoding",
                "kernel": row.name,
                "config": asdict(told.config) if told else asdict(row.config()),
                "from": f"{told.row} row of {told.path}" if told else "default",
            }
        )
    return found


def _print(found: dict, name) -> None:
    page = console()
    page.print(f"{name}: {len(found['layers'])} layers {found['layers']}, {found['dtype']}", soft_wrap=True)
    table = Table("parameters of", "count", box=None)
    for kind, count in (found["by_kind"] | {"all": found["parameters"], "a token": found["active"]}).items():
        table.add_row(kind, f"{count:,}")
    page.print(table)
    cache = found["cache_bytes"]
    page.print(f"cache of a sequence: {size(cache['constant'])}, and {cache['per_token']:,} B per token")
    if "bytes" in found:
        page.print(f"checkpoint: {size(found['bytes'])} in {found['shards']} shards")
    for kernel in found["kernels"]:
        fields = ", ".join(f"{key}={value}" for key, value in kernel["config"].items())
        page.print(f"{kernel['of']}: {kernel['kernel']}({fields}), {kernel['from']}", soft_wrap=True)
    for problem in found.get("problems", ()):
        page.print(f"problem: {problem}", soft_wrap=True)
