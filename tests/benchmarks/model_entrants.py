"""Run Kimi Linear for a timing, ours or transformers', each in a process of its own; what is timed is asked by line."""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from processes import apart

VOCABULARY = 256
"""Ids are drawn below it: any model has them."""


def ids_of(tokens: int) -> torch.Tensor:
    """Return [1, tokens] ids, the same in every process."""
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


Entrant = tuple[Callable[[int], object], Callable[[int], Callable[[], object]]]
"""prefill(T), and decode(T), which prepares a context of T tokens and returns a step."""


def ours(folder: str, compile: bool = False) -> Entrant:
    """Load our model; compile: kernels and steps go through torch's compiler."""
    os.environ["KDA_COMPILE"] = str(int(compile))
    from kimi_linear import KimiLinear

    model = KimiLinear.from_pretrained(folder)
    if compile:
        model.compile_decode()

    def decode(T: int):
        cache = model.cache(1, T + 4096)
        model.prefill(ids_of(T), cache)
        return lambda: model.decode(ids_of(1), cache)

    return lambda T: model.prefill(ids_of(T), model.cache(1, T)), decode


def theirs(folder: str) -> Entrant:
    """Load transformers' model with its torch path, whatever faster kernels are installed beside it."""
    sys.modules.update({"fla": None, "causal_conv1d": None})
    from transformers import KimiLinearForCausalLM

    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def prefill(T: int):
        return model(ids_of(T), use_cache=True, logits_to_keep=1)

    def decode(T: int):
        past = prefill(T).past_key_values
        return lambda: model(ids_of(1), past_key_values=past, use_cache=True)

    return prefill, decode


ENTRANTS = {"ours": ours, "ours compiled": functools.partial(ours, compile=True), "transformers": theirs}


def serve(entrant: str, folder: str) -> None:
    """Answer lines, until there are no more.

    "prefill T": seconds of one. "decode T CALLS": the median of so many steps behind T tokens, in seconds.
    "growth SHORT LONG CALLS": the median ratio of a step behind LONG tokens to the one behind SHORT tokens after it.
    """
    torch.set_grad_enabled(False)
    prefill, decode = ENTRANTS[entrant](folder)
    step_behind = functools.cache(decode)
    prefill(64)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, *values = line.split()
        match kind, list(map(int, values)):
            case "prefill", [T]:
                found = seconds(lambda T=T: prefill(T))
            case "decode", [T, calls]:
                step_behind(T)()
                found = statistics.median(seconds(step_behind(T)) for _ in range(calls))
            case "growth", [short, long, calls]:
                steps = [step_behind(T) for T in (long, short)]
                pairs = [[seconds(step) for step in steps] for _ in range(calls)]
                found = statistics.median(x / y for x, y in pairs[1:])
        print(found, flush=True)


def seconds(call: Callable) -> float:
    """Time one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


serving = functools.partial(apart, "import sys; from model_entrants import serve; serve(*sys.argv[1:])")
"""Serves an entrant and the folder of a checkpoint in a process of its own."""
