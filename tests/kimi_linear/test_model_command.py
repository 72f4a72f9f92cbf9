"""python -m kimi_linear: what it prints is the answer, what it refuses it explains, and its exit codes say which."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tiktoken")

from kimi_linear import KimiLinear
from kimi_linear.__main__ import COMMANDS, main
from kimi_linear.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}<|im_assistant|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint made by the command, with a template."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    assert main(["init", "--preset", "tiny", "--dtype", "float32", "--seed", "7", "--out", str(folder)]) == 0
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def generate(folder: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(folder), "--max-new-tokens", "6", *arguments])


def expected(folder: Path, text: str, special: bool = False) -> str:
    """Return what six steps make of a text, without the command."""
    tokenizer, model = Tokenizer.read(folder), KimiLinear.from_pretrained(folder)
    stops = {*model.config.stop_ids, tokenizer.eos_id}
    [ids] = model.generate([tokenizer.encode(text, special=special)], max_new_tokens=6, stop=stops)
    return tokenizer.decode([i for i in ids if i not in stops])


def test_the_answer_is_all_of_standard_output(made, capsys):
    assert generate(made, "--prompt", "Once upon") == 0
    out, err = capsys.readouterr()
    assert out == expected(made, "Once upon") + "\n"
    assert err.startswith("9 ids read, the first made in ")


def test_a_chat_goes_through_the_template_of_the_checkpoint(made, capsys):
    assert generate(made, "--chat", "--system", "S", "--prompt", "hi") == 0
    text = "<|im_system|>S<|im_end|><|im_user|>hi<|im_end|><|im_assistant|>"
    assert capsys.readouterr().out == expected(made, text, special=True) + "\n"


def test_several_prompts_are_answered_in_order(made, capsys):
    assert generate(made, "--json", "--prompt", "a", "--prompt", "Once upon") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in found] == [0, 1]
    assert [line["text"] for line in found] == [expected(made, "a"), expected(made, "Once upon")]


def test_ids_need_no_tokenizer(folder, model, capsys):
    assert generate(folder, "--ids", "1,2,3") == 0
    [ids] = model.generate([[1, 2, 3]], max_new_tokens=6)
    assert capsys.readouterr().out.split() == [str(i) for i in ids if i not in model.config.stop_ids]


def test_sampling_follows_the_seed(made, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(made, "--prompt", "a", "--temperature", "1", "--top-p", "0.9", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_inspect_counts_the_released_model(capsys):
    assert main(["inspect", "--preset", "kimi-linear-48b-a3b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["active"]) == (49_122_681_728, 3_106_972_544)
    assert found["by_kind"]["kda"] == 790_285_440 and found["by_kind"]["mla"] == 203_804_160
    assert found["cache_bytes"] == {"constant": 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2), "per_token": 8064}
    assert [kernel["kernel"] for kernel in found["kernels"]] == ["chunk_torch", "recurrent_torch"]


def test_inspect_reads_a_checkpoint(made, capsys):
    assert main(["inspect", "--model", str(made)]) == 0
    out = capsys.readouterr().out
    for line in ("4 layers KKKM, float32", "1,245,852", "in 1 shards", "prefill: chunk_torch(", "generic-cpu"):
        assert line in out


def test_inspect_lists_what_is_wrong(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.unlink()
    assert main(["inspect", "--model", str(broken)]) == 1
    assert f"problem: {shard.name} is absent" in capsys.readouterr().out


def test_bench_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "found" / "bench.json"
    asked = [
        "--context",
        "8,16",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--baseline",
        "hybrid,gdn-hybrid",
        "--json",
        str(path),
    ]
    assert main(["bench", "--preset", "tiny", *asked]) == 0
    found = json.loads(path.read_text())
    assert [(row["model"], row["context"]) for row in found["rows"]] == [
        ("hybrid", 8), ("gdn-hybrid", 8), ("hybrid", 16), ("gdn-hybrid", 16),
    ]  # fmt: skip
    assert all(row["prefill_s"] > 0 and row["step_ms"] > 0 and row["cache_bytes"] > 0 for row in found["rows"])
    assert found["versions"]["torch"] and "gdn-hybrid" in capsys.readouterr().out


def test_bench_draws_contexts_that_nobody_reads(tmp_path):
    path = tmp_path / "bench.json"
    drawn = ["--context", "4096,8192", "--filled", "--steps", "1", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "--preset", "tiny", *drawn, "--piece", "8"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert all(row["piece"] == 8 and row["piece_s"] > 0 and row["batch"] == 1 for row in rows)
    assert main(["bench", "--preset", "tiny", *drawn, "--cache-gib", "0.01"]) == 0
    rows = json.loads(path.read_text())["rows"]
    batches = {(row["model"], row["context"]): row["batch"] for row in rows}
    assert batches["hybrid", 8192] > batches["mla", 8192] and batches["mla", 4096] > batches["mla", 8192]
    assert all(row["batch"] * row["cache_bytes"] <= 0.01 * 2**30 and "prefill_s" not in row for row in rows)


USAGE = {
    "a piece behind nothing": ["bench", "--piece", "8"],
    "caches of nothing": ["bench", "--filled", "--cache-gib", "0"],
    "nothing to say": ["generate", "--model", "{made}"],
    "two kinds of prompt": ["generate", "--model", "{made}", "--prompt", "a", "--ids", "1"],
    "system without chat": ["generate", "--model", "{made}", "--prompt", "a", "--system", "b"],
    "no numbers": ["generate", "--model", "{made}", "--ids", "1,x"],
    "out of range": ["generate", "--model", "{made}", "--ids", "512"],
    "empty prompt": ["generate", "--model", "{made}", "--prompt", ""],
    "no tokens": ["generate", "--model", "{made}", "--prompt", "a", "--max-new-tokens", "0"],
    "temperature": ["generate", "--model", "{made}", "--prompt", "a", "--temperature", "-1"],
    "over a checkpoint": ["init", "--preset", "tiny", "--out", "{made}"],
    "a folder that cannot be": ["init", "--preset", "tiny", "--out", "{made}/config.json/new"],
    "ratio": ["init", "--preset", "tiny", "--ratio", "3", "--out", "{made}/new"],
    "two models": ["inspect", "--model", "{made}", "--preset", "tiny"],
    "unheard layers": ["inspect", "--model", "{made}", "--layers", "3"],
    "unheard baseline": ["bench", "--model", "{made}", "--baseline", "mla"],
    "no model": ["inspect"],
    "no layers": ["inspect", "--preset", "tiny", "--layers", "0"],
    "no such device": ["inspect", "--preset", "tiny", "--device", "cuda:99"],
    "no device": ["generate", "--model", "{made}", "--prompt", "a", "--device", "tpu"],
    "no context": ["bench", "--context", "0"],
    "no baseline": ["bench", "--baseline", "transformer"],
}
BROKEN = {
    "no folder": (["generate", "--model", "{made}/nowhere", "--prompt", "a"], "config.json"),
    "no tokenizer": (["generate", "--model", "{folder}", "--prompt", "a"], "tiktoken.model"),
    "no template": (["generate", "--model", "{bare}", "--prompt", "a", "--chat"], "no chat template"),
    "nothing to inspect": (["inspect", "--model", "{made}/nowhere"], "config.json"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_command_line_that_is_none_ends_with_2(made, name, capsys):
    assert main([x.format(made=made) for x in USAGE[name]]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("python -m kimi_linear: ") and "Traceback" not in err


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_is_none_ends_with_1(made, folder, tmp_path, name, capsys):
    arguments, message = BROKEN[name]
    main(["init", "--preset", "tiny", "--out", str(tmp_path / "bare")])
    capsys.readouterr()
    assert main([x.format(made=made, folder=folder, bare=tmp_path / "bare") for x in arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and "Traceback" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m kimi_linear {name} " in capsys.readouterr().out.split("examples")[1]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 6), (MemoryError, 6)])
def test_what_stops_a_command_shows_in_its_exit_code(monkeypatch, capsys, error, code):
    def stopped(arguments):
        raise error

    monkeypatch.setattr(COMMANDS["inspect"], "run", stopped)
    assert main(["inspect", "--preset", "tiny"]) == code
    out, err = capsys.readouterr()
    assert not out and ("Traceback" in err) == (code == 6)


@pytest.mark.parametrize("watched", [False, True])
def test_a_bar_and_colours_are_for_those_who_watch(made, watched):
    command = [sys.executable, "-m", "kimi_linear", "generate", "--model", str(made), "--prompt", "a"]
    environment = os.environ | {"TERM": "xterm-256color"} | ({"FORCE_COLOR": "1"} if watched else {})
    run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, env=environment)
    assert run.returncode == 0 and b"\x1b" not in run.stdout
    assert (b"reading weights" in run.stderr) == (b"\x1b" in run.stderr) == watched
