"""`python -m autotune tune` and `show`, as users run them."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from autotune import clock, judge, study, tune
from autotune.__main__ import main
from autotune.outcomes import FAILED, NOTHING, PASS, UNFINISHED, USAGE
from autotune.search import Outcome
from autotune.timing import Spread
from impls import ChunkTorchConfig, tuned
from impls.devices import named
from verify import session

TINY = ["--op", "chunk_torch", "--tokens", "64", "--heads", "2", "--head-dim", "16", "--fix", "compile=false"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(clock, "FINAL", clock.Effort(least=3, most=3, seconds=0.0))
    tuned.forget()
    yield tmp_path / "kda-forge"
    tuned.forget()


def verdict(code: int) -> dict:
    return {
        "code": code,
        "outcome": judge.OUTCOMES[code],
        "counts": {"cases": 1},
        "failed": ["definition"],
        "reason": None,
    }


@pytest.fixture
def judged(monkeypatch):
    """Let everything pass that `refused` does not name, and keep what was judged."""
    asked, refused = [], set()

    def verified(name, config, device, profile, head_dims, quiet, folder):
        asked.append(config)
        return verdict(session.FAILED if config in refused or "all" in refused else session.PASS)

    monkeypatch.setattr(judge, "verified_config", verified)
    return asked, refused


def own_file(cache):
    return tuned.path_of(cache / "configs", "chunk_torch", named("cpu")["name"])


def test_for_real_with_the_judge(cache, capfd):
    assert main(["tune", *TINY, "--budget", "2s"]) == PASS
    printed = capfd.readouterr().out
    assert "verdict" in printed and "written:" in printed
    entry = tuned.read(own_file(cache))["entries"][0]
    assert entry["verified"]["outcome"] == "passed" and entry["verified"]["counts"]
    assert entry["shape"] == {"T": 64, "N": 1, "HV": 2, "K": 16, "V": 16, "dtype": "float32", "packed": False}


def test_a_second_run_measures_nothing_again(cache, judged, capsys):
    main(["tune", *TINY, "--budget", "60s"])
    first = capsys.readouterr().out
    main(["tune", *TINY, "--budget", "60s"])
    again = capsys.readouterr().out
    points = first.split(" points")[0].split()[-1]
    assert f"{points} points, 0 known" in first and f"{points} points, {points} known" in again
    main(["tune", *TINY, "--budget", "1s", "--fresh"])
    assert f"{points} points, 0 known" in capsys.readouterr().out


def test_ctrl_c_loses_no_trial(cache, judged, monkeypatch, capsys):
    real, count = clock.Clock.outcome, iter(range(100))

    def interrupted(self, config):
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(self, config)

    monkeypatch.setattr(clock.Clock, "outcome", interrupted)
    assert main(["tune", *TINY, "--budget", "60s"]) == session.INTERRUPTED
    assert not own_file(cache).exists()
    assert main(["tune", *TINY, "--budget", "60s"]) == PASS
    assert "3 known from earlier runs" in capsys.readouterr().out


def test_what_fails_verification_is_passed_over(cache, judged, monkeypatch, capsys):
    asked, refused = judged
    default, quicker, near = (ChunkTorchConfig(chunk_size=x) for x in (16, 32, 64))
    standings = [
        clock.Standing(config, spread, spread, config is quicker)
        for config, x in ((default, 1.0), (quicker, 0.5), (near, 0.9))
        for spread in (Spread(x, x, x, x, x, 9),)
    ]
    monkeypatch.setattr(clock, "raced", lambda *arguments: standings)
    refused.add(quicker)
    assert main(["tune", *TINY, "--budget", "1s"]) == PASS
    assert asked == [quicker, default] and "not chosen" in capsys.readouterr().out
    assert tuned.read(own_file(cache))["entries"][0]["config"] == asdict(default)


def test_where_nothing_passes_no_file_is_written(cache, judged, capsys):
    judged[1].add("all")
    assert main(["tune", *TINY, "--budget", "1s"]) == FAILED
    assert not own_file(cache).exists() and "no file was written" in capsys.readouterr().out


def test_json_is_all_that_machines_get(cache, judged, capsys):
    assert main(["tune", *TINY, "--budget", "1s", "--json"]) == PASS
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["path"] == str(own_file(cache)) and found["entry"]["timing"]["trials"] >= 1


def test_a_file_can_be_written_for_a_device_of_another_name(cache, judged, tmp_path):
    assert main(["tune", *TINY, "--budget", "1s", "--out", str(tmp_path / "x"), "--as", "generic-cpu"]) == PASS
    assert tuned.read(tmp_path / "x" / "generic-cpu" / "chunk_torch.json")["device"]["name"] == "generic-cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "--device must be cpu or cuda:N"),
        (["--device", "cuda:0"], "sees no CUDA device"),
        (["--preset", "kimi"], "--preset must be one of kimi-linear-48b"),
        (["--preset", "kimi-linear-48b", "--tokens", "9"], "--tokens does not go with it"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--op", "all", "--record", "x.json"], "--record keeps the trials of one shape, 2 are asked for"),
        (["--op", "chunk_triton"], "--op must be one of"),
        (["--budget", "soon"], "--budget"),
        (["--budget", "0s"], "--budget"),
        (["--heads", "0"], "--heads must be at least 1"),
        (["--head-dim", "300"], "--head-dim"),
        (["--fix", "compile=maybe"], "--fix"),
        (["--fix", "speed=11"], "--fix"),
        (["--fix", "chunk_size=17"], "--fix"),
    ],
)
def test_usage_is_exit_code_2_and_one_line(cache, capsys, arguments, message):
    assert main(["tune", *arguments]) == USAGE
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_file_that_is_not_ours_is_refused_before_anything_is_measured(cache, judged, capsys):
    own_file(cache).parent.mkdir(parents=True)
    own_file(cache).write_text("mine")
    assert main(["tune", *TINY]) == USAGE
    assert own_file(cache).read_text() == "mine" and "move it away" in capsys.readouterr().err


def test_show_explains_the_row_that_is_used(cache, judged, capsys):
    main(["tune", *TINY, "--budget", "1s"])
    capsys.readouterr()
    assert main(["show", "--op", "chunk_torch", "--shape", "T=64,HV=2,K=16,V=16"]) == PASS
    told = capsys.readouterr().out
    assert "the entry of this shape" in told and str(own_file(cache)) in told and "measured at T=64" in told
    assert main(["show", "--op", "chunk_torch", "--shape", "T=50,HV=2,K=16,V=16"]) == PASS
    assert "an entry of this bucket" in capsys.readouterr().out


def test_show_names_what_was_looked_for_and_the_command_that_would_make_it(cache, capsys):
    assert main(["show", "--op", "recurrent_torch", "--shape", "T=1,HV=32"]) == NOTHING
    told = capsys.readouterr().out
    assert "missing" in told and "python -m autotune tune --op recurrent_torch --tokens 1 --heads 32" in told


def test_show_says_that_nothing_is_looked_up(cache, monkeypatch, capsys):
    monkeypatch.setenv("KDA_TUNED", "0")
    tuned.forget()
    assert main(["show", "--op", "chunk_torch"]) == NOTHING
    assert "KDA_TUNED=0: no file is looked up" in capsys.readouterr().out


def test_show_says_what_has_changed_since(cache, judged, capsys):
    main(["tune", *TINY, "--budget", "1s"])
    path = own_file(cache)
    path.write_text(path.read_text().replace('"sources": "', '"sources": "x'))
    capsys.readouterr()
    main(["show", "--op", "chunk_torch", "--shape", "T=64,HV=2,K=16,V=16"])
    assert "stale: sources of the kernels changed" in capsys.readouterr().out


def test_show_names_a_corrupt_file(cache, capsys):
    own_file(cache).parent.mkdir(parents=True)
    own_file(cache).write_text("{")
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert main(["show", "--op", "chunk_torch"]) == NOTHING
    assert "not used" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["T=0", "Z=1", "dtype=int8", "packed=1"])
def test_show_refuses_what_is_no_shape(capsys, shape):
    assert main(["show", "--shape", shape]) == USAGE
    assert "--shape" in capsys.readouterr().err


def test_a_time_box_is_shared_out_and_what_is_left_goes_on(cache, judged, monkeypatch, capsys):
    both, box = ["tune", "--op", "all", *TINY[2:], "--trials", "2", "--minutes", "9"], SimpleNamespace(left=540.0)
    real = tune._tuned

    def slow(task, now, seconds):
        assert seconds == 540 / 2 - tune.AFTER
        box.left = 0.0
        return real(task, now, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_tuned", slow)
        patch.setattr(tune, "Box", lambda seconds: box)
        assert main(both) == UNFINISHED
    told = capsys.readouterr().out
    assert "chunk_torch at T=64" in told and "not begun: recurrent_torch at T=64" in told
    assert main(both) == PASS
    told = capsys.readouterr().out
    assert told.index("recurrent_torch at") < told.index("chunk_torch at"), "what has no entry comes first"


def test_of_several_shapes_the_least_bad_becomes_the_row_for_all_others(tmp_path):
    configs = [ChunkTorchConfig(chunk_size=x) for x in (16, 32, 64)]
    ratios = ((1.0, 0.5, 0.9), (1.0, 1.2, 0.95))
    searches = [SimpleNamespace(outcomes={x: measured(y) for x, y in zip(configs, own, strict=True)}) for own in ratios]
    assert study.least_worst(searches) == configs[2]
    searches[1].outcomes.pop(configs[2])
    assert study.least_worst(searches) == configs[0], "measured for all shapes"


def measured(x: float) -> Outcome:
    return Outcome("measured", 1.0, Spread(x, x, x, x, x, 9), Spread(x, x, x, x, x, 9))
