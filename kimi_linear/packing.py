"""Cut prompts of unequal length into forward passes of packed pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Piece:
    """Some tokens of one prompt: from `first` to `last`, counted within the prompt."""

    row: int
    first: int
    last: int


def passes(prompts: Sequence[int], seen: Sequence[int], chunk: int, boundary: int | None) -> Iterator[list[Piece]]:
    """Yield the pieces of each forward pass: at most `chunk` tokens, at most one piece of each prompt.

    prompts: their lengths; seen: how many tokens stand before each in the cache. A piece ends where the sequence
    reaches a multiple of `boundary`. The order of tokens within a prompt is kept.
    """
    done = [0] * len(prompts)
    while any(begun < length for begun, length in zip(done, prompts, strict=True)):
        pieces, room = [], chunk
        for row, length in enumerate(prompts):
            to_boundary = boundary - (seen[row] + done[row]) % boundary if boundary else length
            if count := min(length - done[row], to_boundary, room):
                pieces.append(Piece(row, done[row], done[row] + count))
                done[row] += count
                room -= count
        yield pieces


def bounds(pieces: Sequence[Piece]) -> list[int]:
    """Return where each piece begins in the pass, and where the last one ends."""
    return [0, *accumulate(piece.last - piece.first for piece in pieces)]
