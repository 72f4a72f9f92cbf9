"""Where figures come from: what a device is called, what counts as the same sources, what is known without git."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from autotune import provenance, store
from impls.devices import slug


def valid_device(described: dict) -> None:
    schema = store.DEFINITIONS["$defs"]["identity"]["properties"]["device"]
    store.Draft202012Validator(schema).validate(described)


def test_a_cpu_is_described():
    described = provenance.described("cpu")
    valid_device(described)
    assert described["name"] and described["threads"] == torch.get_num_threads() and described["driver"] is None


@pytest.mark.parametrize(("answer", "driver"), [("580.159.04\n580.159.04\n", "580.159.04"), (None, None)])
def test_a_gpu_is_described_with_its_driver(monkeypatch, answer, driver):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def run(command, **options):
        if answer is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    described = provenance.described("cuda:0")
    valid_device(described)
    assert (described["name"], described["capability"], described["driver"]) == ("NVIDIA H200", "9.0", driver)


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", "nvidia-h200"), ("Intel(R) Xeon(R) @ 2.1GHz", "intel-r-xeon-r-2-1ghz")]
)
def test_a_device_has_a_name_for_files(name, expected):
    assert slug(name) == expected


def test_versions_name_what_is_missing_too():
    found = provenance.versions()
    assert torch.__version__.startswith(found["torch"])  # a build for CUDA says so in one of them only
    assert {"python", "triton", "fla-core", "flash_kda"} <= found.keys()


@pytest.fixture
def root(tmp_path):
    """Copy what decides figures, and what does not."""
    for package in ("impls", "autotune"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(provenance.ROOT / package, tmp_path / package, ignore=skip)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("impls/chunk_torch.py", True),
        ("impls/peers/fla.py", True),
        ("impls/tuned.json", True),
        ("autotune/timing.py", True),
        ("autotune/display.py", False),
        ("results.json", False),
    ],
)
def test_sources_change_with_what_decides_figures_and_with_nothing_else(root, file, counts):
    before = provenance.sources(root)
    with (root / file).open("a") as stream:
        stream.write("\n")
    assert (provenance.sources(root) != before) is counts


def test_a_file_that_moves_changes_the_sources(root):
    before = provenance.sources(root)
    (root / "impls" / "chunk_torch.py").rename(root / "impls" / "chunks_torch.py")
    assert provenance.sources(root) != before


def test_only_what_changes_kernels_is_kept_of_the_environment(monkeypatch):
    for name, x in {"FLA_CACHE_MODE": "full", "TRITON_CACHE_DIR": "/home/me", "TOKEN": "secret"}.items():
        monkeypatch.setenv(name, x)
    kept = provenance.environment()
    assert kept["FLA_CACHE_MODE"] == "full" and not {"TRITON_CACHE_DIR", "TOKEN"} & kept.keys()


def test_outside_a_repository_there_is_no_commit(tmp_path):
    assert provenance.git(tmp_path) is None


def test_in_a_repository_the_commit_and_its_changes_are_known(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    clean = provenance.git(tmp_path)
    (tmp_path / "impls").mkdir()
    (tmp_path / "impls" / "kernel.py").write_text("")
    assert len(clean["commit"]) == 40 and clean["changed"] is False
    assert provenance.git(tmp_path) == {**clean, "changed": True}
