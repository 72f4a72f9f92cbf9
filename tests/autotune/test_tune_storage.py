"""What keeps a study: files and servers are opened, anything else is refused in a line that shows no password."""

from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution

from autotune import judge, storage
from autotune.__main__ import main
from autotune.arguments import implementation_of, problem_of
from autotune.ledger import Ledger
from autotune.outcomes import PASS, USAGE, UsageError
from autotune.replay import Recorded
from autotune.search import Search
from autotune.space import Setting, space_of

TABLE = Path(__file__).with_name("trials-chunk-torch-4096.json")
SETTING = Setting(problem_of("T=4096,H=16", "float32"))
SPACE = space_of(implementation_of("chunk_torch"), SETTING, Recorded(TABLE).fixed)

SECRET = "hunter2"
REFUSED = {
    "nonsense": "expected a URL",
    "": "expected a URL",
    f"postgres://me:{SECRET}@host/db": "no database is called 'postgres'",
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db": "the database cannot be used",
    f"postgresql+psycopg://me:x@{SECRET}@127.0.0.1:1/db": "%40",
    f"postgresql+psycopg://me:{SECRET}@host:port/db": "expected a URL",
    f"postgresql+psycopg://me:{SECRET}@[::1/db": "expected a URL",
    f"postgresql+psycopg:///db?host=/nowhere&password={SECRET}": "the database cannot be used",
    f"oracle://me:{SECRET}@host/db": "driver",
    f"redis://:{SECRET}@127.0.0.1:1/0": "the server cannot be used",
    f"redis://:x/{SECRET}@host/0": "expected a URL",
    "sqlite:////nowhere/at/all.db": "unable to open",
    "journal://relative/file": "three slashes",
    "journal:///": "three slashes",
}
"""URL -> a word of the refusal."""


@pytest.mark.parametrize("url", REFUSED)
def test_what_cannot_be_opened_is_one_line_without_the_password(tmp_path, url):
    if url.startswith("redis") and "127" in url:
        pytest.importorskip("redis")
    if url.startswith("postgresql") and REFUSED[url] == "the database cannot be used":
        pytest.importorskip("psycopg")
    with pytest.raises(UsageError) as refused:
        storage.opened(url, tmp_path / "x.journal")
    said = str(refused.value)
    assert REFUSED[url] in said and said.startswith("--storage") and len(said.splitlines()) == 1
    assert SECRET not in said and not (tmp_path / "x.journal").exists()


def test_a_journal_may_be_named(tmp_path):
    storage.opened(f"journal://{tmp_path}/deep/x.journal", tmp_path / "other")
    assert (tmp_path / "deep" / "x.journal").exists() and not (tmp_path / "other").exists()


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="cannot be used"):
        storage.opened(f"journal://{tmp_path}/mine", tmp_path / "x.journal")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_half_line_is_cut_off_before_the_next_is_written(tmp_path):
    path, fields = tmp_path / "x.journal", {"a": IntDistribution(0, 3)}
    Ledger(storage.opened(None, path), "study", fields).tell({"a": 1}, 0.5, "first", violated=False)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    Ledger(storage.opened(None, path), "study", fields).tell({"a": 2}, 0.5, "second", violated=False)
    assert path.read_bytes().startswith(whole + b'{"op_code"')
    assert Ledger(storage.opened(None, path), "study", fields).known == {(1,): "first", (2,): "second"}


def tuned_by(folder, monkeypatch, *arguments: str) -> int:
    passed = {"code": 0, "outcome": "passed", "counts": {}, "failed": [], "reason": None}
    monkeypatch.setattr(judge, "verified_config", lambda *asked: passed)
    return main(["tune", "--replay", str(TABLE), "--out", str(folder), *arguments])


def test_a_study_goes_on_wherever_its_storage_is_reached(tmp_path, monkeypatch, capsys):
    shared = "--storage", f"journal://{tmp_path}/x.journal"
    for folder, known, more in (("a", 0, ()), ("b", 6, ()), ("c", 0, ("--fresh",))):
        assert tuned_by(tmp_path / folder, monkeypatch, *shared, "--trials", "6", *more) == PASS
        assert f"{known} known from earlier runs" in capsys.readouterr().out


def test_a_study_that_somebody_works_on_is_not_forgotten(tmp_path, monkeypatch, capsys):
    path, url = tmp_path / "x.journal", f"journal://{tmp_path}/x.journal"
    assert tuned_by(tmp_path, monkeypatch, "--storage", url, "--trials", "2") == PASS
    [study] = optuna.get_all_study_names(storage.opened(None, path))
    other = Search(SPACE, path, study)
    assert other.next(0.0) and tuned_by(tmp_path, monkeypatch, "--storage", url, "--fresh") == USAGE
    assert "is measuring a trial" in capsys.readouterr().err


def test_what_is_no_storage_is_a_usage_error(tmp_path, monkeypatch, capsys):
    assert tuned_by(tmp_path, monkeypatch, "--storage", "nonsense") == USAGE
    assert capsys.readouterr().err.startswith("python -m autotune: --storage nonsense: expected")


def test_workers_that_share_sqlite_are_warned(tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    first = Search(SPACE, tmp_path / "unused", "study", url=url)
    assert first.next(0.0)
    with pytest.warns(UserWarning, match="SQLite run trials twice"):
        Search(SPACE, tmp_path / "unused", "study", url=url)
