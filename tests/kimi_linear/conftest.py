"""What the tests of the model share: one tiny checkpoint in float32, read once, and how results are compared."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from kimi_linear import KimiLinear, hf, preset, write_random  # noqa: E402


@pytest.fixture(scope="session")
def config():
    return preset("tiny")


@pytest.fixture(scope="session")
def folder(config, tmp_path_factory):
    """A checkpoint of several shards; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random(config, folder, seed=1, dtype=torch.float32, shard_bytes=10**6)
    return folder


@pytest.fixture(scope="session")
def model(folder):
    return KimiLinear.from_pretrained(folder)


@pytest.fixture
def ids():
    """Return a function: ids [B, T] of a seed."""
    return lambda B, T, seed=0: torch.randint(512, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def differs():
    """Return a function: the relative difference of two results, in norm."""
    return lambda x, y: float((x.double() - y.double()).norm() / y.double().norm())


@pytest.fixture(scope="module")
def modules():
    """Return the modules of transformers' families with KDA, with the library's torch functions."""
    import hf_models  # not every test of the model has transformers

    with hf_models.imported() as modules:
        yield modules


@pytest.fixture
def enabled_by_none():
    """Take our ops out of transformers behind a test, whatever it enabled."""
    yield
    hf.disable()
