"""Interpreted Triton kernels are judged as others are: by name, within a budget that counts, and found wrong."""

from collections import Counter
from dataclasses import replace

import pytest

from verify import budget, choice, interpreter, records, session
from verify.budget import INTERPRETED, Budget, cost
from verify.choice import UsageError, choose
from verify.families import materialise
from verify.plan import PROFILES
from verify.recipes import Recipe, from_json
from verify.resolve import resolve
from verify.targets import TargetError, arguments

SMALL = Budget(asked=4, tokens=11, units=400, shrinking=300)


@pytest.fixture
def interpreted(judged, monkeypatch):
    """Judge a target of this folder in the interpreter, by a small budget; returns its records."""
    for form in ("chunk", "recurrent"):
        monkeypatch.setitem(INTERPRETED, ("smoke", form), SMALL)

    def judge(name: str, properties: tuple[str, ...], **plan) -> list[dict]:
        filled = {"device": "interpret", "dtypes": ("float32", "bfloat16"), "examples": 24} | plan
        return judged(f"interpreted_kernel:{name}", properties, **filled)

    return judge


def cases(found: list[dict]) -> list[dict]:
    return [record for record in found if record["kind"] == "case"]


def test_a_right_kernel_passes_in_float32_and_bfloat16(interpreted):
    found = interpreted("recurrent", ("reference_forward", "causality", "varlen_separate", "purity"))
    assert not [r for r in found if r["kind"] == "failure" or r.get("outcome") == "wrong"]
    assert {name.removesuffix(records.INFINITE) for r in cases(found) for name in r["results"]} == {
        "reference_forward",
        "causality",
        "varlen_separate",
        "purity",
    }


def test_a_fault_is_shrunk_to_its_smallest_case_and_met_again(interpreted):
    (failure,) = [r for r in interpreted("wrong_tenth", ("reference_forward",)) if r["kind"] == "failure"]
    assert from_json(failure["recipe"]) == Recipe(T=10, dtype=failure["recipe"]["dtype"])
    again = interpreted("wrong_tenth", ("reference_forward",), recipe=failure["recipe"])
    assert [r["observed"] for r in again if r["kind"] == "failure"] == [failure["observed"]]


def test_shrinking_stops_at_its_own_cap(interpreted, monkeypatch):
    monkeypatch.setitem(INTERPRETED, ("smoke", "chunk"), replace(SMALL, shrinking=0))
    (failure,) = [r for r in interpreted("wrong_tenth", ("reference_forward",)) if r["kind"] == "failure"]
    assert from_json(failure["recipe"]) != Recipe(T=10, dtype=failure["recipe"]["dtype"])


def test_the_budget_bounds_the_recipes_of_a_property_and_their_sizes(interpreted):
    found = interpreted("recurrent", ("split", "reset"))
    asked = Counter((name, r["recipe"]["dtype"]) for r in cases(found) for name in r["results"])
    assert max(asked.values()) == SMALL.quota(infinite=False)
    assert all(count <= SMALL.quota(name.endswith(records.INFINITE)) for (name, _), count in asked.items())
    for recipe in (from_json(r["recipe"]) for r in cases(found)):
        assert max(recipe.lengths, default=recipe.T) <= SMALL.tokens
        assert max(recipe.B, recipe.H, recipe.G) <= 2
    assert "each property on at most 4 recipes a dtype, T <= 11 a sequence, H <= 2" in found[-1]["budget"]


def test_no_recipe_is_begun_when_the_units_are_spent(interpreted, monkeypatch):
    monkeypatch.setitem(INTERPRETED, ("smoke", "chunk"), replace(SMALL, units=1))
    dtypes = Counter(r["recipe"]["dtype"] for r in cases(interpreted("recurrent", ("reference_forward",))))
    assert dtypes == {"float32": 1, "bfloat16": 1}


def test_a_property_that_the_budget_does_not_reach_is_named(interpreted, monkeypatch):
    monkeypatch.setitem(INTERPRETED, ("smoke", "chunk"), replace(SMALL, units=1))
    found = interpreted("recurrent", ("reference_forward", "expanded"))
    assert found[-1]["not_asked"] == {"expanded": "no case within the budget fits"}


def test_a_number_of_recipes_that_is_asked_for_replaces_the_budget(interpreted):
    found = interpreted("recurrent", ("reference_forward",), examples=7, dtypes=("float32",), budgeted=False)
    assert len(cases(found)) == 7
    assert found[-1]["budget"] is None


def test_equal_plans_judge_equal_cases(interpreted):
    runs = [interpreted("recurrent", ("reference_forward", "split")) for _ in range(2)]
    first, second = ([record | {"seconds": {}} for record in run] for run in runs)
    assert first == second


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_every_profile_has_a_budget_for_every_form(profile, form):
    whole = INTERPRETED[profile, form]
    assert whole.quota(True) >= 1 and whole.quota(False) >= 1
    assert min(whole.tokens, whole.units, whole.shrinking) > 0


COSTS = [
    ("chunk", {"T": 0}, 0),
    ("chunk", {"T": 1}, 1),
    ("chunk", {"T": 16}, 1),
    ("chunk", {"T": 17}, 2),
    ("chunk", {"T": 17, "chunk": 32}, 1),
    ("chunk", {"T": 17, "B": 2, "H": 2, "G": 2}, 16),
    ("chunk", {"T": 18, "lengths": (1, 17, 0)}, 3),
    ("chunk", {"T": 1, "V": budget.TILE + 1}, 2),
    ("recurrent", {"T": 17}, 17),
    ("recurrent", {"T": 17, "chunk": 32, "H": 2}, 34),
]


@pytest.mark.parametrize("form, sizes, units", COSTS, ids=str)
def test_work_is_chunks_or_tokens_times_value_heads_times_value_tiles(form, sizes, units):
    assert cost(form, materialise(Recipe(**sizes))) == units


def test_tensors_of_an_interpreted_call_are_on_the_cpu():
    case = materialise(Recipe(T=3, lengths=(1, 2), state=True))
    tensors, keywords = arguments(case, resolve("interpreted_kernel:recurrent", "interpret"))
    assert {x.device.type for x in (*tensors.values(), keywords["cu_seqlens"])} == {"cpu"}


def test_an_interpreter_that_cannot_be_mended_is_a_target_that_cannot_be_judged(interpreted, monkeypatch):
    monkeypatch.setattr(interpreter, "installed", lambda: False)
    with pytest.raises(TargetError, match="--device interpret: triton is not installed"):
        interpreted("recurrent", ("split",))


# which device, and what is absent

EVERY = [impl.name for impl in choice.IMPLEMENTATIONS]
TORCH = [impl.name for impl in choice.IMPLEMENTATIONS if "cpu" in impl.devices]
TRITON = [impl.name for impl in choice.IMPLEMENTATIONS if "interpret" in impl.devices]


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this machine has, or lacks, a GPU and Triton."""

    def made(gpu: bool, triton: bool) -> None:
        monkeypatch.setattr(choice.torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(interpreter, "installed", lambda: triton)

    return made


@pytest.mark.parametrize(
    "gpu, triton, where", [(False, True, "interpret"), (True, True, "cuda:0"), (True, False, "cuda:0")]
)
def test_each_implementation_is_judged_on_the_first_device_that_is_here(machine, gpu, triton, where):
    machine(gpu, triton)
    expected = dict.fromkeys(EVERY, where) | dict.fromkeys(TORCH, "cpu")
    assert choose([], None).devices == choose(["all"], None).devices == expected


def test_what_no_device_here_runs_is_said_and_not_left_out(machine):
    machine(gpu=False, triton=False)
    found = choose([], None)
    assert list(found.devices) == TORCH
    assert list(found.absent) == TRITON
    for name, reason in found.absent.items():
        assert reason == (
            f"{name} runs on cuda, interpret: there is no GPU, and triton is not installed (pip install triton)"
        )


@pytest.mark.parametrize("name", TRITON)
def test_what_is_named_must_run(machine, name):
    machine(gpu=False, triton=False)
    with pytest.raises(UsageError, match=f"{name} runs on cuda, interpret: there is no GPU, and triton is not"):
        choose([name], None)


@pytest.mark.parametrize(
    "device, devices, absent",
    [("cpu", TORCH, TRITON), ("interpret", TRITON, TORCH), ("cuda:3", EVERY, [])],
)
def test_a_named_device_takes_what_it_runs(device, devices, absent):
    assert choose([], device) == choice.Choice(dict.fromkeys(devices, device), {})
    every = choose(["all"], device)
    assert every.devices == dict.fromkeys(devices, device)
    assert list(every.absent) == absent


@pytest.mark.parametrize("name", EVERY)
def test_a_device_that_a_named_implementation_lacks_is_refused(name):
    device = "interpret" if name in TORCH else "cpu"
    with pytest.raises(UsageError, match=f"{name} runs on .*, not on {device}"):
        choose([name], device)


@pytest.mark.parametrize("device, where", [(None, "cpu"), ("interpret", "interpret"), ("cuda:1", "cuda:1")])
def test_somebody_elses_kernel_runs_on_the_cpu_unless_told_otherwise(device, where):
    assert choose(["package.module:function"], device).devices == {"package.module:function": where}


# the command


def test_the_command_judges_an_interpreted_kernel_and_names_the_budget(command, tmp_path):
    only = ("--device", "interpret", "--profile", "smoke", "--property", "split")
    ended = command("interpreted_kernel:recurrent", *only, "--out", tmp_path)
    assert ended.code == session.PASS, ended
    assert INTERPRETED["smoke", "chunk"].words() in ended.out
    assert "no counterexample in" in ended.out and "on interpret" in ended.out


def test_the_segments_of_chunk_triton_are_judged_too(command, tmp_path):
    """The rule never cuts in the interpreter, so a configuration does."""
    (tmp_path / "segments.json").write_text('{"segments": 3, "value_tile": 16}')
    only = ("--device", "interpret", "--property", "reference_forward,split,varlen_separate,state_v_first,padding")
    ended = command("chunk_triton", *only, "--config", tmp_path / "segments.json", "--out", tmp_path)
    assert ended.code == session.PASS, ended


@pytest.mark.parametrize("device, code", [("cpu", session.PASS), ("interpret", session.NOTHING)])
def test_a_worker_interprets_if_and_only_if_that_is_its_device(command, tmp_path, device, code):
    only = ("--device", device, "--profile", "smoke", "--property", "split", "--max-examples", 1)
    ended = command("broken_kernels:only_compiled", *only, "--out", tmp_path)
    assert ended.code == code, ended


def test_a_machine_without_triton_still_judges_the_rest(monkeypatch, machine, capsys, tmp_path):
    machine(gpu=False, triton=False)
    path = tmp_path / "run.jsonl"
    monkeypatch.setattr(session, "run", lambda batches, listen, **how: {p.target: passed(p.target) for (p,) in batches})
    from verify.__main__ import main

    assert main(["--json", str(path)]) == session.PASS
    shown = capsys.readouterr().out
    assert all(f"NOT RUN {name}: {name} runs on cuda, interpret: there is no GPU" in shown for name in TRITON)
    assert [r["target"] for r in records.read(path) if r["kind"] == "not-run"] == TRITON


def passed(target: str) -> session.Verdict:
    return session.Verdict(target, cells={"split": session.Cell(1, {"ratio": 0.5})})
