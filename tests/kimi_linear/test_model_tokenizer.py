"""The tokenizer splits as the released pattern does, loses no byte, and runs nobody's code; templates are confined."""

import base64
import json
from itertools import product

import pytest

pytest.importorskip("tiktoken")

from kimi_linear.chat import TEXT_LIMIT, ChatError, ChatTemplate
from kimi_linear.tokenizer import Tokenizer, TokenizerError, pieces

MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", "你".encode()[:2], "你".encode()]
NAMES = {"267": "[BOS]", "268": "[EOS]", "269": "<|im_end|>", "270": "<|im_user|>"}


@pytest.fixture
def files(tmp_path):
    """A tokenizer of 256 bytes and some merges."""
    ranks = [*(bytes([i]) for i in range(256)), *MERGES]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    settings = {"added_tokens_decoder": {i: {"content": x} for i, x in NAMES.items()}, "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def tokenizer(files):
    return Tokenizer.read(files)


TEXTS = [
    "hello world",
    "",
    " ",
    "你好，世界",
    "naïve \U0001f469\u200d\U0001f467 \x00",
    "a\r\n\r\n  b\t",
    "1234567",
    "It's HELLO'll",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


def test_merges_follow_their_ranks(tokenizer):
    assert tokenizer.encode("hello world") == [259, 264]
    assert tokenizer.encode("你") == [266]


SPLITS = {
    "中文English混合": ["中文", "English", "混合"],
    "北京市 Pascal": ["北京市", " Pascal"],
    "HelloWorld": ["Hello", "World"],
    "JSONData": ["JSOND", "ata"],
    "don't WE'LL": ["don't", " WE'LL"],
    "12345": ["123", "45"],
    "a  b": ["a", " ", " b"],
    "x = y!\n\nz": ["x", " =", " y", "!\n\n", "z"],
    "end   ": ["end", "   "],
}


@pytest.mark.parametrize("text", SPLITS)
def test_text_is_split_as_released(text):
    words = SPLITS[text]
    ranks = {bytes([i]): i for i in range(256)}
    for word in dict.fromkeys(word.encode() for word in words):  # each word a token, by way of its beginnings
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end], len(ranks))
    tokenizer = Tokenizer(ranks, {})
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


def test_special_names_are_text_unless_asked_for(tokenizer):
    assert tokenizer.encode("<|im_end|>", special=True) == [269]
    plain = tokenizer.encode("<|im_end|>")
    assert 269 not in plain and tokenizer.decode(plain) == "<|im_end|>"


def test_ids_without_a_name_are_reserved(tokenizer):
    assert (tokenizer.eos_id, tokenizer.special["<|im_user|>"], len(tokenizer)) == (268, 270, 267 + 256)
    assert tokenizer.encode("<|reserved_token_300|>", special=True) == [300]


def test_a_character_of_several_ids_is_streamed_whole(tokenizer):
    ids = tokenizer.encode("é👩")
    assert len(ids) > 2 and [x for x in tokenizer.decode_stream(ids) if x] == ["é", "👩"]
    assert "".join(tokenizer.decode_stream(ids[:-1])) == "é\ufffd"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a" * 60_000, [25_000, 25_000, 10_000]),
        ("a" * 25_000, [25_000]),
        ("a " * 300_000, [400_000, 200_000]),
        ("b" + " " * 30_000 + "c", [25_001, 5_001]),
    ],
)
def test_long_text_is_cut(text, lengths):
    cut = list(pieces(text))
    assert "".join(cut) == text and [len(x) for x in cut] == lengths


BROKEN = {
    "absent": (None, "No such file"),
    "not base64": (b"!!! 0\n", "base64 and a rank"),
    "no rank": (b"AA==\n", "base64 and a rank"),
    "few": (b"AA== 0\n", "all 256 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_ranks_that_are_none_are_named(files, name):
    content, message = BROKEN[name]
    (files / "tiktoken.model").unlink() if content is None else (files / "tiktoken.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.read(files)
    assert "tiktoken.model" in str(error.value)


@pytest.mark.parametrize(
    "settings", ["{", "[]", '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": {"3": {"content": "a"}}}']
)
def test_settings_that_are_none_are_named(files, settings):
    (files / "tokenizer_config.json").write_text(settings)
    with pytest.raises(TokenizerError, match="tokenizer_config.json"):
        Tokenizer.read(files)


TEMPLATE = """\
{%- for message in messages -%}
<|im_{{ message.role }}|>{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if tools %}{{ tools | tojson(separators=(',', ':')) }}{% endif -%}
{%- if add_generation_prompt %}<|im_assistant|>{% endif -%}
"""
HELLO = [{"role": "user", "content": "hi <b> é"}]


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_is_read_from_the_checkpoint(files, where):
    text = TEMPLATE if where.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (files / where).write_text(text)
    template = ChatTemplate.read(files)
    assert template.render(HELLO) == "<|im_user|>hi <b> é<|im_end|><|im_assistant|>"
    assert template.render(HELLO, tools=[{"a": "é"}], add_generation_prompt=False).endswith('<|im_end|>[{"a":"é"}]')


def test_a_checkpoint_without_a_template_says_so(files):
    with pytest.raises(ChatError, match="has no chat template"):
        ChatTemplate.read(files)


ATTACKS = {
    "reach for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reach through a function": "{{ raise_exception.__globals__.keys() }}",
    "change the conversation": "{{ messages.append(1) }}",
    "long text": "{{ 'a' * 999999999 }}",
    "long list": "{{ [0] * 999999999 }}",
    "padding": "{{ 'a'.ljust(999999999) }}",
    "padding by a filter": "{{ 'a' | center(999999999) }}",
    "padding by a format": "{{ '%999999999d' % 1 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "much text": "{% for i in range(20) %}{{ 'a' * 1000000 }}{% endfor %}",
    "count": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "files": "{% include '/etc/passwd' %}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
    "failure": "{{ messages[7].content.x }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_templates_are_confined(name):
    with pytest.raises(ChatError):
        ChatTemplate(ATTACKS[name]).render(HELLO)
    assert HELLO == [{"role": "user", "content": "hi <b> é"}]


@pytest.mark.parametrize("source", ["{% for %}", "x" * (2**20 + 1)])
def test_templates_that_are_none_are_refused(source):
    with pytest.raises(ChatError):
        ChatTemplate(source)


def test_a_template_may_make_what_fits():
    assert len(ChatTemplate("{{ 'a' * 1000 }}").render(HELLO)) == 1000 < TEXT_LIMIT


def test_pairs_of_bytes_make_a_vocabulary_of_any_size():
    ranks = {bytes(x): i for i, x in enumerate([*product(range(256), repeat=1), *product(range(256), repeat=2)])}
    assert Tokenizer(ranks, {}).decode(Tokenizer(ranks, {}).encode("any text, 你好")) == "any text, 你好"
