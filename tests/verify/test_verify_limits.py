"""Limits are measured, kept with their origin, and fair to kernels that round where their contract allows it."""

import io
import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from impls.contracts import PrecisionContract
from impls.table import IMPLEMENTATIONS
from verify import calibrate, sources, yardstick
from verify.calibrate import MARGIN, OTHER_CHUNKS, SHARPEST
from verify.choice import UsageError
from verify.limits import FILE, START, limits_for, load
from verify.properties import PROPERTIES
from verify.recipes import DTYPES, drawn, recipes
from verify.resolve import resolve
from verify.targets import Target, default_contract
from verify.trial import Trial

CALIBRATED = {kind: row for kind, row in load()["limits"].items() if not kind.startswith("any")}


@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_limit_is_the_margin_over_the_largest_ratio_and_says_where_that_was_met(kind):
    row = CALIBRATED[kind]
    assert row["how"].startswith("python -m verify calibrate")
    for gate, limit in row["limits"].items():
        largest = row["largest"].get(gate.replace("_", " "), {"observed": 0.0})
        least = asdict(SHARPEST)[gate]
        assert limit >= MARGIN * largest["observed"]
        assert limit == least or limit <= MARGIN * largest["observed"] + 0.5


def test_every_contract_was_calibrated_over_ten_thousand_recipes_and_all_by_one_judge():
    cases = Counter()
    for kind, row in CALIBRATED.items():
        cases[kind.split()[0]] += row["cases"]
    assert min(cases.values()) >= 10_000
    assert len({row["sources"] for row in CALIBRATED.values()}) == 1


@pytest.mark.parametrize("conditioning", ["beta<=1", "beta<=2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_has_limits_of_its_own(dtype, conditioning):
    for implementation in IMPLEMENTATIONS:
        kind = f"{implementation.contract(dtype).operand}>{dtype} {conditioning}"
        assert kind in CALIBRATED


def test_what_nobody_calibrated_has_the_starting_limits():
    contract = PrecisionContract("float16", "float32", "float32", "float32", "float32", output="float32")
    assert limits_for(contract, "float32", "beta<=1") == START


@pytest.mark.parametrize("C", OTHER_CHUNKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_kernel_that_rounds_its_operands_passes_at_chunk_lengths_that_the_yardstick_does_not_use(dtype, C):
    strategy = recipes((dtype,), tokens=33, work=50_000)
    for number in range(40):
        trial = Trial(Target("simulator", print, default_contract, (dtype,)), drawn(strategy, number))
        yard = yardstick.measure(trial.case, trial.contract, backward=False)
        got = yardstick.simulate(trial.case, trial.contract, C)
        assert all(m.ratio <= 1 for m in trial.judge(got, yard.exact, yard)), trial.recipe


def test_only_properties_with_a_tolerance_measure_against_a_limit():
    """The others are not asked in a calibration."""
    strategy, gates = recipes(("bfloat16",), tokens=17, work=20_000), {}
    for number in range(12):
        trial = Trial(resolve("recurrent_torch", "cpu"), drawn(strategy, number))
        for prop in PROPERTIES:
            if prop.applies(trial):
                gates.setdefault(prop.kind, set()).update(m.gate for m in prop.check(trial))
    assert gates["bitwise"] == gates["bound"] == {"exact"}
    assert len(gates["tolerance"]) > 4


@pytest.mark.parametrize("targets", [1, 2, 3, 6])
def test_every_property_with_a_limit_is_asked_of_every_target_of_a_calibration(targets):
    limited = {prop.name for prop in PROPERTIES if prop.kind == "tolerance"}
    assert set(calibrate.ALWAYS) < limited
    names = [f"target{n}" for n in range(targets)]
    blocks = calibrate.BLOCK * targets * calibrate.TURNS
    jobs = calibrate._jobs(Namespace(targets=names, only=["float32"], examples=blocks, seed=1))
    for name in names:
        met = [set(calibrate.asked(turn)) for target, turn, *_ in jobs if target == name]
        assert set().union(*met) == limited and all(set(calibrate.ALWAYS) <= one for one in met)


def calibrated(store: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command with blocks of two recipes; it writes no limits."""
    program = (
        "from rich.console import Console; from verify import calibrate; calibrate.BLOCK = 2; "
        f"calibrate.main([*{arguments!r}, '--dry-run', '--examples', '4', '--store', {str(store)!r}], Console())"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_a_calibration_goes_on_behind_its_last_whole_block_and_writes_nothing_when_dry(tmp_path):
    before, store = FILE.read_bytes(), tmp_path / "store.jsonl"
    run = calibrated(store, "--only", "float64", "bfloat16>bfloat16")
    assert "0 blocks of 2 recipes done, 4 to do" in run.stdout, run.stderr
    header, *blocks = lines = store.read_text().splitlines()
    store.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    again = calibrated(store, "--only", "float64", "bfloat16>bfloat16")
    assert "3 blocks of 2 recipes done, 1 to do" in again.stdout, again.stderr
    assert sorted(store.read_text().splitlines()) == sorted([header, *blocks])
    other = calibrated(store, "--seed", "2")
    assert "holds another calibration (other seed)" in other.stderr
    assert FILE.read_bytes() == before


@pytest.mark.parametrize("option", ["--workers", "--examples"])
def test_a_number_that_is_none_leaves_a_store_as_it_is(option, tmp_path):
    store = tmp_path / "store.jsonl"
    store.write_text(f"{json.dumps(calibrate.begins(1))}\n{json.dumps({'job': 'some', 'kinds': {}})}\n")
    before = store.read_bytes()
    with pytest.raises(UsageError, match=f"{option} must be at least 1, got 0"):
        calibrate.main(["--store", str(store), option, "0"], Console())
    assert store.read_bytes() == before


def test_the_workers_of_a_calibration_end_with_a_parent_that_is_killed(tmp_path):
    """They hold its standard output, which ends with the last of them."""
    program = (
        "import os, signal; from concurrent.futures import ProcessPoolExecutor; from verify import calibrate\n"
        "with ProcessPoolExecutor(2, initializer=calibrate._end_with_the_parent) as pool:\n"
        "    assert all(pool.submit(signal.pause) for _ in range(2)) and len(pool._processes) == 2\n"
        "    print('working', flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (-9, "working\n"), run.stderr


def test_limits_are_no_part_of_what_a_stored_calibration_was_measured_by():
    """Who writes the rows of one kind goes on with the store of another."""
    assert sources.digest(without=FILE.resolve()) == calibrate.begins(1)["sources"] != sources.digest()


@pytest.fixture
def limits(tmp_path, monkeypatch) -> Path:
    """A file of limits that a test may write."""
    path = tmp_path / "limits.json"
    path.write_bytes(FILE.read_bytes())
    monkeypatch.setattr(calibrate, "FILE", path)
    return path


def write(folder: Path, observed: float, *arguments: str) -> tuple[int, str]:
    """Let the command end with a store in which one block of float64 met this; returns its code and what it said."""
    largest = {"observed": observed, "what": "dg", "target": "chunk_torch", "recipe": "float64 T=7"}
    met = {"cases": 50, "gates": {"row": {"bins": {"8": 50}, "largest": largest}}}
    block = {"job": "recurrent_torch 0 float64 0 1 1", "kinds": {"float64>float64 beta<=1": met}}
    store = folder / "store.jsonl"
    store.write_text("".join(f"{json.dumps(line)}\n" for line in (calibrate.begins(1), block)))
    console = Console(width=400, record=True, file=io.StringIO())
    code = calibrate.main(["--only", "float64", "--examples", "50", "--store", str(store), *arguments], console)
    return code, console.export_text()


def test_a_limit_rises_only_for_a_reason_that_is_kept_beside_it(tmp_path, limits):
    before = limits.read_bytes()
    now = json.loads(before)["limits"]["float64>float64 beta<=1"]["limits"]["row"]
    code, said = write(tmp_path, 20.0)
    assert code == 1 and limits.read_bytes() == before
    assert f"float64>float64 beta<=1 row from {now:g} to 30: chunk_torch reached 20 in dg of float64 T=7" in said
    assert write(tmp_path, 20.0, "--reason", "measured on paper")[0] == 0
    row = json.loads(limits.read_text())["limits"]["float64>float64 beta<=1"]
    assert (row["limits"]["row"], row["reason"]) == (30.0, "measured on paper")


def test_limits_that_hold_are_written_with_what_was_met(tmp_path, limits):
    assert write(tmp_path, 1.0)[0] == 0
    row = json.loads(limits.read_text())["limits"]["float64>float64 beta<=1"]
    assert row["limits"]["row"] == 3.0 and row["largest"]["row"]["observed"] == 1.0 and "reason" not in row
