"""A regression is told from noise and from a slower machine, on figures that were measured."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import baselines
import conftest
import pytest
import stored
import summary
from baselines import FEWER, NEW, NOISE, REGRESSION, SAME, Baseline, Peer, Row, change, row

from autotune.timing import Spread
from reports import load

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "tests" / "benchmarks" / "recorded.json").read_text())
ROWS = [Row.from_json(x) for x in RECORDED["rows"]]
WITH_PEER = [x for x in ROWS if x.peers and x.peers[0].ratio.count >= baselines.FEW]
ALONE = [x for x in ROWS if not x.peers and x.ours.count >= baselines.FEW]
SINGLE = [x for x in ROWS if x.ours.count < baselines.FEW]


def slowed(x: Row, ours: float, theirs: float = 1.0) -> Row:
    """Return a row of a machine on which ours takes so many times as long, and the peers."""
    peers = tuple(replace(p, theirs=p.theirs.over(1 / theirs), ratio=p.ratio.over(ours / theirs)) for p in x.peers)
    return replace(x, ours=x.ours.over(ours if x.rate else 1 / ours), peers=peers)


def wide(x: Spread) -> Spread:
    """Return a spread with the same median whose quartiles reach from half to twice of it."""
    return replace(x, low=x.median / 2, high=x.median * 2)


def names(rows):
    return [x.name for x in rows]


def test_what_was_recorded_has_rows_of_every_kind():
    assert len(WITH_PEER) >= 8 and ALONE and SINGLE and any(x.rate for x in ROWS)


@pytest.mark.parametrize("x", WITH_PEER + ALONE, ids=names(WITH_PEER + ALONE))
def test_a_run_beside_itself_is_as_before(x):
    assert change(x, x).verdict == SAME and change(x, x).slower == 0


@pytest.mark.parametrize("x", WITH_PEER + ALONE, ids=names(WITH_PEER + ALONE))
def test_ten_times_as_slow_is_a_regression_and_a_tenth_is_none(x):
    found = change(slowed(x, 10), x)
    assert found.verdict == REGRESSION and found.slower == pytest.approx(9)
    assert change(slowed(x, 1.1), x).verdict == SAME
    assert change(x, slowed(x, 10)).slower == pytest.approx(-0.9)


@pytest.mark.parametrize("x", WITH_PEER, ids=names(WITH_PEER))
def test_a_machine_that_slows_both_is_no_regression_where_there_is_a_peer(x):
    assert change(slowed(x, 3, theirs=3), x).verdict == SAME
    assert change(slowed(x, 3, theirs=1), x).by == f"ratio to {x.peers[0].name}"


@pytest.mark.parametrize("x", WITH_PEER + ALONE, ids=names(WITH_PEER + ALONE))
def test_worse_with_quartiles_that_overlap_is_noise(x):
    noisy = replace(x, ours=wide(x.ours), peers=tuple(replace(p, ratio=wide(p.ratio)) for p in x.peers))
    assert change(slowed(noisy, 1.4), noisy).verdict == NOISE


@pytest.mark.parametrize("x", SINGLE, ids=names(SINGLE))
def test_single_samples_are_not_compared(x):
    assert change(slowed(x, 10), x).verdict == FEWER


def test_another_peer_leaves_the_median_to_compare():
    before = WITH_PEER[0]
    now = replace(slowed(before, 10), peers=(replace(before.peers[0], name="somebody else"),))
    assert change(now, before).by == "median" and change(now, before).verdict == REGRESSION


def test_rows_are_made_of_samples_within_common_rounds():
    made = row("a", "ms", {0: 2.0, 1: 4.0, 2: 8.0}, {"slow": {0: 4.0, 2: 24.0}, "absent": {}})
    assert made.ours.median == 4 and made.peers == (Peer("slow", Spread.of([4.0, 24.0]), Spread.of([2.0, 3.0])),)
    rate = row("b", "cases/s", {0: 6.0}, {"work": {0: 3.0}}, rate=True)
    assert rate.peers[0].ratio.median == 2


def device() -> dict:
    return {"kind": "cpu", "name": "A CPU", "units": 2, "threads": 2}


def test_a_baseline_keeps_what_it_does_not_know_and_nothing_else_unless_it_is_set(tmp_path):
    about = {name: RECORDED[name] for name in ("date", "device", "versions", "sources", "git")}
    assert [x.verdict for x in Baseline.of(tmp_path, device()).changes(ROWS)] == [NEW] * len(ROWS)
    assert Baseline.of(tmp_path, device()).take(ROWS[:2], about, False) == names(ROWS[:2])
    slower = [slowed(x, 2) for x in ROWS]
    assert Baseline.of(tmp_path, device()).take(slower, about, False) == names(ROWS[2:])
    kept = Baseline.of(tmp_path, device())
    assert kept.rows[ROWS[0].name] == ROWS[0] and kept.rows[ROWS[2].name] == slower[2]
    kept.take(slower, about, True)
    assert Baseline.of(tmp_path, device()).rows[ROWS[0].name] == slower[0]
    for other in ({"threads": 1}, {"capability": "AVX2"}):
        assert Baseline.of(tmp_path, device() | other).rows == {}
    [result] = load.read([kept.path])
    assert result.kind == "benchmarks"


def session(folder, rows, **options):
    """Return what pytest would hand over at the end of a run that found rows."""
    asked = {"--threads": 2, "--results": None, "--baseline": str(folder), "--set-baseline": False} | options
    stash = {conftest.FOUND: {"cases": [], "model": [], "rows": rows}, conftest.SAID: []}
    return SimpleNamespace(config=SimpleNamespace(getoption=asked.get, stash=stash), exitstatus=0)


def ended(*arguments, **options) -> tuple[int, str]:
    """End a run; returns its exit status and what it says."""
    made = session(*arguments, **options)
    conftest.pytest_sessionfinish(made)
    return made.exitstatus, "\n".join(x for x in made.config.stash[conftest.SAID] if isinstance(x, str))


def test_a_regression_is_named_and_ends_the_run_with_1(tmp_path):
    status, said = ended(tmp_path, ROWS)
    assert status == 0 and "no baseline of this machine so far" in said
    status, said = ended(tmp_path, ROWS)
    assert status == 0 and "0 regressions in " in said and "within common rounds" in said
    worse = [slowed(WITH_PEER[0], 10), *(x for x in ROWS if x.name != WITH_PEER[0].name)]
    status, said = ended(tmp_path, worse)
    name, peer = WITH_PEER[0].name, WITH_PEER[0].peers[0].name
    expected = f"REGRESSION: {name} is 900% worse than the baseline by its ratio to {peer}\n"
    assert status == 1 and said.startswith(expected)
    assert ended(tmp_path, worse, **{"--set-baseline": True})[0] == 1
    assert ended(tmp_path, worse)[0] == 0


def test_a_run_of_some_benchmarks_loses_none_of_the_others(tmp_path):
    found = {"cases": [], "model": [{"model": "mla", "asked": "x", "ms": {}, "ratios": {}}], "rows": ROWS[:3]}
    seconds = {"processor_s": None, "seconds": Spread.of([1.0]).to_json()}
    stages = {"check": {"trials_per_minute": 1.0, "mean_s": 1.0, **seconds}}
    origin = stored.Origin(2)
    first = stored.stored(found | {"tuner": {"stages": stages}}, origin, tmp_path)
    second = stored.stored({"cases": [], "model": [], "rows": ROWS[3:5]}, origin, tmp_path)
    assert {result.kind for result in load.read(first)} == {"benchmarks", "cost of tuning", "model on a cpu"}
    assert names(Row.from_json(x) for x in json.loads(second[0].read_text())["rows"]) == names(ROWS[:5])
    assert load.read(second)[0].origin.device == f"{origin.device['name']}, 2 threads"


def test_the_table_has_a_line_for_every_peer():
    changes = Baseline(Path()).changes(ROWS)
    assert summary.table(changes).row_count == sum(max(1, len(x.peers)) for x in ROWS)
