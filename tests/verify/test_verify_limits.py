"""Limits are measured, kept with their origin, and fair to kernels that round where their contract allows it."""

from dataclasses import asdict

import pytest

from impls.contracts import PrecisionContract
from impls.table import IMPLEMENTATIONS
from verify import yardstick
from verify.calibrate import MARGIN, OTHER_CHUNKS, SHARPEST
from verify.limits import START, limits_for, load
from verify.recipes import DTYPES, drawn, recipes
from verify.targets import Target, default_contract
from verify.trial import Trial

CALIBRATED = {kind: row for kind, row in load()["limits"].items() if not kind.startswith("any")}


@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_limit_is_the_margin_over_the_largest_ratio_and_says_where_that_was_met(kind):
    row = CALIBRATED[kind]
    assert row["how"].startswith(("python -m verify.calibrate", "python -m verify calibrate")) and row["cases"] >= 100
    for gate, limit in row["limits"].items():
        largest = row["largest"].get(gate.replace("_", " "), {"observed": 0.0})
        least = asdict(SHARPEST)[gate]
        assert limit >= MARGIN * largest["observed"]
        assert limit == least or limit <= MARGIN * largest["observed"] + 0.5


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
