"""Measure what right implementations reach in every gate, and write limits.json: `python -m verify calibrate`.

A limit is 1.5 times the largest ratio seen, never below the starting values of the design (row 3, overall 2, twice that
for pairs), and kept with the distribution that it was the end of and how that was obtained. A limit above the stored
one is first of all a case in which an implementation taken to be right was far off: nothing is written, and that case
is shown, unless --reason says why it may rise.

The definition, chunk lengths and conservation laws are asked of every recipe, every other property that has a limit of
a third of them: of 10,000 recipes of two implementations each property meets at least 1,600 of each.

Recipes are judged in blocks, each a line of --store as it ends: who is killed goes on with the same command. Nothing is
written to limits.json before all are there, and with --dry-run not even then.
"""

import argparse
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import parent_process
from pathlib import Path

from rich.console import Console

from impls.contracts import PrecisionContract
from verify import records, runner, sources, yardstick
from verify.choice import UsageError, meant, own
from verify.families import materialise
from verify.limits import FILE, START, Limits
from verify.plan import PROFILES, Plan
from verify.properties import PROPERTIES
from verify.recipes import DTYPES, drawn, from_json, recipes, words
from verify.resolve import resolve
from verify.targets import Target, default_contract
from verify.trial import Trial

MARGIN = 1.5
SIMULATORS, OTHER_CHUNKS = "simulators", (8, 32)
OPERANDS = {f"{a}>{b}": (a, b) for a, b in (("bfloat16",) * 2, ("float16",) * 2, ("tf32", "float32"))}
"""Operand and input dtype of kernels for which the simulators stand: no implementation here is taken to be right."""
BLOCK = 50
"""Recipes of a block."""
OCTAVE = 8
"""Bins of a distribution in a factor of 2."""
QUANTILES = (0.5, 0.9, 0.99, 0.999)
ALWAYS = (
    *("reference_forward", "reference_backward", "chunk_invariance", "adjoint_identity"),
    *("conservation_query", "conservation_key", "conservation_gate", "conservation_state"),
)
"""Properties that are asked of every recipe: between them they measure against every limit but that of pairs."""
TURNS = 3
"""The others, three quarters of the time, take turns: a third of them in each block of a target."""
RIGHT = ("recurrent_torch", "chunk_torch")
SHARPEST = replace(START, rounded=2.0, rounded_overall=1.5)
"""No limit is set below these, for cases that a calibration did not meet. Rounded tensors err by that one rounding, at
most about 1 of these units, and in bfloat16 an output that is 1% off reaches only 3.3: a limit of 3 would pass most
of that.
"""


def main(argv: list[str], console: Console) -> int:
    """Run the command; returns 0, or 1 where limits would rise without a reason. Raises UsageError."""
    args = _parser().parse_args(argv)
    for name in args.targets:
        if not own(name):
            raise UsageError(f"unknown implementation {name}{meant(name, RIGHT)}; expected some of {', '.join(RIGHT)}")
    for name in ("examples", "workers"):
        if (given := getattr(args, name)) < 1:
            raise UsageError(f"--{name} must be at least 1, got {given}")
    header = begins(args.seed)
    done = _stored(args.store, header)
    jobs = [job for job in _jobs(args) if _name(job) not in {block["job"] for block in done}]
    console.print(f"{len(done)} blocks of {BLOCK} recipes done, {len(jobs)} to do", soft_wrap=True)
    _store(args.store, [header, *done])
    with args.store.open("a") as stream, ProcessPoolExecutor(args.workers, initializer=_end_with_the_parent) as pool:
        pending = {pool.submit(_block, job): job for job in jobs}
        try:
            for i, future in enumerate(as_completed(pending), 1):
                block = {"job": _name(pending[future]), "kinds": future.result()}
                done.append(block)
                stream.write(json.dumps(block) + "\n")
                stream.flush()
                if i % 20 == 0 or i == len(jobs):
                    console.print(f"{i} of {len(jobs)} blocks: {block['job']}", soft_wrap=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    document = _document(args, header["sources"], [block["kinds"] for block in done])
    return 0 if args.dry_run else _write(document, args.reason, console)


def _write(document: dict, reason: str | None, console: Console) -> int:
    """Write limits.json, unless limits rise and nobody says why."""
    stored = json.loads(FILE.read_text())["limits"]
    risen = [rise for kind, row in document["limits"].items() for rise in _risen(kind, row, stored.get(kind))]
    for rise in risen:
        console.print(f"rises: {rise}", soft_wrap=True, markup=False)
    if risen and not reason:
        console.print(f"{FILE} left as it is: look at these cases; where a limit is to rise, say why by --reason")
        return 1
    FILE.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"{FILE} written", soft_wrap=True)
    return 0


def _risen(kind: str, row: dict, stored: dict | None) -> Iterator[str]:
    """Say which limits of a row are above those that hold now, and which case that comes from."""
    now = stored["limits"] if stored else asdict(START)
    for gate, limit in row["limits"].items():
        if limit > now[gate]:
            met = row["largest"][gate.replace("_", " ")]
            observed = f"{met['target']} reached {met['observed']:.3g} in {met['what']}"
            yield f"{kind} {gate} from {now[gate]:g} to {limit:g}: {observed} of {met['recipe']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verify calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"implementations taken to be right (default {' '.join(RIGHT)})")
    kinds = (*DTYPES, *OPERANDS)
    only = f"only these: dtypes of the targets, operands>inputs of simulators; others are kept ({', '.join(kinds)})"
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=only)
    parser.add_argument("--examples", type=int, default=10_000, metavar="N", help="recipes a contract (10000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which recipes are drawn (1)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (2)")
    store = "what is measured goes there, and is gone on with (default verify-calibration.jsonl)"
    parser.add_argument("--store", type=Path, default=Path("verify-calibration.jsonl"), metavar="FILE", help=store)
    why = "why limits may rise above the stored ones, kept beside them"
    parser.add_argument("--reason", metavar="TEXT", help=why)
    parser.add_argument("--dry-run", action="store_true", help="measure, and leave limits.json as it is")
    return parser


def begins(seed: int) -> dict:
    """Return the first line of a store. No ratio hangs on a limit: other rows may be written in between."""
    measured_by = {"sources": sources.digest(without=FILE.resolve()), "versions": records.versions()}
    return {"kind": "calibration", "version": 1, "seed": seed} | measured_by


def _stored(path: Path, header: dict) -> list[dict]:
    """Return the blocks that are done. Raises UsageError where they are of another calibration."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    found = [json.loads(line) for line in lines]
    if found and found[0] != header:
        unlike = ", ".join(name for name in header if found[0].get(name) != header[name])
        raise UsageError(f"--store {path} holds another calibration (other {unlike}): name another file")
    return found[1:]


def _store(path: Path, lines: list[dict]) -> None:
    """Have a store hold these lines, by one step: until then it holds what it held."""
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(path)


def _end_with_the_parent() -> None:
    """End this process when the one that began it does, by a signal that it cannot hear of, too."""

    def end() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _jobs(args: argparse.Namespace) -> list[tuple]:
    """List (target, turn or operand, dtype, block, blocks, seed); targets share the recipes of a dtype between them."""
    targets, blocks = args.targets or list(RIGHT), -(-args.examples // BLOCK)
    dtypes = [dtype for dtype in DTYPES if dtype in args.only]
    mine = [(targets[b % len(targets)], b // len(targets) % TURNS) for b in range(blocks)]
    jobs = [(*mine[b], dtype, b, blocks, args.seed) for b in range(blocks) for dtype in dtypes]
    pairs = [pair for kind, pair in OPERANDS.items() if kind in args.only]
    return jobs + [(SIMULATORS, *pair, b, blocks, args.seed) for b in range(blocks) for pair in pairs]


def _name(job: tuple) -> str:
    return " ".join(map(str, job))


def _block(job: tuple) -> dict[str, dict]:
    """Judge a block; returns, by contract and conditioning, the number of cases and what every gate met in them."""
    import torch

    torch.set_num_threads(1)
    target, *how = job
    met = _simulated(*how) if target == SIMULATORS else _judged(*job)
    kinds: dict[str, dict] = {}
    for kind, gates, recipe in met:
        found = kinds.setdefault(kind, {"cases": 0, "gates": {}})
        found["cases"] += 1
        for name, result in gates.items():
            gate = found["gates"].setdefault(name, {"bins": Counter(), "largest": {"observed": -1.0}})
            gate["bins"][_bin(result["observed"])] += 1
            if result["observed"] > gate["largest"]["observed"]:
                gate["largest"] = {**result, "target": target, "recipe": words(recipe)}
    return kinds


def _bin(x: float) -> int:
    """Return the bin of a ratio: 8 in an octave, all below 2^-12 in one."""
    return math.floor(OCTAVE * math.log2(max(x, 2.0**-12)))


def asked(turn: int) -> tuple[str, ...]:
    """Name the properties with a limit that a block asks."""
    limited = [prop.name for prop in PROPERTIES if prop.kind == "tolerance"]
    others = [name for name in limited if name not in ALWAYS]
    return *(name for name in limited if name in ALWAYS), *others[turn::TURNS]


def _judged(target: str, turn: int, dtype: str, block: int, blocks: int, seed: int) -> list[tuple]:
    """Judge an implementation on the recipes of a block."""
    contract, met = resolve(target, "cpu").contract(dtype), []
    examples, common = BLOCK * blocks, {"seed": seed, "kills": BLOCK + 1, "properties": asked(turn)}
    plan = Plan(target, "cpu", "quick", (dtype,), examples=examples, shard=(block, blocks), **common)

    def listen(kind: str, **record) -> None:
        if kind == "case":
            recipe = from_json(record["recipe"])
            met.append((f"{contract.operand}>{dtype} {recipe.conditioning}", record["gates"], recipe))

    runner.judge(plan, listen)
    return met


def _simulated(operand: str, dtype: str, block: int, blocks: int, seed: int) -> Iterator[tuple]:
    """Do the same for kernels with narrow operands: the simulators at chunk lengths that Y does not use."""
    plain = default_contract(dtype)
    contract = replace(plain, operand=operand, stored=plain.stored if operand == dtype else "float32")
    strategy = recipes((dtype,), tokens=PROFILES["quick"].tokens, work=PROFILES["quick"].work)
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        recipe = drawn(strategy, seed * 1_000_003 + number)
        yield f"{operand}>{dtype} {recipe.conditioning}", _largest(recipe, contract), recipe


def _largest(recipe, contract: PrecisionContract) -> dict[str, dict]:
    case = materialise(recipe)
    yard, gates = yardstick.measure(case, contract, False), {}
    trial = Trial(Target(SIMULATORS, print, lambda _: contract, (recipe.dtype,)), recipe)
    for C in OTHER_CHUNKS:
        for m in trial.judge(yardstick.simulate(case, contract, C), yard.exact, yard):
            if gates.get(m.gate, {"observed": -1.0})["observed"] < m.observed < math.inf:
                gates[m.gate] = {"observed": m.observed, "what": f"C={C} {m.what}"}
    return gates


def _document(args: argparse.Namespace, measured_by: str, blocks: list[dict]) -> dict:
    """Join blocks to what limits.json holds: rows that were not measured are kept."""
    merged: dict[str, dict] = {}
    for kinds in blocks:
        for kind, found in kinds.items():
            into = merged.setdefault(kind, {"cases": 0, "gates": {}})
            into["cases"] += found["cases"]
            for name, gate in found["gates"].items():
                whole = into["gates"].setdefault(name, {"bins": Counter(), "largest": {"observed": -1.0}})
                whole["bins"].update({int(b): n for b, n in gate["bins"].items()})
                whole["largest"] = max(whole["largest"], gate["largest"], key=lambda x: x["observed"])
    rows = {f"any {kind}": {"limits": asdict(START)} for kind in ("beta<=1", "beta<=2")}
    rows = json.loads(FILE.read_text())["limits"] | rows
    kinds = " ".join(f'"{kind}"' if ">" in kind else kind for kind in args.only)
    how = " ".join(["python -m verify calibrate", *(args.targets or RIGHT), "--only", kinds])
    about = {"how": f"{how} --examples {args.examples} --seed {args.seed}", "date": records.now()}
    about |= {"sources": measured_by, "versions": records.versions()}
    about |= {"reason": args.reason} if args.reason else {}
    rows |= {kind: about | _row(found) for kind, found in sorted(merged.items())}
    return {"schema": 1, "margin": MARGIN, "limits": rows}


def _row(found: dict) -> dict:
    limits = asdict(SHARPEST)
    for name, gate in found["gates"].items():
        key = name.replace(" ", "_")
        limits[key] = max(limits[key], math.ceil(2 * MARGIN * gate["largest"]["observed"]) / 2)
    gates = found["gates"].items()
    return {
        "limits": asdict(Limits(**limits)),
        "cases": found["cases"],
        "largest": {name: gate["largest"] for name, gate in gates},
        "quantiles": {name: quantiles(gate["bins"]) for name, gate in gates},
        "distribution": {name: {str(b): gate["bins"][b] for b in sorted(gate["bins"])} for name, gate in gates},
    }


def quantiles(bins: Counter) -> dict[str, float]:
    """Return upper ends of the bins in which quantiles of the cases' largest ratios lie."""
    total, found = sum(bins.values()), {}
    for share in QUANTILES:
        seen = 0
        for b in sorted(bins):
            seen += bins[b]
            if seen >= share * total:
                found[f"{share:g}"] = round(2.0 ** ((b + 1) / OCTAVE), 4)
                break
    return found
