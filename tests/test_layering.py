"""Execute the drawing of the layers and the size budgets, so that a wrong arrow is a red test and not a review comment.

        kda_spec  <-  impls  <-  verify  <-  autotune          kimi_linear -> impls          reports -> (JSON files)
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layer:
    """Say what the files of one top-level package may import, and what they may not, at any depth."""

    ours: tuple[str, ...] = ()  # our own modules, with all below them
    banned: tuple[str, ...] = ()  # other people's packages


LAYERS = {
    "kda_spec": Layer(banned=("torch", "triton")),
    # Sizes, domains and costs, never a form: the judge and the judged share no mathematics.
    "impls": Layer(ours=("kda_spec.types", "kda_spec.costs")),
    "verify": Layer(ours=("kda_spec", "impls")),
    "autotune": Layer(ours=("kda_spec", "impls", "verify")),
    "kimi_linear": Layer(ours=("impls",)),
    "reports": Layer(),
}
IMPORTABLE_WITHOUT = {"kda_spec": ("torch", "triton"), "impls": ("triton",), "reports": ("triton",)}

FILE_LINES, TRITON_FILE_LINES, FUNCTION_LINES = 400, 700, 40
DRAWERS = ("utils.py", "common.py", "helpers.py")
VERSION_SUFFIX = re.compile(r"_(v\d+|new|old)$")

PACKAGES = [name for name in LAYERS if (ROOT / name).is_dir()]


@dataclass(frozen=True)
class Import:
    """One imported name, absolute, and where it stands."""

    path: Path
    line: int
    name: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.name}"

    def within(self, modules: tuple[str, ...]) -> bool:
        return any(f"{self.name}.".startswith(f"{module}.") for module in modules)


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def absolute(name: str, level: int, package: tuple[str, ...]) -> str:
    """Resolve a relative import (level leading dots) against the package of its file."""
    base = package[: len(package) - level + 1] if level else ()
    return ".".join((*base, name)).rstrip(".")


def imported_names(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute names that one node imports; `from a import b` is a.b."""
    match node:
        case ast.Import(names=names):
            # `import a.b` binds a, and with it everything that a has loaded.
            yield from (alias.name if alias.asname else alias.name.split(".")[0] for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = absolute(module or "", level, package)
            yield from (f"{base}.{alias.name}" for alias in names)
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            bare = name.lstrip(".")
            yield absolute(bare, len(name) - len(bare), package)


def imports(root: Path, folder: str) -> list[Import]:
    """List every import of every file under root/folder, those inside functions and by literal name included."""
    found = []

    def visit(node: ast.AST, path: Path, in_function: bool) -> None:
        for name in imported_names(node, path.parent.parts):
            found.append(Import(path, node.lineno, name, in_function))
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, path, in_function)

    for file in python_files(root, folder):
        visit(ast.parse(file.read_text()), file.relative_to(root), False)
    return found


def wrong_arrows(root: Path, folder: str) -> list[str]:
    """List the imports that the folder's layer does not allow; tests are never importable."""
    layer = LAYERS[folder]
    others = tuple(name for name in (*LAYERS, "tests") if name != folder)
    return [
        str(found)
        for found in imports(root, folder)
        if found.within(layer.banned) or (found.within(others) and not found.within(layer.ours))
    ]


def eager_triton(root: Path, folder: str) -> list[str]:
    """List the imports of triton that run when a file without triton in its name is imported."""
    return [
        f"{found} at module level"
        for found in imports(root, folder)
        if found.within(("triton",)) and not found.in_function and "triton" not in found.path.name
    ]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines behind the docstring: a public signature of 25 arguments, each explained, is no complexity."""
    first = function.body[1:2] if ast.get_docstring(function) else function.body[:1]
    return function.end_lineno - first[0].lineno + 1 if first else 0


def over_budget(root: Path, *folders: str) -> list[str]:
    """List the files and host functions that are longer than the budget."""
    found = []
    for path in python_files(root, *folders):
        name = path.relative_to(root)
        limit = TRITON_FILE_LINES if "triton" in path.name else FILE_LINES
        lines = len(path.read_text().splitlines())
        if lines > limit:
            found.append(f"{name}:1: {lines} lines, the budget is {limit}")
        for function in functions(path):
            lines = lines_of_code(function)
            if lines > FUNCTION_LINES and not is_kernel(function):
                where = f"{name}:{function.lineno}"
                found.append(f"{where}: {function.name} has {lines} lines, the budget is {FUNCTION_LINES}")
    return found


def poor_names(root: Path, *folders: str) -> list[str]:
    """List drawers (utils.py) and names that end in a version."""
    found = []
    for path in python_files(root, *folders):
        name = path.relative_to(root)
        if path.name in DRAWERS:
            found.append(f"{name}:1: a drawer, not a name")
        if VERSION_SUFFIX.search(path.stem):
            found.append(f"{name}:1: the file's name ends in a version")
        for function in functions(path):
            if VERSION_SUFFIX.search(function.name):
                found.append(f"{name}:{function.lineno}: {function.name} ends in a version")
    return found


def packages_in_tree(root: Path) -> set[str]:
    """Name the top-level packages and every folder below them that holds Python files."""
    top = [path.parent.name for path in root.glob("*/__init__.py")]
    folders = {path.parent.relative_to(root) for path in python_files(root, *top)}
    return {".".join(folder.parts) for folder in folders}


def expect_none(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package):
    expect_none(wrong_arrows(ROOT, package))


@pytest.mark.parametrize("package", PACKAGES)
def test_only_triton_files_need_triton_to_be_imported(package):
    expect_none(eager_triton(ROOT, package))


def test_files_and_functions_keep_their_budgets():
    expect_none(over_budget(ROOT, *PACKAGES, "tests"))


def test_names_are_neither_drawers_nor_versions():
    expect_none(poor_names(ROOT, *PACKAGES, "tests"))


def test_every_package_is_in_the_rules_and_in_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tree = packages_in_tree(ROOT)
    expect_none([f"pyproject.toml:1: does not list {name}" for name in sorted(tree - set(listed))])
    expect_none([f"pyproject.toml:1: lists {name}, which is not there" for name in sorted(set(listed) - tree)])
    expect_none([f"{name}: has no row in LAYERS" for name in sorted(tree) if name.split(".")[0] not in LAYERS])


def test_test_folders_hold_no_init_file():
    expect_none([str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py")])


@pytest.mark.parametrize("package", [name for name in PACKAGES if name in IMPORTABLE_WITHOUT])
def test_a_plain_checkout_is_importable_without(package):
    blocked = IMPORTABLE_WITHOUT[package]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"  # None there makes every import of it fail
        f"import {package}; print({package}.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == ROOT / package / "__init__.py"


def plant(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


PLANTED_ARROWS = [
    ("kda_spec/a.py", "import torch", "torch"),
    ("kda_spec/a.py", "def f():\n    from impls import ops", "impls.ops"),
    ("impls/a.py", "from kda_spec.recurrent import kda", "kda_spec.recurrent.kda"),
    ("impls/a.py", "from kda_spec import gates", "kda_spec.gates"),
    ("impls/a.py", "import kda_spec.types", "kda_spec"),
    ("impls/peers/a.py", "from ...kda_spec import chunkwise", "kda_spec.chunkwise"),
    ("impls/a.py", "import importlib\nimportlib.import_module('verify.runner')", "verify.runner"),
    ("impls/__init__.py", "from importlib import import_module\nimport_module('..verify', __name__)", "verify"),
    ("verify/a.py", "import autotune", "autotune"),
    ("verify/a.py", "from tests.conftest import settings", "tests.conftest.settings"),
    ("kimi_linear/a.py", "from kda_spec import costs", "kda_spec.costs"),
    ("reports/a.py", "class A:\n    def f(self):\n        __import__('impls')", "impls"),
]


@pytest.mark.parametrize(("file", "source", "name"), PLANTED_ARROWS)
def test_a_planted_arrow_is_found(tmp_path, file, source, name):
    plant(tmp_path, file, source)
    line = len(source.splitlines())
    assert wrong_arrows(tmp_path, file.split("/")[0]) == [f"{file}:{line}: imports {name}"]


ALLOWED_ARROWS = [
    ("kda_spec/a.py", "import numpy as np\nfrom . import types\nfrom .recurrent import kda"),
    ("impls/a.py", "import torch\nfrom kda_spec.types import Sizes\nfrom kda_spec import costs"),
    ("impls/peers/a.py", "from .. import ops\nfrom impls.ops import kda"),
    ("verify/a.py", "from kda_spec import recurrent\nimport impls\nimport verify_elsewhere"),
    ("autotune/a.py", "import kda_spec, impls, verify"),
    ("kimi_linear/a.py", "from impls import kda"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED_ARROWS)
def test_an_allowed_arrow_is_not_reported(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert wrong_arrows(tmp_path, file.split("/")[0]) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("impls/table.py", "import triton.language as tl", 1),
        ("impls/table.py", "try:\n    from triton import jit\nexcept ImportError:\n    pass", 1),
        ("impls/table.py", "def load():\n    import triton", 0),
        ("impls/chunk_triton.py", "import triton", 0),
    ],
)
def test_a_planted_eager_triton_is_found(tmp_path, file, source, found):
    plant(tmp_path, file, source)
    assert len(eager_triton(tmp_path, "impls")) == found


@pytest.mark.parametrize(
    ("file", "source", "judge", "found"),
    [
        ("impls/a.py", "x = 1\n" * 401, over_budget, "impls/a.py:1: 401 lines"),
        ("impls/a.py", "\ndef f():\n" + "    x = 1\n" * 41, over_budget, "impls/a.py:2: f has 41 lines"),
        ("impls/a_triton.py", "x = 1\n" * 701, over_budget, "impls/a_triton.py:1: 701 lines"),
        ("impls/utils.py", "", poor_names, "impls/utils.py:1: a drawer"),
        ("impls/chunk_v2.py", "", poor_names, "impls/chunk_v2.py:1: the file's name"),
        ("impls/a.py", "def solve_new(): ...", poor_names, "impls/a.py:1: solve_new"),
    ],
)
def test_a_planted_excess_is_found(tmp_path, file, source, judge, found):
    plant(tmp_path, file, source)
    [violation] = judge(tmp_path, "impls")
    assert violation.startswith(found)


def test_a_kernel_may_be_longer_than_a_host_function(tmp_path):
    plant(tmp_path, "impls/a_triton.py", "@triton.jit\ndef f():\n" + "    x = 1\n" * 99)
    assert over_budget(tmp_path, "impls") == []


def test_a_planted_package_is_found(tmp_path):
    for file in ("impls/__init__.py", "impls/peers/a.py", "impls/tuned/h200.json", "environment/lib/a.py"):
        plant(tmp_path, file, "")
    assert packages_in_tree(tmp_path) == {"impls", "impls.peers"}
