"""Known faults are caught and shrunk to the smallest recipe that shows them; equal plans give equal records."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from verify import coverage, display, records, runner, session
from verify.plan import PROFILES, Plan
from verify.properties import PROPERTIES
from verify.recipes import Recipe, from_json
from verify.targets import TargetError
from verify.trial import Measure


def failures(found: list[dict]) -> dict[str, dict]:
    return {r["property"]: r for r in found if r["kind"] == "failure"}


def verdict(target: str, found: list[dict]) -> session.Verdict:
    whole = session.Verdict(target)
    for record in found:
        whole.add(record)
    return whole


SMALLEST = [
    ("wrong_from_sixth", "reference_forward", Recipe(T=6)),
    ("wrong_second_column", "reference_forward", Recipe(T=1, V=2)),
    ("raises_on_three_tokens", "reference_forward", Recipe(T=3)),
    ("loses_a_row_of_three", "null_token", Recipe(T=2)),
    ("loses_a_row_of_three", "nan_shows", Recipe(T=3)),
    ("nan_at_minus_infinity", "reference_forward@-inf", Recipe(T=1, gates="resets_inf")),
    ("returns_o_only", "reference_forward", Recipe(T=1)),
    ("state_forgotten", "reference_forward", Recipe(T=1)),
]


@pytest.mark.parametrize("kernel, name, smallest", SMALLEST, ids=[row[0] for row in SMALLEST])
def test_a_fault_is_caught_and_shrunk_to_the_smallest_case_that_shows_it(judged, kernel, name, smallest):
    found = judged(f"broken_kernels:{kernel}", (name.removesuffix(records.INFINITE),), examples=40)
    failure = failures(found)[name]
    assert from_json(failure["recipe"]) == smallest
    assert failure["steady"]
    assert verdict(kernel, found).code == session.FAILED


@pytest.mark.parametrize("kernel, name", [("undecayed", "reference_forward"), ("future_leak", "causality")])
def test_a_fault_shrinks_to_a_few_tokens_of_one_or_two_channels(judged, kernel, name):
    recipe = from_json(failures(judged(f"broken_kernels:{kernel}", (name,)))[name]["recipe"])
    assert recipe.T <= 5
    # unit queries of one channel are 1 or -1, and another case may have the same: a single one need not show a leak
    assert recipe.B * recipe.HV * recipe.K * recipe.V <= 2


def test_shrinking_stops_after_the_profiles_number_of_attempts(judged, monkeypatch):
    monkeypatch.setitem(PROFILES, "smoke", replace(PROFILES["smoke"], shrinks=0))
    found = judged("broken_kernels:wrong_from_sixth", ("reference_forward",))
    assert from_json(failures(found)["reference_forward"]["recipe"]) != Recipe(T=6)


def test_a_reported_case_is_a_case_that_fails(judged):
    failure = failures(judged("broken_kernels:undecayed", ("reference_forward",)))["reference_forward"]
    again = judged("broken_kernels:undecayed", ("reference_forward",), recipe=failure["recipe"])
    (repeated,) = failures(again).values()
    shown = ("recipe", "inputs", "observed", "allowed", "what", "where", "ratio")
    assert {k: repeated[k] for k in shown} == {k: failure[k] for k in shown}


def test_a_failure_that_does_not_come_back_is_not_steady_and_means_nondeterministic(judged):
    found = judged("broken_kernels:wrong_once", ("reference_forward",))
    assert [f["steady"] for f in failures(found).values()] == [False] * len(failures(found))
    assert verdict("wrong_once", found).code == session.FLAKY


def test_a_right_third_party_passes_every_property(judged):
    found = judged("broken_kernels:float64_copy", examples=6)
    assert not failures(found)
    assert verdict("float64_copy", found).code == session.PASS
    judged_properties = {name for r in found if r["kind"] == "case" for name in r["results"]}
    assert len(judged_properties) > 35


def test_a_keyword_taken_and_ignored_is_a_finding(judged):
    found = judged("broken_kernels:deaf_to_scale", ("reference_forward",))
    outcomes = {r["axis"]: r["outcome"] for r in found if r["kind"] == "probe"}
    assert outcomes["scale"] == "ignored"
    whole = verdict("deaf_to_scale", found)
    assert whole.code == session.FAILED
    assert any("IGNORED[/] scale: scale= is accepted and has no effect" in line for line in display.probes(whole))
    assert not any(r["recipe"]["scale"] for r in found if r["kind"] == "case")


FINDINGS = [
    ("in_float32", ("float32", "bfloat16"), session.PASS),
    ("in_float32", ("float64",), session.FAILED),
    ("raises_always", ("float32",), session.NOTHING),
    ("bfloat16_only", ("float32",), session.NOTHING),
    ("returns_o_only", ("float32",), session.FAILED),
]


@pytest.mark.parametrize("kernel, dtypes, code", FINDINGS, ids=lambda x: str(x))
def test_what_the_probe_finds_wrong_fails_whatever_the_properties_say(judged, kernel, dtypes, code):
    found = judged(f"broken_kernels:{kernel}", ("determinism",), examples=2, dtypes=dtypes)
    whole = verdict(kernel, found)
    assert whole.code == code
    assert ("no counterexample" in display.counts(whole, "cpu")) == (code == session.PASS)
    assert ("WRONG" in "".join(display.probes(whole))) == (code == session.FAILED)


def test_a_replay_reports_its_case_and_not_what_the_probe_finds(judged):
    plain = Recipe(T=2).to_json()
    found = judged("broken_kernels:deaf_to_scale", ("reference_forward",), recipe=plain)
    assert verdict("deaf_to_scale", found).code == session.PASS


@pytest.mark.parametrize(
    "target, name, reason",
    [
        ("recurrent_torch", "chunk_invariance", "chunk_size not taken"),
        ("broken_kernels:float64_copy", "state_v_first", "state_v_first not taken"),
        ("recurrent_torch", "reset_gradient", "no drawn case fits"),
        ("recurrent_torch", "null_token", ""),
    ],
)
def test_a_property_that_compared_nothing_is_named_with_its_reason(judged, target, name, reason):
    whole = verdict(target, judged(target, (name,), examples=3))
    assert whole.done["not_asked"] == ({name: reason} if reason else {})
    assert f"{name} ({reason})" in display.not_asked(whole) or not reason


def test_a_property_without_anything_to_compare_is_discarded(judged, monkeypatch):
    empty = replace(PROPERTIES[0], check=lambda trial: [Measure("nothing", 0.0, 0.0, rows=0)])
    monkeypatch.setattr(runner, "PROPERTIES", (empty,))
    (*cases, done) = judged("recurrent_torch", examples=2)
    assert [case["results"] for case in cases] == [{}, {}]
    assert done["counts"]["discarded"] == 2
    assert done["not_asked"] == {empty.name: "nothing to compare in its cases"}


def test_a_failure_counts_though_it_compared_nothing():
    raised = Measure("raised", float("inf"), 0, rows=0)
    assert runner.worst_of([Measure("fine", 0.0, 1.0), raised]) == raised


@pytest.mark.parametrize("target", ["recurrent_torch", "broken_kernels:undecayed"])
def test_equal_plans_give_equal_records_byte_for_byte(judged, target):
    runs = [judged(target, ("reference_forward",), examples=3) for _ in range(2)]
    first, second = ("".join(records.line(x | {"seconds": {}}) for x in run) for run in runs)
    assert first == second


def test_another_seed_draws_other_recipes(judged):
    drawn = [
        {r["inputs"] for r in judged("recurrent_torch", ("causality",), examples=5, seed=seed) if r["kind"] == "case"}
        for seed in (0, 1, 2)
    ]
    assert sum(map(len, drawn)) == len(set.union(*drawn)) == 15


def test_only_the_named_properties_are_judged(judged):
    found = judged("recurrent_torch", ("causality", "split"), examples=3)
    assert {name.removesuffix(records.INFINITE) for r in found if r["kind"] == "case" for name in r["results"]} <= {
        "causality",
        "split",
    }


def test_a_dtype_that_a_target_does_not_take_is_reported_not_judged(judged, monkeypatch):
    monkeypatch.setattr(runner, "load", lambda plan, load=runner.load: replace(load(plan), dtypes=("float32",)))
    found = judged("recurrent_torch", ("reference_forward",), examples=2, dtypes=("float32", "float64"))
    (done,) = [r for r in found if r["kind"] == "target"]
    assert done["dtypes_refused"] == ["float64"]
    assert {r["recipe"]["dtype"] for r in found if r["kind"] == "case"} == {"float32"}


def test_a_property_that_applies_to_nothing_means_nothing_ran(judged):
    found = judged("recurrent_torch", ("chunk_invariance",), examples=3)
    assert verdict("recurrent_torch", found).code == session.NOTHING


@pytest.mark.parametrize(
    "device, message",
    [("cuda:99", "--device cuda:99: "), ("interpret", "recurrent_torch runs on cpu, cuda, not on interpret")],
)
def test_a_device_that_is_not_here_is_named(judged, device, message):
    with pytest.raises(TargetError, match=message):
        judged("recurrent_torch", device=device)


PRECEDENCE = [
    ([], session.NOTHING),
    ([0], 0),
    ([0, 0], 0),
    ([3], 3),
    ([3, 3], 3),
    ([0, 3], 3),
    ([0, 1, 3], 1),
    ([4, 0], 4),
    ([4, 1], 1),
    ([1, 5], 5),
    ([4, 5, 3], 5),
    ([5, 6], 6),
    ([1, 4, 6, 5, 3, 0], 6),
    ([6, 2], 2),
    ([0, 2], 2),
]


@pytest.mark.parametrize("codes, expected", PRECEDENCE, ids=str)
def test_exit_codes_combine_as_6_before_5_before_1_before_4_before_3_before_0_and_usage_first(codes, expected):
    assert session.exit_code(codes) == expected


@pytest.mark.parametrize("changes", [{}, {"coverage": {}}], ids=["too little", "absent"])
@pytest.mark.parametrize("term", coverage.TERMS)
def test_a_term_that_no_case_exercised_is_said_to_be_untested(judged, term, changes):
    case = next(r for r in judged("recurrent_torch", ("causality",), examples=1) if r["kind"] == "case")
    seen = dict.fromkeys(coverage.TERMS, 2 * coverage.SEEN)
    assert "NOT TESTED" not in display.terms(verdict("recurrent_torch", [case | {"coverage": seen}]))
    missed = changes.get("coverage", seen | {term: coverage.SEEN / 2})
    assert f"{term} NOT TESTED" in display.terms(verdict("recurrent_torch", [case | {"coverage": missed}]))


def test_a_plan_survives_json():
    plan = Plan("t", "cpu", "smoke", ("float32",), 3, 4, ("split",), recipe=Recipe(lengths=(1, 2)).to_json())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.name)
def test_every_property_explains_its_equation_and_what_it_would_have_caught(prop):
    claim, bugs = prop.explanation.split("Would have caught:")
    assert len(claim) > 30
    assert len(bugs) > 20


def test_names_of_properties_are_unique():
    assert len({p.name for p in PROPERTIES}) == len(PROPERTIES) >= 45


def test_progress_goes_to_a_log_as_a_line_a_minute(monkeypatch, capsys):
    seconds = iter([0.0, 1.0, 61.0, 62.0, 130.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(seconds))
    case = {"kind": "case", "target": "kernel", "results": {"split": {"ratio": 0.25}}}
    with display.progress(Console(width=100), {"kernel": 9}) as listen:
        for _ in range(4):
            listen(case)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("kernel: ")[1] for line in shown] == [
        "2 of 9 recipes, worst 0.25",
        "4 of 9 recipes, worst 0.25",
    ]


def test_the_time_of_a_worker_is_told_by_where_it_went(judged):
    (done,) = [x for x in judged("recurrent_torch", ("reference_forward",), examples=3) if x["kind"] == "target"]
    spent = done["seconds"]
    assert 0 < spent["target"] < spent["all"] and 0 < spent["definition"] < spent["all"]


def test_parts_of_a_run_add_up_and_keep_the_smallest_failure(judged):
    whole = session.Verdict("undecayed")
    for part in range(2):
        for record in judged("broken_kernels:undecayed", ("reference_forward", "split"), shard=(part, 2)):
            whole.add(record)
    smallest = min((f for f in whole.failures), key=session.size)
    assert whole.seen == whole.counts["cases"] == 8
    assert [f["property"] for f in whole.failures].count("reference_forward") == 1 and smallest in whole.failures
    assert len({p["axis"] for p in whole.probes}) == len(whole.probes)
