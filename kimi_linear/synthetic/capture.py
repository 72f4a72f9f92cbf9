"""Keep what a trained layer gives its recurrence: q, k, v, g, beta of real sequences, for `python -m verify --inputs`.

q and k [B, T, H, K] are normalised, v [B, T, H, V] and beta [B, T, H] are as they are written, g [B, T, H, K] is the
log decay: what the op computes from, activated, in float32.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from impls.activations import l2norm, log_decay, write_strength
from kimi_linear.commands.arguments import DONE, UsageError
from kimi_linear.parameters import rms_norm
from kimi_linear.synthetic import saved
from kimi_linear.synthetic.mixers import EPS, Mixer
from kimi_linear.synthetic.model import Toy
from kimi_linear.synthetic.tasks import batch
from kimi_linear.synthetic.train import HELD_OUT

DELTA = ("kda", "gdn", "deltanet")
"""Mixers that are KDA for some g."""
EPILOG = """\
examples   python -m kimi_linear.synthetic capture --checkpoint synthetic-runs/NAME/rate-0.001/checkpoint.safetensors \\
               --layer 1 --sequences 2 --out captured.safetensors
           python -m verify chunk_torch --inputs captured.safetensors
"""


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of a run with kda, gdn or deltanet")
    p.add_argument("--layer", type=int, default=0, metavar="N", help="counted from 0 (default 0)")
    p.add_argument("--sequences", type=int, default=2, metavar="N", help="of the task, none trained on (default 2)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to: safetensors")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    of, state = saved.about(args.checkpoint)
    if not 0 <= args.layer < of.layers:
        raise UsageError(f"--layer must be from 0 to {of.layers - 1}, got {args.layer}")
    if args.sequences < 1:
        raise UsageError(f"--sequences must be at least 1, got {args.sequences}")
    model = Toy(of.toy, of.seed)
    saved.restore(args.checkpoint, model)
    ids = batch(of.drawn, (of.seed, HELD_OUT), 0, args.sequences).ids
    tensors = captured(model, args.layer, ids)
    about = {"run": json.dumps(of.to_json()), "step": str(state.step), "layer": str(args.layer)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, args.out, metadata=about)
    sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
    print(f"{args.out}: {sizes}, of layer {args.layer} after {state.step:,} steps")
    return DONE


@torch.no_grad()
def captured(model: Toy, layer: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return q, k, v, g and beta of a layer on sequences ids [B, T]; UsageError for a mixer without them."""
    x = model.embed[ids]
    for block in model.blocks[:layer]:
        x = block(x)
    block = model.blocks[layer]
    return activated(block.mixer, rms_norm(x, block.mixer_norm, EPS))


def activated(mixer: Mixer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return q, k, v, g and beta for the input x [B, T, D] of a mixer; UsageError where it has no delta rule of k."""
    if mixer.config.kind not in DELTA:
        raise UsageError(f"expected a checkpoint of {', '.join(DELTA)}, got one of {mixer.config.kind}")
    q, k, v, rest, _ = mixer.inputs(x)
    g = torch.zeros_like(k) if rest.f is None else log_decay(rest.f, mixer.A_log, mixer.biases(), None, k.dtype)
    beta = write_strength(rest.beta, False, k.dtype)
    return {"q": l2norm(q, k.dtype), "k": l2norm(k, k.dtype), "v": v, "g": g, "beta": beta}
