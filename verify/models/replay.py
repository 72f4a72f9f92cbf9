"""Failing cases of models: a record that --replay reads, and beside it the checkpoint and the texts for any loader."""

import json
import re
from pathlib import Path

import jsonschema

from verify.models.checkpoints import materialise
from verify.models.properties import PROPERTIES
from verify.models.recipes import from_json
from verify.records import DEFINITIONS, SCHEMA, versions


def save(folder: Path, failure: dict) -> Path:
    """Write a failure record as FOLDER/<target>-<property>-<hash>.json, and a folder of that name with its checkpoint.

    The folder holds config.json, shards and index as released, and texts.json: the ids of prompts and tails.
    """
    stem = re.sub(r"[^\w.-]+", "_", f"{failure['target']}-{failure['property']}-{failure['inputs'][:6]}")
    path, checkpoint = folder / f"{stem}.json", materialise(from_json(failure["recipe"]))
    path.with_suffix("").mkdir(parents=True, exist_ok=True)
    checkpoint.write(path.with_suffix(""))
    texts = {"ids": [text.tolist() for text in checkpoint.texts], "tail": failure["recipe"]["tail"]}
    (path.with_suffix("") / "texts.json").write_text(json.dumps(texts) + "\n")
    path.write_text(json.dumps({**failure, "versions": versions()}, indent=2) + "\n")
    return path


def load(path: Path) -> dict:
    """Read a failure record of a model. Raises ValueError that says what is wrong with it."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--replay {path}: not a failure file: {error}") from error
    if problem := _problem(failure):
        raise ValueError(f"--replay {path}: {problem}")
    made = materialise(from_json(failure["recipe"])).digest()
    if made != failure["inputs"]:
        recorded = f"hash {made}, recorded {failure['inputs']}"
        raise ValueError(f"--replay {path}: its recipe now makes another checkpoint ({recorded})")
    return failure


def _problem(failure: object) -> str | None:
    if not isinstance(failure, dict) or failure.get("schema") != SCHEMA or failure.get("kind") != "failure":
        return f"expected a failure record of schema version {SCHEMA}"
    of_kind = {"$ref": "#/$defs/failure", "$defs": DEFINITIONS["$defs"]}  # its errors name fields, the whole's do not
    for schema in (of_kind, DEFINITIONS):
        if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(failure)):
            return f"not a failure record: {error.json_path}: {error.message}"
    if "layers" not in failure["recipe"] or failure["property"] not in {p.name for p in PROPERTIES}:
        return "expected the failure of a property of a model"
    try:
        from_json(failure["recipe"])
    except ValueError as error:
        return str(error)
    return None
