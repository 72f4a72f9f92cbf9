"""Measure what right implementations reach in every gate, and write limits.json: `python -m verify.calibrate --examples
2000`.

A limit is 1.5 times the largest ratio seen, never below the starting values of the design (row 3, overall 2, twice that
for pairs), and kept with how it was obtained. Raising one by hand is a change to review, with its reason beside it.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

from verify import records, runner, yardstick
from verify.families import materialise
from verify.limits import FILE, START, Limits
from verify.plan import PROFILES, Plan
from verify.recipes import DTYPES, drawn, from_json, recipes, words
from verify.targets import Target, default_contract, resolve
from verify.trial import Trial

MARGIN = 1.5
SIMULATORS, OTHER_CHUNKS = "simulators", (8, 32)
SHARPEST = replace(START, rounded=2.0, rounded_overall=1.5)
"""No limit is set below these, for cases that a calibration did not meet. Rounded tensors err by that one rounding, at
most about 1 of these units, and in bfloat16 an output that is 1% off reaches only 3.3: a limit of 3 would pass most
of that.
"""


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m verify.calibrate", description=__doc__)
    parser.add_argument("targets", nargs="*", help="implementations that are taken to be right, next to the simulators")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES, help="rows to measure; others are kept")
    parser.add_argument("--examples", type=int, default=2000, help="recipes per target and dtype")
    parser.add_argument("--seed", type=int, default=1, help="which recipes are drawn")
    args = parser.parse_args()
    targets = [*args.targets, SIMULATORS]
    jobs = [(target, dtype, args.examples, args.seed) for target in targets for dtype in args.dtype]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(_worst, jobs))
    FILE.write_text(json.dumps(_document(args, found), indent=2) + "\n")
    return 0


def _simulators(dtype: str, examples: int, seed: int) -> dict[str, dict[str, dict]]:
    """Do the same for kernels with operands in the input dtype: the simulators at chunk lengths that Y does not use."""
    contract, worst = default_contract(dtype), {}
    strategy = recipes((dtype,), tokens=PROFILES["quick"].tokens, work=PROFILES["quick"].work)
    for number in range(examples):
        recipe = drawn(strategy, seed * 1_000_003 + number)
        case = materialise(recipe)
        yard, gates = (
            yardstick.measure(case, contract, False),
            worst.setdefault(f"{dtype}>{dtype} {recipe.conditioning}", {}),
        )
        gates.setdefault("cases", {"observed": 0})["observed"] += 1
        trial = Trial(Target(SIMULATORS, print, default_contract, (dtype,)), recipe)
        for C in OTHER_CHUNKS:
            for m in trial.judge(yardstick.simulate(case, contract, C), yard.exact, yard):
                if gates.get(m.gate, {"observed": -1.0})["observed"] < m.observed < math.inf:
                    gates[m.gate] = {
                        "observed": m.observed,
                        "what": f"C={C} {m.what}",
                        "target": SIMULATORS,
                        "recipe": words(recipe),
                    }
    return worst


def _worst(job: tuple[str, str, int, int]) -> dict[str, dict[str, dict]]:
    """Return, by contract class and gate, the largest ratio to the yardstick and where it was met."""
    import torch

    torch.set_num_threads(1)
    target, dtype, examples, seed = job
    if target == SIMULATORS:
        return _simulators(dtype, examples, seed) if dtype in ("bfloat16", "float16") else {}
    plan = Plan(
        target=target, device="cpu", profile="quick", dtypes=(dtype,), seed=seed, examples=examples, kills=examples
    )
    contract = resolve(target, "cpu").contract(dtype)
    worst: dict[str, dict[str, dict]] = {}

    def listen(kind: str, **record) -> None:
        if kind != "case":
            return
        recipe = from_json(record["recipe"])
        gates = worst.setdefault(f"{contract.operand}>{dtype} {recipe.conditioning}", {"cases": {"observed": 0}})
        gates["cases"]["observed"] += 1
        for name, result in record["gates"].items():
            if result["observed"] > gates.get(name, {"observed": -1.0})["observed"]:
                gates[name] = {**result, "target": target, "recipe": words(recipe)}

    runner.judge(plan, listen)
    print(f"{target} {dtype}: {examples} recipes", flush=True)
    return worst


def _document(args: argparse.Namespace, found: list[dict]) -> dict:
    merged: dict[str, dict[str, dict]] = {}
    for worst in found:
        for kind, gates in worst.items():
            into = merged.setdefault(kind, {"cases": {"observed": 0}})
            into["cases"]["observed"] += gates.pop("cases")["observed"]
            for name, result in gates.items():
                if result["observed"] > into.get(name, {"observed": -1.0})["observed"]:
                    into[name] = result
    rows = {f"any {kind}": {"limits": asdict(START)} for kind in ("beta<=1", "beta<=2")}
    rows = json.loads(FILE.read_text())["limits"] | rows
    options = ["--dtype", *args.dtype, "--examples", str(args.examples), "--seed", str(args.seed)]
    how = " ".join(["python -m verify.calibrate", *args.targets, *options])
    rows |= {
        kind: {"how": how, "versions": records.versions(), **_row(gates)} for kind, gates in sorted(merged.items())
    }
    return {"schema": 1, "margin": MARGIN, "limits": rows}


def _row(gates: dict[str, dict]) -> dict:
    cases, limits = gates.pop("cases")["observed"], asdict(SHARPEST)
    for name, result in gates.items():
        key = name.replace(" ", "_")
        limits[key] = max(limits[key], math.ceil(2 * MARGIN * result["observed"]) / 2)
    return {"limits": asdict(Limits(**limits)), "cases": cases, "largest": gates}


if __name__ == "__main__":
    sys.exit(main())
