"""Kimi Linear for inference: blocks over an explicit cache, prefill in packed pieces, decoding step by step."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from kimi_linear.cache import Cache, CacheError, Live
from kimi_linear.config import KDA, KimiConfig
from kimi_linear.layers import Block
from kimi_linear.packing import Piece, bounds, passes
from kimi_linear.parameters import Embedding, Projection, rms_norm, weight
from kimi_linear.share import WHOLE, Share

Ids = torch.Tensor | Sequence[Sequence[int]]

PREFILL_TOKENS = 2048
"""Tokens of a forward pass of prefill, all sequences together."""
WINDOW = 256
"""A step attends over a multiple of so many tokens of the latent buffer: few shapes, most of them seen before."""


class KimiLinear(nn.Module):
    """The model. Weights come from a checkpoint; what it remembers is in a `Cache`, one per conversation or batch."""

    def __init__(self, config: KimiConfig, share: Share = WHOLE):
        """Build the model, or the share of it that a rank holds: that one answers once `parallel` has joined it."""
        super().__init__()
        self.config, self.own = config, share.of(config)
        self.embed = Embedding(self.own.vocab_size, config.hidden_size)
        self.head = Projection(config.hidden_size, self.own.vocab_size)
        self.layers = nn.ModuleList(Block(config, i, share) for i in range(len(config.layers)))
        self.norm = weight(config.hidden_size)
        self._step = self.step

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        config: KimiConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "KimiLinear":
        """Return the model of a checkpoint in the released layout, each tensor in the dtype that it is stored in.

        dtype: another one for all but A_log and dt_bias. config: instead of the folder's config.json. progress: called
        with the bytes read and the bytes there are. Raises ConfigError or CheckpointError; warns of NaN, by name.
        """
        from kimi_linear.checkpoint import Checkpoint

        checkpoint = Checkpoint(folder, KimiConfig.read(folder) if config is None else config)
        return checkpoint.model(dtype=dtype, device=device, progress=progress)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations, which is that of the embedding."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.embed.weight.device

    def cache(self, batch: int = 1, capacity: int = 2048, *, boundary: int | None = None) -> Cache:
        """Return an empty cache of `batch` sequences of at most `capacity` tokens; arguments as `Cache`."""
        return Cache(self.own, batch, capacity, boundary=boundary, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def prefill(self, ids: Ids, cache: Cache, *, logits: str = "last", chunk: int = PREFILL_TOKENS):
        """Read prompts into the cache, and return the logits behind the last token of each, [B, vocab] in float32.

        ids: [B, T], or B sequences of ids of unequal length, at least one each, which are packed; they continue what
        the cache holds. logits: 'all' returns those behind every token, a list of B tensors [T, vocab]. chunk: tokens
        of one forward pass, all sequences together: a bound on memory. Raises TypeError, ValueError or CacheError for
        ids that are none, are out of range or do not fit, and leaves the cache as it was.
        """
        prompts = self._checked(ids, cache)
        if logits not in ("last", "all") or chunk < 1:
            raise ValueError(f"expected logits of 'last' or 'all' and chunk >= 1, got {logits!r} and {chunk!r}")
        found: list[list[torch.Tensor]] = [[] for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        for pieces in passes(lengths, cache.lengths, chunk, cache.boundary):
            x = self._pass(prompts, pieces, cache)
            for piece, own in zip(pieces, x.split([p.last - p.first for p in pieces]), strict=True):
                if logits == "all":
                    found[piece.row].append(self.logits(own))
                elif piece.last == lengths[piece.row]:
                    found[piece.row].append(self.logits(own[-1:]))
        return torch.cat([rows[0] for rows in found]) if logits == "last" else [torch.cat(rows) for rows in found]

    @torch.no_grad()
    def decode(self, ids: Ids, cache: Cache) -> torch.Tensor:
        """Read one more token of each sequence, and return the logits behind it, [B, vocab] in float32.

        ids: [B] or [B, 1]. Raises as `prefill`.
        """
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError) as error:
            raise TypeError(f"ids must be [B] or [B, 1], whole numbers, got {ids!r}"[:120]) from error
        ids = torch.cat(self._checked(ids[:, None] if ids.ndim == 1 else ids, cache))
        if len(ids) != cache.batch:
            raise ValueError(f"ids must hold one token of each of {cache.batch} sequences, got {len(ids)}")
        lengths = tuple(length + 1 for length in cache.lengths)
        window = min(-(-max(lengths) // WINDOW) * WINDOW, cache.capacity)
        positions = torch.tensor(cache.lengths, device=self.device)
        logits, states, inputs = self._step(ids, positions, cache.live.states, cache.live.inputs, cache.latents, window)
        cache.advance(Live(states, inputs, lengths))
        return logits

    def compile_decode(self) -> "KimiLinear":
        """Run decoding steps through torch's compiler from now on, and return the model; bits change within rounding.

        The first step compiles for a minute, and so does the first of another window or batch size, once. A step runs
        uncompiled before: a kernel that compiles itself (KDA_COMPILE=1) cannot do so while the step is compiled.
        """
        self.decode([0], self.cache(1, 1))
        self._step = torch.compile(self.step, fullgraph=True)
        return self

    def step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        states: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        latents: Sequence[torch.Tensor],
        window: int,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Take one step of static shapes, without a look at values: to be compiled, or captured in a CUDA graph.

        ids [B] stand at positions [B] of their sequences. states, inputs and latents are those of a `Cache`; latents
        are written in place, at `positions` only, and read up to `window`, which is more than any position. Returns
        the logits [B, vocab] in float32, and the states and inputs behind the step.
        """
        later = torch.arange(window, device=ids.device) > positions[:, None]
        mask = torch.where(later, float("-inf"), 0.0).to(self.dtype)[:, None]
        x, kda, mla, after = self.embed(ids), iter(zip(inputs, states, strict=True)), iter(latents), []
        for block in self.layers:
            if block.kind == KDA:
                mixed, *own = block.mixer.step(block.normed(x), *next(kda))
                after.append(own)
            else:
                mixed = block.mixer.step(block.normed(x), positions, mask, next(mla)[:, :window])
            x = block.add(x, mixed)
        return self.logits(x), tuple(S for _, S in after), tuple(own for own, _ in after)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocab] in float32 (float64 in a model of float64) of the last block's output [n, D]."""
        found = self.head(rms_norm(x, self.norm, self.config.rms_norm_eps))
        return found if found.dtype == torch.float64 else found.float()

    def generate(self, prompts: Ids, **options) -> list[list[int]]:
        """Return the ids that continue each prompt: see `kimi_linear.generate.generate`."""
        from kimi_linear.generate import generate

        return generate(self, prompts, **options)

    def stream(self, prompts: Ids, **options) -> Iterator[list[tuple[int, int]]]:
        """Yield (prompt, id) pairs step by step: see `kimi_linear.generate.stream`."""
        from kimi_linear.generate import stream

        return stream(self, prompts, **options)

    def prompts(self, ids: Ids) -> list[torch.Tensor]:
        """Return one tensor of ids for each sequence; TypeError or ValueError for what are no ids, or no sequences."""
        if isinstance(ids, str) or not isinstance(ids, torch.Tensor | Sequence) or getattr(ids, "ndim", 1) == 0:
            raise TypeError(f"ids must be [B, T] or a list of lists of ids, got {ids!r}"[:120])
        if len(ids) == 0:
            raise ValueError("ids must hold at least one sequence, got none")
        return [as_ids(row, prompt, self.config.vocab_size) for row, prompt in enumerate(ids)]

    def _pass(self, prompts: Sequence[torch.Tensor], pieces: Sequence[Piece], cache: Cache) -> torch.Tensor:
        """Run one forward pass of prefill over pieces of prompts [n, D], and advance the cache."""
        rows, at, live = [piece.row for piece in pieces], bounds(pieces), cache.live
        lengths = list(cache.lengths)
        for piece in pieces:
            lengths[piece.row] += piece.last - piece.first
        x = self.embed(torch.cat([prompts[p.row][p.first : p.last] for p in pieces]))
        kda, mla, after = iter(zip(live.inputs, live.states, strict=True)), iter(cache.latents), []
        for block in self.layers:
            if block.kind == KDA:
                before = next(kda)
                mixed, *own = block.mixer.prefill(block.normed(x), at, *(_taken(x, rows) for x in before))
                after.append([_put(x, rows, new) for x, new in zip(before, own, strict=True)])
            else:
                latents = next(mla)
                mixed = block.mixer.prefill(block.normed(x), at, [latents[row, : lengths[row]] for row in rows])
            x = block.add(x, mixed)
        cache.advance(Live(tuple(S for _, S in after), tuple(own for own, _ in after), tuple(lengths)))
        return x

    def _checked(self, ids: Ids, cache: Cache) -> list[torch.Tensor]:
        """Return one tensor of ids per sequence, on the model's device; raise before anything has changed."""
        made_for = (cache.config, cache.dtype, cache.device)
        if made_for != (self.own, self.dtype, self.device):
            raise CacheError("the cache was made for another model: take model.cache(...)")
        prompts = self.prompts(ids)
        if len(prompts) != cache.batch:
            raise ValueError(f"ids must hold {cache.batch} sequences, as the cache does, got {len(prompts)}")
        cache.check_room([len(prompt) for prompt in prompts])
        return [prompt.to(self.device) for prompt in prompts]


def as_ids(row: int, prompt: torch.Tensor | Sequence[int], vocab_size: int) -> torch.Tensor:
    """Return a prompt as a tensor of int64; TypeError or ValueError for an empty one and for what are no ids."""
    if isinstance(prompt, str) or not isinstance(prompt, torch.Tensor | Sequence):
        raise TypeError(f"prompt {row} must be a list of ids or a tensor of them, got {type(prompt).__name__}")
    prompt = torch.as_tensor(prompt)
    if prompt.ndim != 1 or not len(prompt):
        raise ValueError(f"prompt {row} must be one or more ids, got shape {list(prompt.shape)}")
    if prompt.dtype.is_floating_point or prompt.dtype == torch.bool:
        raise TypeError(f"prompt {row} must hold whole numbers, got {prompt.dtype}")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids must be from 0 to {vocab_size - 1}, prompt {row} has {low if low < 0 else high}")
    return prompt.long()


def _taken(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if rows == list(range(len(x))) else x[rows]


def _put(x: torch.Tensor, rows: list[int], new: torch.Tensor) -> torch.Tensor:
    """Return x with other rows, a copy where some stay: what is live is never written in place."""
    if rows == list(range(len(x))):
        return new
    return x.index_copy(0, torch.tensor(rows, device=x.device), new)
