"""Every need that docs/engines.md lists is held by tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`tests/" in line]
HELD = [(row[0], *held) for row in ROWS for held in re.findall(r"`(tests/\S+\.py)::(\w+)`", row[-1])]


@pytest.mark.parametrize(("need", "file", "name"), HELD)
def test_the_test_that_holds_a_need_exists(need, file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_need_has_three_columns_and_a_test_of_its_own():
    assert all(len(row) == 3 for row in ROWS)
    assert len({need for need, *_ in HELD}) == len(ROWS) == PAGE.count("\n| ") - 1  # the head of the table
    assert len({held[1:] for held in HELD}) == len(HELD)


@pytest.mark.parametrize("need", ["V-first", "Paged pools", "Intermediate states", "Workspace-free launches"])
def test_what_was_asked_for_is_listed(need):
    assert any(need in row[0] for row in ROWS)
