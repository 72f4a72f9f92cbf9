"""The tokenizer of a checkpoint, from tiktoken.model and tokenizer_config.json alone: no code of theirs is run."""

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken

RANKS, SETTINGS = "tiktoken.model", "tokenizer_config.json"
RESERVED = 256
"""Ids behind the ranks that are special, named or not."""
PIECE_CHARS = 400_000
RUN_CHARS = 25_000
"""Text is cut after so many characters, and in runs of so many spaces or non-spaces: the pattern is slow on more."""
FILE_LIMIT = 64 * 2**20

_UPPER, _LOWER = (rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is split before merging: Han runs, words by case, numbers of three digits, punctuation, spaces."""


class TokenizerError(ValueError):
    """Files that are no tokenizer."""


class Tokenizer:
    """Turn text into ids and back. `special` maps the names of special ids to them."""

    def __init__(self, ranks: dict[bytes, int], names: dict[int, str], eos: str | None = None):
        """Build from the ranks of tiktoken.model and the names of special ids; others are <|reserved_token_ID|>."""
        first = len(ranks)
        ids = range(first, max([first + RESERVED, *(i + 1 for i in names)]))
        self.special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in ids}
        self.eos_id = self.special.get(eos) if eos else None
        self._encoding = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def read(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint's tokenizer; TokenizerError names the file and what is wrong with it."""
        folder = Path(folder)
        settings = _settings(folder / SETTINGS)
        names = {}
        for key, about in settings.get("added_tokens_decoder", {}).items():
            if not key.isdecimal() or not isinstance(about, dict) or not isinstance(about.get("content"), str):
                raise TokenizerError(f"{folder / SETTINGS}: added_tokens_decoder must map ids to contents, got {key!r}")
            names[int(key)] = about["content"]
        ranks, eos = _ranks(folder / RANKS), settings.get("eos_token")
        if wrong := [i for i in names if not len(ranks) <= i < len(ranks) + 2 * RESERVED]:
            raise TokenizerError(f"{folder / SETTINGS}: special ids follow {len(ranks)} ranks, got {wrong[0]}")
        return cls(ranks, names, eos.get("content") if isinstance(eos, dict) else eos)

    def __len__(self) -> int:
        return self._encoding.n_vocab

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text; names of special ids in it mean those ids only where `special`."""
        allowed = set(self.special) if special else set()
        ids: list[int] = []
        for piece in pieces(text):
            ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD. KeyError for an id that is none."""
        return b"".join(self._bytes(i) for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as it becomes whole: a character of several ids comes with its last."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self._bytes(i))
        yield decoder.decode(b"", final=True)

    def _bytes(self, i: int) -> bytes:
        return self._encoding.decode_single_token_bytes(i)


def pieces(text: str) -> Iterator[str]:
    """Yield a text cut after PIECE_CHARS characters, and after RUN_CHARS in runs of spaces or of non-spaces."""
    for first in range(0, len(text), PIECE_CHARS):
        whole, begun = text[first : first + PIECE_CHARS], 0
        for run in re.finditer(r"\s+|\S+", whole):
            for cut in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                yield whole[begun:cut]
                begun = cut
        yield whole[begun:]


def _ranks(path: Path) -> dict[bytes, int]:
    """Return bytes -> rank: each line holds base64 and a number, ranks count from 0."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise TokenizerError(f"{path}: expected at most {FILE_LIMIT} bytes, got {path.stat().st_size}")
        lines = path.read_bytes().splitlines()
        ranks = {
            base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, filter(None, lines))
        }
    except OSError as error:
        raise TokenizerError(f"{path}: expected the tokenizer's ranks, got {error.strerror}") from error
    except (ValueError, binascii.Error) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: expected lines of base64 and a rank, got {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise TokenizerError(f"{path}: expected ranks from 0 on, each once, with all 256 bytes among them")
    return ranks


def _settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("added_tokens_decoder", {}), dict):
        raise TokenizerError(f"{path}: expected a JSON object with added_tokens_decoder")
    return settings
