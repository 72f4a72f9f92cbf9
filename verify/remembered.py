"""Cases that failed before, kept in a Hypothesis example database: a folder, or Redis for many machines.

Kept are recipes, not Hypothesis's own choices: they outlive its versions, and other strategies. What passes again is
forgotten.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from verify import captured
from verify.choice import UsageError
from verify.recipes import from_json

MOST = 50
"""Cases of a target that are recalled."""


def opened(url: str) -> ExampleDatabase:
    """Open redis://HOST:PORT/N, or a folder. Raises UsageError where nobody answers."""
    if "://" not in url:
        if Path(url).exists() and not Path(url).is_dir():
            raise UsageError(f"--database {url}: expected a folder, or redis://HOST:PORT/N")
        return DirectoryBasedExampleDatabase(url)
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise UsageError(f"--database must be redis://HOST:PORT/N or a folder, got {url}")
    try:
        import redis
        from hypothesis.extra.redis import RedisExampleDatabase
    except ImportError as error:
        raise UsageError(f"--database {url}: {error}; kda-forge[fleet] brings redis") from error
    try:
        client = redis.Redis.from_url(url, socket_timeout=10.0, socket_connect_timeout=10.0)
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise UsageError(f"--database {url.rpartition('@')[2]}: {error}") from error
    return RedisExampleDatabase(client, key_prefix=b"kda-forge:")


def _key(target: str) -> bytes:
    return f"verify {target}".encode()


def recalled(database: ExampleDatabase, target: str) -> tuple[dict, ...]:
    """Return the recipes of a target that failed before; what is no recipe of this version is left alone."""
    found = []
    for value in sorted(database.fetch(_key(target)))[:MOST]:
        try:
            recipe = from_json(json.loads(value))
            if recipe.captured:
                captured.read(recipe.captured)  # a file that is gone cannot be judged on
            found.append(recipe.to_json())
        except (ValueError, TypeError):
            continue
    return tuple(found)


def remember(database: ExampleDatabase, target: str, failures: Iterable[dict], passed: Iterable[dict]) -> None:
    """Keep the recipes that fail, and forget those that pass now."""
    for recipe in passed:
        database.delete(_key(target), _value(recipe))
    for failure in failures:
        database.save(_key(target), _value(failure["recipe"]))


def _value(recipe: dict) -> bytes:
    return json.dumps(recipe, sort_keys=True).encode()
