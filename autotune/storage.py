"""Open what keeps a study: a journal on a file unless told otherwise, or whatever a URL names.

postgresql+psycopg://USER@HOST/DB, and any other database that SQLAlchemy has a driver for; redis://HOST:6379/0 and
journal:///FOLDER/FILE as journals. Workers on one machine share a file, which Optuna guards by a lock; workers on many
machines a server. SQLite loses against both: of 268 trials that four workers shared on it 24 ran twice.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError

from autotune.outcomes import UsageError

EXPECTED = "expected a URL such as postgresql+psycopg://USER:PASSWORD@HOST/DB, redis://HOST:6379/0, journal:///DIR/FILE"
REDIS = ("redis", "rediss", "unix")
SERVERS = ("postgresql", "mysql", "mariadb")
BEGINNING = b'{"op_code"'
"""Of every line of a journal."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AssertionError)
"""What Optuna raises for a file that is no journal."""
PREFIX = "kda-forge"
"""Of our keys on a Redis server."""
CONNECTING = 10
"""Seconds that a server has to answer; the system's own patience is minutes."""
TOGETHER = 16
"""Attempts to make the tables: of workers that start together on an empty database one succeeds at a time."""


class Mending(JournalFileSymlinkLock):
    """The lock of a journal: who takes it finds whole lines only.

    A process that is killed while it writes leaves a line without an end, and the next one would be glued to it.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def acquire(self) -> bool:
        """Wait for the lock, take it, and cut off what was not written to its end."""
        super().acquire()
        try:
            _mend(self.path)
        except BaseException:
            self.release()
            raise
        return True


class Unpickled(BaseJournalBackend):
    """A journal without snapshots: Optuna pickles those, and what lies on a server is data from strangers."""

    def __init__(self, journal: BaseJournalBackend, lost: type[Exception]):
        self.journal, self.lost = journal, lost

    def read_logs(self, log_number_from: int) -> Iterator[dict]:
        """Yield the entries from that number on; ConnectionError where the server does not answer."""
        with self._reached():
            yield from self.journal.read_logs(log_number_from)

    def append_logs(self, logs: list[dict]) -> None:
        """Append entries; ConnectionError where the server does not answer."""
        with self._reached():
            self.journal.append_logs(logs)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except self.lost as error:
            raise ConnectionError(str(error)) from error


def opened(url: str | None, path: Path) -> BaseStorage:
    """Open the storage that a URL names, the journal at `path` where it is None.

    Raises UsageError, which never shows a password, for what is no such URL, a driver that is not installed, a server
    that does not answer or refuses, and a file that is none.
    """
    if url is None:
        return _journal(path)
    try:
        return _named(url)
    except UsageError as error:
        raise UsageError(f"--storage {hidden(url)}: {_hidden_too(str(error), url)}") from None


def shared_badly(url: str | None) -> bool:
    """Tell whether trials run twice when several workers share the storage."""
    return url is not None and url.startswith("sqlite")


def hidden(url: str) -> str:
    """Return a URL, or what was meant for one, with its passwords hidden."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//([^:/@]*):.*@", r"//\1:***@", url, flags=re.DOTALL))


def _hidden_too(text: str, url: str) -> str:
    """Hide the passwords of a URL in a message that a driver wrote about it."""
    found = re.findall(r"//[^:/@]*:(.*)@|password=([^&]*)", url, flags=re.DOTALL)
    for password in {x for pair in found for part in pair if part for x in (part, unquote(part))}:
        text = re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", "***", text)
    return text


def _named(url: str) -> BaseStorage:
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        raise UsageError(EXPECTED) from None
    if re.search(r"//[^/?]*@[^/?]*@", url):
        raise UsageError("an @ in a user's name or password is written %40")
    if scheme == "journal":
        return _journal(_file(url))
    return _redis(url) if scheme in REDIS else _database(url)


def _file(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc or not parts.path.strip("/"):
        raise UsageError("expected journal:///FOLDER/FILE, an absolute path behind three slashes")
    return Path(unquote(parts.path))


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (line := path.open("rb").readline()) and not line.startswith(BEGINNING):
            raise ValueError("no journal of Optuna's")
        return JournalStorage(JournalFileBackend(str(path), Mending(path)))
    except UNREADABLE as error:
        raise UsageError(f"the trials in {path} cannot be used: {error!r}; --fresh forgets them") from error


def _redis(url: str) -> BaseStorage:
    try:
        import redis
    except ImportError as error:
        raise UsageError(f"{error}; kda-forge[fleet] brings it") from error
    if "socket_connect_timeout" not in url:
        url += f"{'&' if '?' in url else '?'}socket_connect_timeout={CONNECTING}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return JournalStorage(Unpickled(JournalRedisBackend(url, prefix=PREFIX), redis.RedisError))
    except OSError as error:
        raise UsageError(f"the server cannot be used: {_first_line(error)}") from error
    except ValueError:  # its text may hold a piece of the password
        raise UsageError(EXPECTED) from None


@cache
def _database(url: str) -> BaseStorage:
    """Open a database, once for all studies of a process: a server has connections for a hundred or so."""
    try:
        kind = make_url(url).get_backend_name()
        make_url(url).get_dialect()
    except NoSuchModuleError:
        raise UsageError(f"no database is called {make_url(url).drivername!r}; {EXPECTED}") from None
    except (ArgumentError, ValueError):
        raise UsageError(EXPECTED) from None
    options = {"pool_pre_ping": True}
    if kind in SERVERS:
        options["connect_args"] = {"connect_timeout": CONNECTING}
    for _ in range(TOGETHER - 1):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except (IntegrityError, ProgrammingError):
            continue  # another worker made the same table in this moment
        except Exception as error:
            raise _refusal(error) from None
    try:
        return RDBStorage(url, engine_kwargs=options)
    except Exception as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> UsageError:
    """Say why a database cannot be used; any driver raises what it likes."""
    if isinstance(error, ImportError):
        return UsageError(f"{error.__cause__ or error}: the database's driver; kda-forge[fleet] brings PostgreSQL's")
    cause = getattr(error, "orig", None) or error.__cause__ or error
    return UsageError(f"the database cannot be used: {_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _mend(path: Path) -> None:
    """Cut off a last line without an end."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
