"""The pages do what they say: every command of theirs is run, in the order of its page, and every example.

A page is a session in one folder. What takes long is run with shorter times and smaller sizes, and on a CPU where a GPU
is named; what takes long even so belongs to the second tier. The first one parses everything and runs the rest.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
TEXTS = [*PAGES, ROOT / "README.md"]
SHORTER = [
    (r"--device cuda:0", "--device cpu"),
    (r"--profile (smoke|ci)", "--max-examples 2 --property reference_forward,causality"),
    (r"(tune .*)--budget \S+", r"\1--budget 1s"),
    (r"(static .*)--budget \S+", r"\1--budget 20s"),
    (r"--minutes \S+", "--minutes 0.05"),
    (r"--tokens \d+ --heads \d+", "--tokens 128 --heads 2 --fix compile=false --trials 2"),
    (r"(yardstick .*)--heads 64", r"\1--heads 1 --tokens 32,64"),
    (r"static (.*)T=8192,H=64", r"static \1T=64,H=1 --fix chunk_size=16"),
    (r"--context 1024,16384", "--context 16,32 --steps 1 --rounds 1"),
    (r"--context 1048576", "--context 8192 --steps 1 --rounds 1"),
    (r"--cache-gib 2.2", "--cache-gib 0.02"),
]
LONG = re.compile(
    r"autotune (tune|static|merge|export|bench|yardstick)|self-test|verify kimi_linear|interpret|collect|--contract"
    r"|--workers|--shard|verify (merge|diff)|--junit"
)
OURS = r"(?:verify|autotune|kimi_linear|reports)"
OVER = {3, 7}
"""Exit codes that say that the time was over, before anything was compiled or done: it was shortened here."""


@dataclass(frozen=True)
class Step:
    """A command with the exit code that its page names, or a block of Python."""

    text: str
    code: int = 0
    python: bool = False

    @property
    def short(self) -> str:
        """Return the command as it is run here."""
        text = self.text
        for pattern, by in SHORTER:
            text = re.sub(pattern, by, text)
        return text


def session(page: Path) -> list[Step]:
    """Return the steps of a page, in its order."""
    steps = []
    for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), re.M | re.S):
        if kind == "python":
            steps.append(Step(block, python=True))
            continue
        for line in block.splitlines():
            text, _, code = line.partition("  # exits ")
            steps.append(Step(text, int(code or 0)))
    return steps


def commands(text: Path) -> list[str]:
    """Return the commands of a text that are ours, those in indented and in fenced blocks."""
    line = rf"^(?:    )?(?:\S+=\S+ )*(?:\.venv/bin/)?python -m ({OURS}\b.*)$"
    return [re.split(r"  +", found)[0] for found in re.findall(line, text.read_text(), re.M)]


def words(text: str) -> list[str]:
    """Return the words of a command as a shell expands them."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True)
    return printed.stdout.split("\0")[:-1]


def run(step: Step) -> int:
    """Run a command, ours in this process: its imports are paid once; returns the exit code."""
    asked = re.match(r"python -m (\w+) ?(.*)", step.short)
    if not asked or " static " in step.short:  # Triton compiles where its interpreter was not asked for only
        environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(["bash", "-c", step.short], env=environment).returncode
    try:
        return importlib.import_module(f"{asked[1]}.__main__").main(words(asked[2]))
    except SystemExit as ended:
        return ended.code


def save_or_run(block: str) -> None:
    """Write a block that begins with the name of its file there, or run it."""
    if name := re.match(r"# (\w+\.py)\n", block):
        Path(name[1]).write_text(block)
    else:
        exec(compile(block, "a block of the page", "exec"), {"__name__": "page"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the page's own, from which this checkout is found, with a user's cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    for name in ("tests", "impls"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def follow(page: Path, wanted) -> None:
    for step in session(page):
        if step.python:
            save_or_run(step.text)
        elif wanted(step.text):
            expected = {step.code} | (OVER if "--minutes" in step.text or "--budget" in step.text else set())
            assert run(step) in expected, step.short


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page, folder):
    follow(page, lambda command: not LONG.search(command))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_all_that_it_says(page, folder):
    follow(page, lambda command: True)


def parsed(package: str, arguments: list[str]) -> None:
    """Parse a command line of ours; SystemExit where it is none."""
    module = importlib.import_module(f"{package}.__main__")
    getattr(module, "parser", lambda: None)
    module.parser().parse_args(arguments)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_every_command_is_one(text):
    for command in commands(text):
        package, *arguments = words(command)
        module = importlib.import_module(f"{package}.__main__")
        if package == "verify" and arguments[0] in module.COMMANDS:
            continue  # these parse when they run
        own = arguments and getattr(module, f"{arguments[0]}_parser", None)
        try:
            own().parse_args(arguments[1:]) if own else module.parser().parse_args(arguments)
        except SystemExit as ended:
            assert ended.code == 0, command


def test_there_are_commands():
    assert sum(len(commands(text)) for text in TEXTS) > 60


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_every_file_and_page_that_is_named_is_there(text):
    written = text.read_text()
    named = re.findall(rf"`((?:{OURS}|kda_spec|impls|tests|docs|results)/[\w./-]*)`", written)
    linked = [x for x in re.findall(r"\]\(([^)#]+)\)", written) if "://" not in x]
    images = re.findall(r'(?:src|srcset)="([^"]+)"', written)
    missing = [x for x in named if not (ROOT / x).exists() and "DEVICE" not in x]
    missing += [x for x in (*linked, *images) if not (text.parent / x).exists()]
    assert not missing


UNHEARD = {
    "autotune": "space chunk_torch --json",
    "reports": "claims results",
    "kimi_linear": "inspect --preset tiny --json",
}


@pytest.mark.parametrize("package", UNHEARD)
def test_who_reads_no_further_gets_no_traceback(package):
    """As `| head` does: the pipe is closed before anything is written. rich ends with 1 then."""
    read, write = os.pipe()
    os.close(read)
    asked = [sys.executable, "-m", package, *UNHEARD[package].split()]
    ended = subprocess.run(asked, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode in (0, 1), ended.stderr) == (True, "")
