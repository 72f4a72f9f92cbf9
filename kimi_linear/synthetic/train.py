"""Train a toy: AdamW, warm-up, clipped gradients; whoever is killed goes on from the last window, bit for bit."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from kimi_linear.synthetic import saved
from kimi_linear.synthetic.model import Toy
from kimi_linear.synthetic.runs import Run
from kimi_linear.synthetic.saved import Point, SavedError, State
from kimi_linear.synthetic.tasks import Batch, batch

TRAINING, HELD_OUT = 0, 1
"""Of every seed the streams of batches: none is ever drawn twice, so that every batch of training is unseen, too."""
BETAS = (0.9, 0.95)
CHECKED = 8
"""Batches that the accuracy of a finished run is taken over."""


class Diverged(ArithmeticError):
    """A run whose loss is not a number any more."""


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    run: Run
    curve: list[Point]
    accuracy: float | None
    """Over CHECKED batches that were never trained on; None where the run is not over."""
    exact: float | None

    @property
    def over(self) -> bool:
        """Tell whether it ended by itself."""
        return self.accuracy is not None


class Trainer:
    """A run in its folder: made, or found and taken up."""

    def __init__(self, run: Run, folder: Path, device: str = "cpu"):
        """Take up what the folder holds; SavedError where that is another run, or from another device."""
        saved.check_origin(folder, device)
        self.run, self.folder, self.device = run, folder, device
        self.model = Toy(run.toy, run.seed).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=run.rate, betas=BETAS, weight_decay=run.weight_decay
        )
        self.state, self.curve = State(), []
        if self.checkpoint.is_file():
            found, self.state = saved.about(self.checkpoint)
            if found != run:
                raise SavedError(f"{folder} holds another run: expected {run}, found {found}")
            saved.restore(self.checkpoint, self.model, self.optimizer)
            self.curve = [point for point in saved.curve(folder / saved.CURVE) if point.step <= self.state.step]
        saved.keep(folder / saved.CURVE, self.curve)

    @property
    def checkpoint(self) -> Path:
        """Return the file that the run goes on from."""
        return self.folder / saved.CHECKPOINT

    @property
    def over(self) -> bool:
        """Tell whether nothing is left to be done: all steps made, or a window as good as was asked for."""
        solved = bool(self.curve) and self.curve[-1].accuracy >= self.run.stop
        return solved or self.state.step >= self.run.steps

    def train(self, meet: Callable[[Point], None] = lambda point: None, go_on: Callable[[], bool] = lambda: True):
        """Train until the run is over, or `go_on`, asked after every step, says no; returns `Trained`.

        meet: called with every new line of the curve, after it is kept; what it raises ends the training there. Raises
        Diverged.
        """
        while not self.over and go_on():
            begun = time.perf_counter()
            self.step()
            self.state.seconds += time.perf_counter() - begun
            if self.state.steps == self.run.window or self.state.step == self.run.steps:
                point = self._close_window()
                self.save()
                meet(point)
        if not self.over:
            self.save()
            return Trained(self.run, self.curve, None, None)
        return Trained(self.run, self.curve, *self.evaluate())

    def step(self) -> None:
        """Make one step."""
        run, state = self.run, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = run.rate * min(1.0, (state.step + 1) / max(run.warmup, 1))
        drawn = self._batch(TRAINING, state.step)
        logits, wanted = self._answer(drawn)
        loss = F.cross_entropy(logits.float(), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.clip)
        self.optimizer.step()
        right, exact = _counted(drawn, logits, wanted)
        state.step, state.steps, state.loss = state.step + 1, state.steps + 1, state.loss + loss.item()
        state.right, state.asked, state.exact = state.right + right, state.asked + len(wanted), state.exact + exact

    def _close_window(self) -> Point:
        s = self.state
        if not math.isfinite(s.loss):
            raise Diverged(f"the loss is {s.loss / s.steps} at step {s.step}: a smaller --rate, or float32, may help")
        sequences = s.steps * self.run.batch
        point = Point(s.step, s.loss / s.steps, s.right / s.asked, s.exact / sequences, round(s.seconds, 3))
        self.state = State(s.step, s.seconds)
        self.curve.append(point)
        saved.append(self.folder / saved.CURVE, point)
        return point

    def save(self) -> None:
        """Write the checkpoint."""
        saved.save(self.checkpoint, self.run, self.state, self.model, self.optimizer)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return the accuracy of answers and of whole sequences, over CHECKED batches of the held-out stream."""
        right = asked = exact = 0
        for i in range(CHECKED):
            drawn = self._batch(HELD_OUT, i)
            logits, wanted = self._answer(drawn)
            more, whole = _counted(drawn, logits, wanted)
            right, asked, exact = right + more, asked + len(wanted), exact + whole
        return right / asked, exact / (CHECKED * self.run.batch)

    def _batch(self, stream: int, step: int) -> Batch:
        drawn = batch(self.run.drawn, (self.run.seed, stream), step, self.run.batch)
        return Batch(drawn.ids.to(self.device), drawn.answers.to(self.device))

    def _answer(self, drawn: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [n, vocabulary] and answers [n] where answers are asked for."""
        narrow = self.run.dtype == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16) if narrow else nullcontext():
            return self.model.logits(self.model(drawn.ids)[drawn.mask]), drawn.answers[drawn.mask]


def _counted(drawn: Batch, logits: torch.Tensor, wanted: torch.Tensor) -> tuple[int, int]:
    """Return how many answers are right, and how many sequences have no wrong one."""
    right = logits.argmax(-1) == wanted
    wrong = torch.zeros_like(drawn.mask)
    wrong[drawn.mask] = ~right
    return int(right.sum()), int((~wrong.any(1)).sum())
