"""Checkpoints: every tensor comes to its place, and what is wrong with a folder is one clear error."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear import Checkpoint, CheckpointError, ConfigError, KimiLinear, preset, write_random
from kimi_linear.checkpoint import INDEX
from kimi_linear.initial import random_model
from kimi_linear.layout import stored
from kimi_linear.presets import PRESETS

EVERY_KIND = replace(preset("tiny"), full_rank_gate=True, full_rank_forget=True, shared_experts=2)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(folder: Path, change, shard: int = 0) -> None:
    """Change the dictionary of tensors of one shard, and the index with it."""
    path = sorted(folder.glob("*.safetensors"))[shard]
    tensors = load_file(path)
    before = set(tensors)
    change(tensors)
    save_file(tensors, path)
    index = json.loads((folder / INDEX).read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps(index))


def state(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("config", [preset("tiny"), EVERY_KIND, preset("tiny", baseline="gdn-hybrid")])
def test_every_element_of_every_parameter_is_filled_once(config):
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in KimiLinear(config).named_parameters()}
    filled = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for each in stored(config):
        part = filled[each.into][each.at or slice(None)]
        assert part.numel() == each.elements
        part += 1
    assert all((x == 1).all() for x in filled.values())


def test_what_was_written_is_read(config, folder, model):
    expected = state(random_model(config, seed=1, dtype=torch.float32))
    found = state(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_an_equal_seed_writes_equal_files_and_another_does_not(config, folder, tmp_path):
    for seed, same in ((1, True), (2, False)):
        paths = write_random(config, tmp_path / str(seed), seed=seed, dtype=torch.float32, shard_bytes=10**6)
        assert all((path.read_bytes() == (folder / path.name).read_bytes()) == same for path in paths)


def test_dtypes_are_those_that_are_stored(config, tmp_path):
    write_random(config, tmp_path)
    kinds = {name.rsplit(".", 1)[-1]: x.dtype for name, x in state(KimiLinear.from_pretrained(tmp_path)).items()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"A_log", "dt_bias"}
    assert all(kind == torch.bfloat16 for name, kind in kinds.items() if name not in ("A_log", "dt_bias"))


def test_another_dtype_leaves_the_decays_in_float32(folder):
    model = KimiLinear.from_pretrained(folder, dtype=torch.bfloat16)
    mixer = model.layers[0].mixer
    assert (model.dtype, mixer.A_log.dtype, mixer.dt_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 1, 4, 1), (128,)])
def test_decays_are_read_in_every_shape_that_they_are_stored_in(broken, model, shape):
    def reshaped(tensors):
        x = tensors["model.layers.0.self_attn.A_log"].flatten()
        tensors["model.layers.0.self_attn.A_log"] = torch.cat((x, x.new_zeros(124)))[: torch.Size(shape).numel()].view(
            shape
        )
        bias = tensors["model.layers.0.self_attn.dt_bias"]
        tensors["model.layers.0.self_attn.dt_bias"] = bias.view(4, 32)

    rewrite(broken, reshaped)
    read = KimiLinear.from_pretrained(broken).layers[0].mixer
    assert torch.equal(read.A_log, model.layers[0].mixer.A_log)
    assert torch.equal(read.dt_bias, model.layers[0].mixer.dt_bias)


def test_a_dense_layer_may_be_named_as_transformers_saves_it(broken, model):
    def renamed(tensors):
        for name in [name for name in tensors if ".0.mlp." in name]:
            tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)

    rewrite(broken, renamed)
    found = state(KimiLinear.from_pretrained(broken))
    assert all(torch.equal(x, found[name]) for name, x in state(model).items())


def test_padding_that_is_not_zero_is_refused(broken):
    rewrite(broken, lambda tensors: tensors.update({"model.layers.0.self_attn.A_log": torch.ones(128)}))
    with pytest.raises(CheckpointError, match="A_log must be zero beyond its 4 elements"):
        KimiLinear.from_pretrained(broken)


def test_one_file_without_an_index_is_a_checkpoint(folder, tmp_path, model):
    tensors = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    found = state(KimiLinear.from_pretrained(tmp_path))
    assert all(torch.equal(x, found[name]) for name, x in state(model).items())


def test_missing_unexpected_and_wrongly_shaped_tensors_are_one_error(broken):
    def damage(tensors):
        del tensors["model.layers.0.self_attn.f_a_proj.weight"]
        tensors["model.layers.0.self_attn.g_proj.bias"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.b_proj.weight"] = torch.zeros(4, 5)

    rewrite(broken, damage)
    with pytest.raises(CheckpointError) as error:
        KimiLinear.from_pretrained(broken)
    for line in (
        "1 missing: model.layers.0.self_attn.f_a_proj.weight",
        "1 unexpected: model.layers.0.self_attn.g_proj.bias",
        "1 wrongly shaped: model.layers.0.self_attn.b_proj.weight [4, 5], expected [4, 128]",
    ):
        assert line in str(error.value)


def test_a_checkpoint_of_another_size_lists_some_and_counts_the_rest(folder):
    with pytest.raises(CheckpointError, match=r"\d+ missing: .* and \d+ more"):
        KimiLinear.from_pretrained(folder, config=preset("tiny", layers=6))


def test_a_truncated_shard_is_named_with_its_sizes(broken):
    path = sorted(broken.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated: its header promises [\d,]+ bytes, it has"):
        KimiLinear.from_pretrained(broken)


def headed(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


NO_SHARDS = {
    "empty": b"",
    "cut off": headed("{}" + " " * 9)[:-5],
    "a length that is none": b"\xff" * 64,
    "a list": headed("[]"),
    "nested": headed("[" * 10**5),
    "no offsets": headed('{"a": {"dtype": "F32", "shape": [1]}}'),
    "backwards": headed('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'),
    "a dtype that is none": headed('{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}'),
}


@pytest.mark.parametrize("content", NO_SHARDS.values(), ids=NO_SHARDS)
def test_a_shard_that_is_none_is_named(broken, content):
    path = sorted(broken.glob("*.safetensors"))[0]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name}: expected a safetensors file"):
        KimiLinear.from_pretrained(broken)


def test_an_absent_shard_is_named_once(broken):
    path = sorted(broken.glob("*.safetensors"))[2]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is absent") as error:
        KimiLinear.from_pretrained(broken)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", ".."])
def test_shards_stay_in_the_folder(broken, shard):
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no safetensors file in this folder"):
        Checkpoint(broken)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(broken):
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = index["weight_map"]["lm_head.weight"]
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in another shard than the index says: model.embed_tokens.weight"):
        KimiLinear.from_pretrained(broken)


def test_parameters_of_several_dtypes_are_named(broken):
    def halve(tensors):
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    rewrite(broken, halve)
    with pytest.raises(CheckpointError, match="layers.0.mixer.in_proj"):
        KimiLinear.from_pretrained(broken)
    assert KimiLinear.from_pretrained(broken, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_dtype_that_no_model_has_is_named(broken, dtype):
    rewrite(broken, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(512, 128).to(dtype)}))
    with pytest.raises(CheckpointError, match="of a dtype that no model has: model.embed_tokens.weight"):
        KimiLinear.from_pretrained(broken)


def test_nan_is_warned_of_by_name(broken):
    rewrite(broken, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[7:8].fill_(float("nan")))
    with pytest.warns(RuntimeWarning, match="model.layers.0.mlp.up_proj.weight holds NaN"):
        KimiLinear.from_pretrained(broken)


def test_infinite_weights_are_no_nan(broken, recwarn):
    def infinite(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[:2] = torch.tensor([float("inf"), float("-inf")])

    rewrite(broken, infinite)
    KimiLinear.from_pretrained(broken)
    assert not recwarn.list


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        KimiLinear.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(preset("tiny").to_json()))
    with pytest.raises(CheckpointError, match=f"{INDEX} or model.safetensors"):
        KimiLinear.from_pretrained(tmp_path)


def test_a_checkpoint_is_not_overwritten(config, folder):
    with pytest.raises(FileExistsError, match="config.json exists"):
        write_random(config, folder)


def test_progress_ends_with_all_bytes(folder):
    seen = []
    KimiLinear.from_pretrained(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == Checkpoint(folder).bytes


def sparse_shards(folder: Path, config, shards: int) -> None:
    """Write headers of a whole checkpoint, and nothing behind them."""
    tensors = list(stored(config))
    size, weight_map = -(-len(tensors) // shards), {}
    for i in range(shards):
        header, end = {}, 0
        for each in tensors[i * size : (i + 1) * size]:
            kind, itemsize = ("F32", 4) if each.float32 else ("BF16", 2)
            begin, end = end, end + each.elements * itemsize
            header[each.name] = {"dtype": kind, "shape": list(each.shape), "data_offsets": [begin, end]}
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        weight_map |= dict.fromkeys(header, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_json()))


def test_48b_of_headers_are_read_in_seconds_and_their_weights_refused(tmp_path):
    sparse_shards(tmp_path, PRESETS["kimi-linear-48b-a3b"], 20)
    begun = time.process_time()
    checkpoint = Checkpoint(tmp_path)
    problems = checkpoint.problems()
    assert time.process_time() - begun < 5
    assert (len(checkpoint.entries), checkpoint.bytes) == (20_493, 98_245_528_576)
    assert len(problems) == 20 and all("is truncated" in problem for problem in problems)
    with pytest.raises(CheckpointError, match="model-00020-of-00020.safetensors is truncated"):
        checkpoint.model()


PEAK = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from kimi_linear import Checkpoint, KimiLinear
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
checkpoint = Checkpoint(sys.argv[1])
checkpoint.problems()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = checkpoint.model()
print(status("VmHWM") - before, sum(x.nbytes for x in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux")
def test_loading_takes_the_model_and_a_tenth_at_most(tmp_path):
    config = replace(preset("small-1b", layers=8), vocab_size=8192)
    write_random(config, tmp_path, shard_bytes=10**9)
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, size = map(int, run.stdout.split())
    assert size > 700e6 and peak <= 1.1 * size, (peak, size)
