"""What is claimed of any Kimi Linear: plain functions from a trial to measures, each compared with the definition.

Everything that a model returns is compared: the residual stream behind every block and the logits, token by token.
"""

from collections.abc import Callable, Iterator

import numpy as np

from verify.claims import Condition, Property, claim, condition, every
from verify.exact import Dice
from verify.models.checkpoints import texts_of
from verify.models.definition import joined
from verify.models.recipes import VOCABULARY
from verify.models.targets import Trace
from verify.models.trial import ROOM, Trial
from verify.trial import Measure

STEPS = 24
"""Longest text that is decoded from its first token on: a step costs as much as a prompt."""


@condition("no two experts have equal scores")
def clear(trial: Trial) -> bool:
    """No two experts have equal scores: what is chosen is no question of a rule."""
    return not trial.recipe.tied


@condition("experts have equal scores")
def tied(trial: Trial) -> bool:
    """Experts have equal scores."""
    return trial.recipe.tied


def _and(words: str, holds: Callable[[Trial], bool]) -> Condition:
    return every(clear, Condition(words, holds))


@claim("tolerance", clear)
def prefill(trial: Trial) -> Iterator[Measure]:
    """Prompts of unequal length, read at once, give the definition's residual stream and logits at every token.

    Would have caught: every prefill wrong while decoding is right (vllm#41292); NaN for prompts shorter than a chunk
    (ROCm/ATOM#1750); kv_a_layernorm with another eps; lists of layers that count from 0 read as if from 1.
    """
    for i, (text, got) in enumerate(zip(trial.texts, trial.base, strict=True)):
        n = len(trial.prompts[i])
        yield from trial.agree(f"text {i}", text, Trace(got.hidden[:, :n], got.logits[:n]))


@claim("tolerance", clear)
def decode(trial: Trial) -> Iterator[Measure]:
    """A token that is decoded behind a prompt gives what it gives as a part of the prompt: prefill = decode.

    Would have caught: state layouts that differ between prefill and decoding (vllm#41292, ROCm/ATOM#1750); a
    convolution that forgets the prompt's last tokens.
    """
    for i, (text, got) in enumerate(zip(trial.texts, trial.base, strict=True)):
        n = len(trial.prompts[i])
        yield from trial.agree(f"text {i}", text, Trace(got.hidden[:, n:], got.logits[n:]), n)


@claim("tolerance", _and("a text of more than one token", lambda trial: max(map(len, trial.texts)) > 1))
def chunked_prefill(trial: Trial) -> Iterator[Measure]:
    """A text that is read in pieces gives what it gives at once, wherever it is cut, each text elsewhere.

    Would have caught: chunked prefill != one-shot prefill (vllm#52909); attention of a later piece to itself alone;
    prefix caches with states of another token (sglang#26575, #30243, #31474).
    """
    for i, text in enumerate(trial.texts):
        if len(text) > 1:
            cuts = 1 + Dice(trial.recipe.seed, "cuts", i, len(text)).integers(0, len(text) - 1, (2,))
            cache = trial.start([text])
            parts = [trial.prefill([piece], cache)[0] for piece in np.split(text, np.unique(cuts))]
            yield from trial.agree(f"text {i} cut at {np.unique(cuts).tolist()}", text, joined(parts))


@claim("tolerance", _and("several texts", lambda trial: len(trial.texts) > 1))
def batching(trial: Trial) -> Iterator[Measure]:
    """A text gives the same alone, and among others in another order.

    Would have caught: states of neighbours mixed up; a batch row's length taken for all rows; corruption at batch 1
    (vllm#52531).
    """
    tail = trial.recipe.tail
    for i, text in enumerate(trial.texts):
        yield from trial.agree(f"text {i} alone", text, trial.read([text], tail)[0])
    backwards = trial.read(list(reversed(trial.texts)), tail)
    for i, (text, got) in enumerate(zip(trial.texts, reversed(backwards), strict=True)):
        yield from trial.agree(f"text {i} in reversed order", text, got)


@claim("tolerance", clear)
def padding(trial: Trial) -> Iterator[Measure]:
    """Room that a cache has behind a text, and a much longer neighbour, change nothing.

    Would have caught: padding that enters states or latents; masks as long as the longest text.
    """
    longest = max(map(len, trial.texts))
    neighbour = Dice(trial.recipe.seed, "neighbour").integers(0, VOCABULARY, (longest + 18,))
    got = trial.read([*trial.texts, neighbour], trial.recipe.tail, ROOM)
    for i, (text, own) in enumerate(zip(trial.texts, got[:-1], strict=True)):
        yield from trial.agree(f"text {i} beside {len(neighbour)} tokens", text, own)


@claim("tolerance", _and("an MLA layer", lambda trial: "m" in trial.recipe.layers))
def absorbed(trial: Trial) -> Iterator[Measure]:
    """MLA over latents (absorbed) is MLA over keys and values (expanded), at every length from the second token on.

        q_h [W_K,h c, s]^T = [W_K,h^T q_nope, q_rope] [c, s]^T

    Would have caught: the scale of the latent's width instead of the key's; a shared key that is left out.
    """
    for i, text in enumerate(trial.texts):
        n = min(len(text), STEPS)
        if n > 1:
            yield from trial.agree(f"text {i} decoded from its second token on", text, trial.read([text[:n]], n - 1)[0])


@claim("tolerance", clear)
def fork(trial: Trial) -> Iterator[Measure]:
    """A forked cache goes on like the one it was forked from, and neither notices the other.

    Both are continued in turns, one with the texts' tails, one with other tokens, and at the end one at once.
    Would have caught: prefix caches that crash or give wrong states on a hit (omlx#2496, llama.cpp#24055, vllm#53912).
    """
    texts, prompts = trial.texts, trial.prompts
    tails = [text[len(p) :] for text, p in zip(texts, prompts, strict=True)]
    others = [text[: trial.recipe.tail] for text in texts_of(trial.recipe, "other")]
    cache = trial.start(texts, 2 * trial.recipe.tail)
    trial.prefill(prompts, cache)
    forked, parts = trial.fork(cache), {"kept": [], "forked": []}
    for t in range(trial.recipe.tail):
        parts["forked"].append(trial.decode([x[t] for x in others], forked))
        parts["kept"].append(trial.decode([x[t] for x in tails], cache))
    parts["forked"].append(trial.prefill(tails, trial.fork(forked)))
    for i, prompt in enumerate(prompts):
        own = np.concatenate([prompt, others[i], tails[i]])
        for name, text in (("kept", texts[i]), ("forked", own)):
            yield from trial.agree(f"text {i}, {name}", text, joined([part[i] for part in parts[name]]), len(prompt))


@claim("tolerance", _and("states are kept at boundaries", lambda trial: trial.recipe.boundary > 0))
def truncate(trial: Trial) -> Iterator[Measure]:
    """A cache that is cut back to a boundary goes on as if what stood behind had never been read.

    Would have caught: prefix caches that restore latents and not states, or states of another boundary (sglang#26575,
    #30243, #31474, llama.cpp#25913, vllm#53912).
    """
    texts, boundary = trial.texts, trial.recipe.boundary
    cache = trial.start(texts, trial.recipe.tail, boundary)
    trial.prefill(trial.prompts, cache)
    trial.steps([text[len(text) - trial.recipe.tail :] for text in texts], cache)
    kept = boundary * Dice(trial.recipe.seed, "kept", boundary).integer(0, min(map(len, texts)) // boundary + 1)
    trial.truncate(cache, kept)
    others = [text[: trial.recipe.tail] for text in texts_of(trial.recipe, "other")]
    for i, got in enumerate(trial.prefill(others, cache)):
        own = np.concatenate([texts[i][:kept], others[i]])
        yield from trial.agree(f"text {i} cut back to {kept} tokens", own, got, kept)


@claim("tolerance", tied)
def router_ties(trial: Trial) -> Iterator[Measure]:
    """Of experts, and groups of experts, with equal scores the one with the lower index is taken, always.

    The scores are equal exactly: a router's rows of zeros give sigmoid(0) = 1/2. Would have caught: a top-k that
    promises nothing about equals, and takes others in a batch, in a prompt or on another device.
    """
    for i, (text, got) in enumerate(zip(trial.texts, trial.base, strict=True)):
        yield from trial.agree(f"text {i}", text, got)
    text = trial.texts[0]
    yield from trial.agree("text 0 alone", text, trial.read([text], 0)[0])


@claim("bitwise")
def determinism(trial: Trial) -> Iterator[Measure]:
    """Equal calls give equal bits.

    Would have caught: uninitialised memory, races between launches, states left over from another text.
    """
    again = trial.read(list(trial.texts), trial.recipe.tail)
    for i, (one, other) in enumerate(zip(trial.base, again, strict=True)):
        yield _same_bits(f"text {i}", one, other)


@claim("bound")
def refusal(trial: Trial) -> Iterator[Measure]:
    """Ids out of range, no ids, and more than fit raise ValueError, and the cache stays as it was.

    Would have caught: negative ids that count from the end; a cache that was written before the check.
    """
    texts, prompts = list(trial.texts), trial.prompts
    cache, undisturbed = trial.start(texts), trial.start(texts)
    for each in (cache, undisturbed):
        trial.prefill(prompts, each)
    others = [text[:1] for text in texts[1:]]
    wrong = {
        "an id beyond the vocabulary": [VOCABULARY],
        "a negative id": [-1],
        "no token": [],
        "more tokens than fit": [0] * (max(map(len, texts)) + 1),
    }
    for what, bad in wrong.items():
        bad = np.array(bad, np.int64)
        yield _refused(f"a prompt of {what}", lambda bad=bad: trial.model.prefill([*others, bad], cache))
        if len(bad) == 1:
            ids = np.concatenate([*others, bad])
            yield _refused(f"a step with {what}", lambda ids=ids: trial.model.decode(ids, cache))
    tails = [text[len(text) - trial.recipe.tail :] for text in texts]
    pairs = zip(trial.steps(tails, cache), trial.steps(tails, undisturbed), strict=True)
    for i, (got, expected) in enumerate(pairs):
        yield _same_bits(f"text {i} behind what was refused", got, expected)


def _refused(what: str, call: Callable[[], object]) -> Measure:
    """Measure whether a call raises ValueError, and nothing else."""
    try:
        call()
    except ValueError:
        return Measure(f"{what} is refused", 0.0, 0.0)
    except Exception as error:  # as bad as none: nobody expects it
        return Measure(f"{what} raises {type(error).__name__}, not ValueError", 1.0, 0.0)
    return Measure(f"{what} is taken", 1.0, 0.0)


def _same_bits(what: str, one: Trace, other: Trace) -> Measure:
    pairs = ((one.hidden, other.hidden), (one.logits, other.logits))
    different = sum(int(np.sum(~((a == b) | (np.isnan(a) & np.isnan(b))))) for a, b in pairs)
    return Measure(f"{what} bitwise", different, 0, one.hidden.size + one.logits.size)


PROPERTIES: tuple[Property, ...] = (
    prefill,
    decode,
    chunked_prefill,
    batching,
    padding,
    absorbed,
    fork,
    truncate,
    router_ties,
    determinism,
    refusal,
)
