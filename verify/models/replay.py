"""Failing cases of models: a record that --replay reads, and beside it the checkpoint and the texts for any loader."""

import json
import re
from pathlib import Path

from verify.models.checkpoints import materialise
from verify.models.properties import PROPERTIES
from verify.models.recipes import from_json
from verify.records import versions
from verify.replay import checked


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
    return checked(path, _problem, lambda recipe: materialise(from_json(recipe)).digest())


def _problem(failure: dict) -> str | None:
    if "layers" not in failure["recipe"] or failure["property"] not in {p.name for p in PROPERTIES}:
        return "expected the failure of a property of a model"
    try:
        from_json(failure["recipe"])
    except ValueError as error:
        return str(error)
    return None
