"""transformers' pipeline, and `transformers serve` over the loopback, on our ops: the same text as without them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

HERE = Path(__file__).parent
PROMPT, NEW = "w5 w17 w40 w8", 12
SERVER = ("fastapi", "uvicorn", "openai", "accelerate")
MADE = """
import sys, hf_models, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
with hf_models.imported() as modules:
    hf_models.random("kimi_linear", modules["kimi_linear"]).save_pretrained(sys.argv[1])
fast.save_pretrained(sys.argv[1])
"""
PIPED = """
import sys
sys.modules |= {"fla": None, "causal_conv1d": None}
from transformers import pipeline
from kimi_linear import hf
from kimi_linear.hf import routes

folder, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
generator, calls = pipeline("text-generation", model=folder, device="cpu"), []
length = dict(max_new_tokens=new, min_new_tokens=new)
written = lambda: generator(prompt, do_sample=False, return_full_text=False, **length)[0]["generated_text"]
print(written())
run, step = routes.kda, routes._step
routes.kda = lambda *x, **keywords: (calls.append("chunk"), run(*x, **keywords))[1]
routes._step = lambda *x: (calls.append("step"), step(*x))[1]
with hf.enable(absorbed_mla=True):
    print(written())
    print(calls.count("chunk"), calls.count("step"))
print(written())
"""


def environment(**more) -> dict[str, str]:
    """Return the environment of a process that finds this checkout, and nothing on the network."""
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def run(program: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint, with a tokenizer of words and a chat template that adds nothing."""
    folder = tmp_path_factory.mktemp("served")
    run(MADE, folder)
    return folder


@pytest.mark.slow  # two processes that import transformers
def test_a_pipeline_writes_the_same_text_with_our_ops(folder):
    before, enabled, calls, after = run(PIPED, folder, PROMPT, NEW)
    assert before == enabled == after and len(before.split()) > NEW // 2
    assert calls.split() == ["4", str(4 * (NEW - 1))]  # of four layers of KDA


@pytest.mark.slow  # three processes that import transformers, one of them serves
def test_transformers_serve_answers_over_the_loopback_as_the_pipeline_writes(folder):
    if missing := [name for name in SERVER if importlib.util.find_spec(name) is None]:
        pytest.skip(f"transformers serve needs {', '.join(missing)} (pip install 'transformers[serving]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "-m",
        "kimi_linear.hf",
        "--absorbed-mla",
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with subprocess.Popen(
        [sys.executable, "-u", *command, "--device", "cpu"], env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "Uvicorn running on" in line:
                    break
            assert server.poll() is None, "".join(said)
            assert any("runs on impls.kda; MLA of kimi_linear decodes over latents" in line for line in said)
            asked = {
                "model": str(folder), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": NEW,
                "temperature": 0.0, "stream": False,
            }  # fmt: skip
            url, form = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
            with urllib.request.urlopen(
                urllib.request.Request(url, json.dumps(asked).encode(), form), timeout=120
            ) as x:
                answer = json.load(x)
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert answer["choices"][0]["message"]["content"] == run(PIPED, folder, PROMPT, NEW)[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "transformers serve DIR"),
        (["--help"], 0, "--absorbed-mla"),
        (["version"], 2, "transformers 9.0.0 is not"),
    ],
)
def test_the_command_says_what_it_is_and_what_it_cannot(tmp_path, arguments, code, said):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "9.0.0"\n')
    paths = os.pathsep.join([str(tmp_path), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "kimi_linear.hf", *arguments],
        env=environment(PYTHONPATH=paths), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code and said in done.stdout + done.stderr
