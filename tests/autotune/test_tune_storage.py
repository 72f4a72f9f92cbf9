"""What keeps a study: files and servers are opened, anything else is refused in a line that shows no password."""

import pytest
from optuna.distributions import IntDistribution

from autotune import storage
from autotune.ledger import Ledger
from autotune.outcomes import UsageError

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
