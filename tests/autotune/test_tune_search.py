"""The search: every point at most once, failures learned from, nothing that finished lost."""

import contextlib
import json
import math

import optuna
import pytest

from autotune.arguments import implementation_of, problem_of
from autotune.outcomes import UsageError
from autotune.search import FAILED, FEW, GP, MEASURED, PENALTY, PRUNED, TPE, Outcome, Search
from autotune.space import Setting, space_of
from autotune.timing import Spread
from impls.targets import TARGETS

SPACE = space_of(implementation_of("chunk_torch"), Setting(problem_of("T=4096,H=16", "float32")))
FAILING = 128
"""A chunk size that fails in the made-up surface."""


def spread(x: float) -> Spread:
    return Spread(x, x, x, x, x, 1)


def surface(config) -> Outcome:
    """Make up a time with one best point: chunks of 32, blocks of 256, 16 heads, compiled."""
    if config.chunk_size == FAILING:
        return Outcome(FAILED, 1.0, message="made up")
    steps = [
        abs(math.log2(config.chunk_size / 32)),
        abs(math.log2(config.block_tokens / 256)) / 2,
        abs(math.log2(config.heads / 16)) / 2,
        0 if config.compile else 2,
    ]
    return Outcome(MEASURED, 1.0, spread(0.5 * 1.2 ** sum(steps)), spread(1.0))


def search(tmp_path, **keywords) -> Search:
    return Search(SPACE, tmp_path / "study.journal", "test", **({"sampler": TPE} | keywords))


def run(found: Search, trials: int, seconds: float = 0.0) -> list:
    tried = []
    for _ in range(trials):
        if (config := found.next(seconds)) is None:
            break
        found.tell(config, surface(config))
        tried.append(config)
    return tried


def test_no_point_is_tried_twice_and_all_are_in_the_end(tmp_path):
    found = search(tmp_path)
    tried = run(found, 1000)
    assert len(tried) == len(set(tried)) == len(found.points) and set(tried) == set(SPACE.points())
    assert found.next(1e9) is None and not found.left


def test_what_is_left_is_tried_point_by_point_where_there_is_time(tmp_path):
    found = search(tmp_path)
    run(found, 5)
    left = found.left
    assert run(found, 1000, seconds=1e6) == left


def test_known_configurations_are_tried_first(tmp_path):
    first = tuple(list(SPACE.points())[i] for i in (70, 7))
    assert tuple(run(search(tmp_path, first=first), 2)) == first


def test_another_run_goes_on_where_the_last_one_ended(tmp_path):
    tried = run(search(tmp_path), 20)
    again = search(tmp_path)
    assert set(again.outcomes) == set(tried) and again.outcomes == {x: surface(x) for x in tried}
    assert not set(run(again, 20)) & set(tried)


def test_a_trial_that_was_given_up_is_tried_again(tmp_path):
    with search(tmp_path) as found:
        run(found, 3)
        lost = found.next(0.0)
        assert lost not in search(tmp_path).left
    again = search(tmp_path)
    assert lost in again.left and len(again.outcomes) == 3


def test_an_interruption_anywhere_mixes_up_nothing(tmp_path, monkeypatch):
    found = search(tmp_path)
    run(found, 6)
    for method in ("add_trial", "tell", "get_trials"):
        for passed in range(3):
            with contextlib.suppress(KeyboardInterrupt), found, monkeypatch.context() as patch:
                patch.setattr(found.ledger.study, method, interrupted(getattr(found.ledger.study, method), passed))
                run(found, 4)
        found = search(tmp_path)
        assert not found.busy
        assert found.outcomes == {x: surface(x) for x in found.outcomes} and len(found.outcomes) >= 6
        run(found, 10)
    again = search(tmp_path)
    assert again.outcomes == {x: surface(x) for x in again.outcomes} and len(again.outcomes) >= 36


def interrupted(real, passed: int):
    """Let so many calls pass, then raise; every second one only when its work is done."""
    calls = iter(range(10**6))

    def call(*arguments, **keywords):
        if (number := next(calls)) < passed:
            return real(*arguments, **keywords)
        if number % 2:
            real(*arguments, **keywords)
        raise KeyboardInterrupt

    return call


def test_a_last_line_that_was_cut_off_costs_its_own_trial_only(tmp_path):
    run(search(tmp_path), 8)
    path = tmp_path / "study.journal"
    path.write_bytes(path.read_bytes()[:-20])
    run(search(tmp_path), 3)
    again = search(tmp_path)
    assert 10 <= len(again.outcomes) <= 11 and again.outcomes == {x: surface(x) for x in again.outcomes}


def test_a_study_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "study.journal").write_text("{}}\n" * 3)
    with pytest.raises(UsageError, match="--fresh"):
        search(tmp_path)


def test_failures_are_told_as_violated_constraints_and_never_best(tmp_path):
    found = search(tmp_path)
    run(found, 1000, seconds=1e6)
    failed = [x for x, outcome in found.outcomes.items() if outcome.status == FAILED]
    assert failed and all(outcome.value == PENALTY for x, outcome in found.outcomes.items() if x in failed)
    assert not set(failed) & set(found.best(1e9, 1000))
    trials = found.ledger.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    told = {json.loads(x.user_attrs["outcome"])["status"]: x.constraints for x in trials if "outcome" in x.user_attrs}
    assert told[FAILED] != told[MEASURED]


def test_the_best_are_in_order_and_within_the_margin(tmp_path):
    found = search(tmp_path)
    run(found, 1000, seconds=1e6)
    best = found.best(0.25, 50)
    ratios = [found.outcomes[x].ratio.median for x in best]
    assert ratios == sorted(ratios) and ratios[-1] <= 1.25 * ratios[0] == 0.625
    assert found.best(0.25, 2) == best[:2]


@pytest.mark.parametrize("seed", range(3))
def test_equal_seeds_try_equal_points(tmp_path, seed):
    tried = [run(search(tmp_path / name, seed=seed), 25) for name in "ab"]
    assert tried[0] == tried[1]


@pytest.mark.parametrize(("sampler", "installed"), [(GP, True), (TPE, False)])
def test_beyond_the_neighbours_the_gp_proposes_where_scipy_is_installed(tmp_path, monkeypatch, sampler, installed):
    if installed:
        pytest.importorskip("scipy")
    else:
        monkeypatch.setattr("autotune.search.find_spec", lambda name: None)
    found = search(tmp_path, sampler=None)
    tried = run(found, 24)
    assert len(set(tried)) == 24 and found.ways[sampler] >= 1 and set(found.ways) <= {"neighbour", sampler, "random"}
    assert search(tmp_path).ways == found.ways


def test_the_gp_gives_way_to_tpe_where_its_time_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("autotune.search.find_spec", lambda name: name)
    found = search(tmp_path, sampler=None)
    assert found._sampler == GP
    found.outcomes = dict.fromkeys(range(FEW))
    assert found._sampler == TPE


def test_outcomes_survive_json():
    for outcome in map(surface, SPACE.points()):
        assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


LARGE = space_of(implementation_of("chunk_triton"), Setting(problem_of("T=8192,H=64", "bfloat16"), TARGETS["sm_90"]))


def large(config) -> float:
    """Make up a time for a space of millions."""
    warps = abs(math.log2(config.walk_warps / 2)) + abs(math.log2(config.intra_warps / 4))
    return 1.1 ** (warps + abs(math.log2(config.value_tile / 32)) + config.intra_stages + config.recompute)


def test_a_space_of_millions_is_searched_without_listing_it(tmp_path):
    found = Search(LARGE, tmp_path / "study.journal", "test", first=(LARGE.kind(),), sampler=TPE)
    assert found.size > 10**6 and not found.points
    tried = []
    for _ in range(150):
        tried.append(found.next(1e9))
        found.tell(tried[-1], Outcome(MEASURED, 1.0, spread(large(tried[-1])), spread(1.0)))
    assert len(set(tried)) == 150 and all(map(LARGE.admits, tried))
    assert found.outcomes[found.best(0, 1)[0]].ratio.median == pytest.approx(1.1)


def test_what_is_ruled_out_does_not_end_the_search(tmp_path):
    found = search(tmp_path, screen=lambda configs: {x: "spills" if x.chunk_size < 128 else 1.0 for x in configs})
    tried = run(found, 1000)
    assert set(tried) == {x for x in SPACE.points() if x.chunk_size == 128}
    assert set(found.outcomes) == set(SPACE.points())


def test_a_screen_rules_out_and_orders(tmp_path):
    seen = []

    def screen(configs):
        seen.extend(configs)
        return {x: "spills" if x.intra_warps == 8 else large(x) for x in configs}

    found = Search(LARGE, tmp_path / "study.journal", "test", first=(LARGE.kind(),), screen=screen, sampler=TPE)
    tried = []
    for _ in range(60):
        tried.append(found.next(0.0))
        found.tell(tried[-1], Outcome(MEASURED, 1.0, spread(large(tried[-1])), spread(1.0)))
    assert not [x for x in tried if x.intra_warps == 8]
    pruned = [x for x, outcome in found.outcomes.items() if outcome.status == PRUNED]
    assert pruned and all(x.intra_warps == 8 and found.outcomes[x].message == "spills" for x in pruned)
    # the first neighbour that is measured is the one of the least estimate
    assert large(tried[1]) == min(large(x) for x in seen[: seen.index(tried[1]) + 1] if x.intra_warps != 8)
    assert large(found.best(0, 1)[0]) == pytest.approx(1.1)


@pytest.mark.parametrize("told", [True, False])
def test_who_finds_all_that_is_left_in_other_hands_waits_for_what_becomes_of_it(tmp_path, told):
    first, waited = search(tmp_path), []
    run(first, first.size - 1, seconds=1e6)
    held = first.next(1e6)

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if told:
            first.tell(held, surface(held))
        else:
            first.ledger.release()

    second = search(tmp_path, wait=wait)
    assert second.next(0.0) is None and not waited
    assert second.next(1e6) == (None if told else held) and len(waited) == 1
    assert len(second.outcomes) == first.size - (not told)


def test_who_holds_points_is_never_kept_waiting(tmp_path):
    with search(tmp_path, wait=pytest.fail) as found:
        held = [found.next(1e6) for _ in range(found.size)]
        assert set(held) == set(SPACE.points()) and found.next(1e6) is None
    assert not search(tmp_path).busy
