"""What is right for a text, and what float32 loses on it: the definition in float64, and in float32 in several orders.

The error that a right model may have at a token, in the residual stream behind a block or in the logits, is measured:
it is the root mean square of what the definition loses when it runs in float32, over legal orders of operations, each
with roundings of its own (`ORDERS`). Single rows of a tiny model are lucky in all of them now and then, so three things
that do not depend on the model under judgement hold it up: the mean square row behind the same block, the same row
behind the block before, and one rounding of the row itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kda_spec.model import forward
from verify import simulators
from verify.exact import UNIT_ROUNDOFF, Dice
from verify.models.checkpoints import Checkpoint
from verify.models.targets import Trace

U = UNIT_ROUNDOFF["float32"]

ROW, OVERALL = 24.0, 12.0
"""How much of that a row, and all rows behind a block together, may have: twice the most that the definition itself had
in a fifth order in 2,000 recipes, 11.8 and 5.5 (one in a hundred had more than 5.2 and 2.3; kimi_linear at most 7.5 and
4.9). The bugs that are planted in mutants have a million times more, or are no matter of rounding."""


@dataclass(frozen=True)
class Order:
    """A legal order of operations: tokens of a piece, form of MLA, and chunk length of KDA (0: token by token)."""

    piece: int
    absorbed: bool
    chunk: int

    @property
    def recurrence(self) -> Callable:
        """Equation 1 in float32, with the arguments of `kda_spec.kda`."""
        rounding = simulators.Rounding("float32", "float32", "float32")
        how = partial(simulators.chunked, C=self.chunk) if self.chunk else simulators.sequential
        return lambda q, k, v, g, beta, S0: how(q, k, v, g, beta, S0, q.shape[-1] ** -0.5, rounding)

    def moved(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return a tensor in float32, every number of it moved by up to one rounding.

        So does every product round; without it the orders share most roundings of so small a model.
        """
        return (x * (1 + U * (2 * Dice(0, self, name).uniform(x.shape) - 1))).astype(np.float32)


ORDERS = (Order(4096, False, 0), Order(7, True, 4), Order(4096, True, 16), Order(20, False, 16))


@dataclass(frozen=True, eq=False)
class Answer:
    """What is right for one text, and what may be lost: hidden [layers + 1, T, D] and logits [T, V] in float64,
    legal_hidden [layers + 1, T] and legal_logits [T] as norms of rows."""

    right: Trace
    legal_hidden: np.ndarray
    legal_logits: np.ndarray


def exact(checkpoint: Checkpoint, text: np.ndarray) -> Trace:
    """Run the definition in float64 on a text [T]."""
    return _traced(forward(text[None], checkpoint.tensors, checkpoint.settings))


def single(checkpoint: Checkpoint, text: np.ndarray, order: Order) -> Trace:
    """Run the definition in float32 on a text [T], in one of its orders."""
    tensors = {name: order.moved(name, x) for name, x in checkpoint.tensors.items()}
    parts, cache = [], None
    for start in range(0, len(text), order.piece):
        piece = text[None, start : start + order.piece]
        out = forward(piece, tensors, checkpoint.settings, cache, absorbed=order.absorbed, recurrence=order.recurrence)
        cache = out.cache
        parts.append(_traced(out))
    return joined(parts)


def joined(parts: list[Trace]) -> Trace:
    """Return what was made of pieces of a text as if of the whole."""
    return Trace(np.concatenate([x.hidden for x in parts], axis=1), np.concatenate([x.logits for x in parts]))


def answer(checkpoint: Checkpoint, text: np.ndarray) -> Answer:
    """Return what is right for a text [T], and what may be lost."""
    right = exact(checkpoint, text)
    runs = [single(checkpoint, text, order) for order in ORDERS]
    hidden = _lost([run.hidden for run in runs], right.hidden)
    logits = _lost([run.logits for run in runs], right.logits)
    return Answer(right, np.maximum.accumulate(hidden, axis=0), logits)


def _lost(runs: list[np.ndarray], right: np.ndarray) -> np.ndarray:
    """Return what runs [..., T, D] lose per row [..., T], lucky rows lifted."""
    lost = np.mean([rows(run - right) ** 2 for run in runs], axis=0)
    together = np.mean(lost, axis=-1, keepdims=True)
    return np.maximum(np.sqrt(np.maximum(lost, together)), U * rows(right))


def rows(x: np.ndarray) -> np.ndarray:
    """Return the norms of the rows of x [..., D]."""
    return np.linalg.norm(x, axis=-1)


def _traced(out) -> Trace:
    return Trace(np.stack([x[0] for x in out.hidden]).astype(np.float64), out.logits[0].astype(np.float64))
