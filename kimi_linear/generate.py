"""Continue prompts: one prefill of all of them, packed, then one token of each per step until it has stopped."""

from collections.abc import Iterator, Sequence

from kimi_linear.cache import Cache
from kimi_linear.model import PREFILL_TOKENS, Ids, KimiLinear
from kimi_linear.sampling import Sampling, choose


def generate(model: KimiLinear, prompts: Ids, **options) -> list[list[int]]:
    """Return the ids that continue each prompt, the one that stopped it included; options as `stream`."""
    steps, made = stream(model, prompts, **options), [[] for _ in prompts]
    for pairs in steps:
        for row, chosen in pairs:
            made[row].append(chosen)
    return made


def stream(
    model: KimiLinear,
    prompts: Ids,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    cache: Cache | None = None,
    chunk: int = PREFILL_TOKENS,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, a list of (prompt, id) for the prompts that have not stopped.

    prompts: as `KimiLinear.prefill`, of unequal length. stop: ids that end a prompt, and are yielded; the
    configuration's where None. cache: of one sequence, which the prompt continues; it holds afterwards all ids but the
    last. Without it one of the right size is made and dropped. A prompt that has stopped costs nothing from then on.
    Raises, before the first id, what `prefill` and `Sampling` do, and CacheError where max_new_tokens do not fit.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompts = model.prompts(prompts)
    if cache is None:
        cache = model.cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    elif cache.batch != 1:
        raise ValueError(f"cache must hold one sequence, got {cache.batch}: fork it for several")
    cache.check_room([len(prompt) + max_new_tokens - 1 for prompt in prompts])
    stops = frozenset(model.config.stop_ids if stop is None else stop)
    logits = model.prefill(prompts, cache, chunk=chunk)
    return _steps(model, logits, cache, max_new_tokens, sampling, stops)


def _steps(model: KimiLinear, logits, cache: Cache, steps: int, sampling: Sampling, stops: frozenset[int]):
    """Yield what `stream` does, for the logits behind the prompts."""
    rows, generators = list(range(len(logits))), sampling.generators(len(logits))
    for step in range(1, steps + 1):
        chosen = choose(logits, sampling, [generators[row] for row in rows])
        yield list(zip(rows, chosen, strict=True))
        alive = [i for i, made in enumerate(chosen) if made not in stops]
        if not alive or step == steps:
            return
        if len(alive) < len(rows):
            cache, rows = cache.fork(alive), [rows[i] for i in alive]
        logits = model.decode([chosen[i] for i in alive], cache)
