"""Ranks that share a model: the logits are those of one process, and each reads and keeps its own part."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
import torch
from ranks import LIMIT, ROOT, done, port, run
from safetensors.torch import load_file, save_file

from kimi_linear import Checkpoint, ConfigError, KimiLinear, preset, write_random
from kimi_linear.commands.init import write_tokenizer
from kimi_linear.layout import stored
from kimi_linear.parallel import JobError, joined
from kimi_linear.share import Share

TINY = preset("tiny")
MODELS = {
    "tiny": TINY,
    "every option": replace(
        TINY, full_rank_gate=True, full_rank_forget=True, shared_experts=2, q_lora_rank=24, expert_groups=2,
        top_groups=1, biased_router_weights=True, lower_bound=-5.0, dense_layers=2,
    ),
    "a decay per head, no shared expert": replace(TINY, gate="head", shared_experts=0, dense_layers=0),
}  # fmt: skip
PROMPTS = [torch.randint(512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (150, 7)]
STEPS = [[5, 6], [7, 8], [9, 500], [10, 11], [12, 13]]
RANK = """
import os, sys, torch
from kimi_linear.__main__ import end
from kimi_linear.parallel import joined, load
from test_parallel_model import logits
torch.set_num_threads(1)
with joined(timeout=120) as job:
    for folder in sys.argv[1:]:
        model = load(folder, job)
        found, cache = logits(model)
        sizes = [list(x.shape) for x in cache.live.tensors()]
        torch.save((found, sizes), f"{folder}/rank{job.share.rank}.pt")
end(0)
"""


def logits(model: KimiLinear):
    """Return all logits behind ragged prompts, read in two passes, and behind each of several steps; and the cache."""
    cache = model.cache(2, 200)
    found = model.prefill(PROMPTS, cache, logits="all", chunk=100)
    return [*found, *(model.decode(ids, cache) for ids in STEPS)], cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, folder in folders.items():
        write_random(MODELS[name], folder, seed=3, dtype=torch.float32, shard_bytes=10**6)
        write_tokenizer(MODELS[name], folder)
    return folders


@pytest.fixture(scope="module")
def told(folders):
    """Return what two ranks make of every model."""
    done(run(["-c", RANK, *map(str, folders.values())]))
    return {name: [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_have_the_logits_of_one_process(told, folders, name):
    with torch.no_grad():
        alone, _ = logits(KimiLinear.from_pretrained(folders[name]))
    (first, _), (second, _) = told[name]
    assert len(first) == len(PROMPTS) + len(STEPS)
    for ours, others, expected in zip(first, second, alone, strict=True):
        assert torch.equal(ours, others), "ranks choose by the same bits"
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_caches_hold_the_states_of_a_ranks_own_heads(told, name):
    config = MODELS[name]
    H, K, kda = config.kda_heads // 2, config.kda_head_dim, config.count("kda")
    for _, sizes in told[name]:
        assert sizes == [[2, H, K, K]] * kda + [[2, config.conv_size - 1, 3 * H * K]] * kda


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_the_bytes_of_its_share_and_no_others(folders, name, ranks, tmp_path):
    read, config = [], MODELS[name]
    for rank in range(ranks):
        share, counted = Share(rank, ranks), []
        expected = state(Checkpoint(folders[name]).model(share=share, progress=lambda *x: counted.append(x)))  # noqa: B023
        whole = {each.name: each.shape for each in stored(config)}
        own = {each.name: each.shape for each in stored(config, share)}
        assert counted[-1] == (4 * sum(map(prod, own.values())),) * 2
        read.append(counted[-1][0])
        poison(folders[name], tmp_path / str(rank), own, rank)
        found = state(Checkpoint(tmp_path / str(rank)).model(share=share))
        assert found.keys() == expected.keys() and all(torch.equal(x, expected[key]) for key, x in found.items())
    common = 4 * sum(prod(shape) for key, shape in whole.items() if own.get(key) == shape and ".experts." not in key)
    assert sum(read) == 4 * sum(map(prod, whole.values())) + (ranks - 1) * common


def state(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def poison(folder, to, own: dict[str, tuple[int, ...]], rank: int) -> None:
    """Copy a checkpoint with NaN for all that is not a rank's: each axis of its tensors is cut in equal parts."""
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            (to / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, x in tensors.items():
            kept, sizes = torch.full_like(x, torch.nan), own.get(name, ())
            if sizes:
                axes = zip(sizes, x.shape, strict=True)
                part = tuple(slice(rank * n, (rank + 1) * n) if n < size else slice(None) for n, size in axes)
                kept[part] = x[part]
            tensors[name] = kept
        save_file(tensors, to / path.name)


def test_a_padded_A_log_is_divided_behind_its_padding(folders, tmp_path):
    shutil.copytree(folders["tiny"], tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.safetensors"):
        tensors = load_file(path)
        padded = {name: torch.cat((x.flatten(), torch.zeros(12))) for name, x in tensors.items() if "A_log" in name}
        save_file(tensors | padded, path)
    for rank in (0, 1):
        expected = state(Checkpoint(folders["tiny"]).model(share=Share(rank, 2)))
        found = state(Checkpoint(tmp_path / "copy").model(share=Share(rank, 2)))
        assert all(torch.equal(x, expected[key]) for key, x in found.items())


@pytest.mark.parametrize(
    ("change", "ranks", "named"),
    [
        ({"kda_heads": 3}, 2, "kda_heads = 3 cannot be divided by 2"),
        ({"heads": 6}, 4, "heads = 6 cannot be divided by 4"),
        ({"experts": 9}, 2, "experts = 9 cannot be divided by 2"),
        ({"intermediate_size": 385}, 2, "intermediate_size = 385 cannot be divided by 2"),
        ({"vocab_size": 511}, 2, "vocab_size = 511 cannot be divided by 2"),
        ({"moe_intermediate_size": 63}, 2, "shared_experts * moe_intermediate_size = 63 cannot be divided by 2"),
        ({}, 8, "kda_heads = 4, heads = 4 cannot be divided by 8"),
    ],
)
def test_what_cannot_be_divided_is_named_with_both_numbers(change, ranks, named):
    with pytest.raises(ConfigError) as error:
        Share(0, ranks).check(replace(TINY, **change))
    assert str(error.value) == f"every rank takes an equal part: {named}"


def test_what_a_model_lacks_need_not_be_divisible():
    Share(1, 2).check(replace(preset("tiny", baseline="mla"), kda_heads=3))
    Share(1, 2).check(replace(TINY, dense_layers=4, experts=9, moe_intermediate_size=63))


SET = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "device", "named"),
    [
        ({}, "cpu", "several ranks need a launcher, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "which sets LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (SET | {"WORLD_SIZE": "1"}, "cpu", "needs 2 or more, got 1: leave torchrun out"),
        (SET, "cuda:1", "must be cpu or cuda, each takes the GPU of its number, got cuda:1"),
        (SET | {"LOCAL_RANK": "99"}, "cuda", "rank 0 needs GPU 99 of its machine, which has "),
    ],
)
def test_wrong_use_is_refused_before_anybody_is_waited_for(monkeypatch, environment, device, named):
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JobError) as error, joined(device):
        pass
    assert named in str(error.value)


def test_torchrun_speaks_with_one_voice(folders):
    pytest.importorskip("tiktoken")
    command = f"-m kimi_linear generate --model {folders['tiny']} --prompt - --max-new-tokens 6 --json".split()
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port()]
    options = {"input": "Once upon", "capture_output": True, "text": True, "timeout": LIMIT, "cwd": ROOT}
    alone, two = (subprocess.run([sys.executable, *start, *command], **options) for start in ([], torchrun))
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == json.loads(alone.stdout) and json.loads(alone.stdout)["ids"]
    assert "weights read: rank 0 2.56 MB, rank 1 2.56 MB" in two.stderr
    assert two.stderr.count("9 ids read") == 1
