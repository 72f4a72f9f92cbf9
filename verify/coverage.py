"""Term coverage: does a case exercise each term of the recurrence? A term that contributes nothing was not tested.

A checker's own inputs once made a kernel that ignores the state pass (GPU MODE #127: gates cumulated twice decayed
everything to zero). So for every case the definition is run without each term, and the change is compared with what
roundings may do.
"""

import numpy as np

from kda_spec.recurrent import general_dplr, recurrent
from verify.cases import Case
from verify.yardstick import Yardstick, activated, rows

TERMS = ("initial state", "decay", "erase", "last token", "gate per head", "state behind token 64")
SEEN = 10.0
"""A term counts as tested where leaving it out changes some row by more than this many times the legal error."""


def covered(case: Case, yard: Yardstick) -> dict[str, float]:
    """Return, for each term of the case, the largest change of a row of o or S without it, in units of legal error."""
    inner = activated(case)
    changes = {name: _change(yard, *_without(inner, name)) for name in TERMS if _has(inner, name)}
    return {name: float(min(change, 1e6)) for name, change in changes.items()}


def _has(case: Case, term: str) -> bool:
    if term == "state behind token 64":
        return any(tokens.stop - tokens.start > 64 for _, tokens in case.sequences())
    return case.T > 0 and (term != "initial state" or case.S0 is not None) and (term != "gate per head" or case.HV > 1)


def _without(case: Case, term: str) -> tuple[np.ndarray, np.ndarray]:
    if term == "erase":
        return _gated_linear(case)
    last = case.beta.copy()
    last[:, [tokens.stop - 1 for _, tokens in case.sequences() if tokens.stop > tokens.start]] = 0.0
    forgotten = case.g.copy()
    forgotten[:, [tokens.start + 64 for _, tokens in case.sequences() if tokens.stop - tokens.start > 64]] = -np.inf
    changed = {
        "initial state": {"S0": None},
        "decay": {"g": np.zeros_like(case.g)},
        "last token": {"beta": last},
        "state behind token 64": {"g": forgotten},
        "gate per head": {"g": np.broadcast_to(case.g[:, :, :1], case.g.shape)},
    }[term]
    outputs = recurrent(case.but(**changed).inputs())
    return outputs.o, outputs.final_state


def _gated_linear(case: Case) -> tuple[np.ndarray, np.ndarray]:
    inputs = case.inputs()
    o, S = np.empty_like(case.v), np.empty_like(case.dS)
    for batch, tokens, states in inputs.runs():
        q, k, v, g, beta = inputs.heads_first(batch, tokens)
        nothing = np.zeros_like(k)
        part, S[states] = general_dplr(
            q, k, beta[..., None] * v, nothing, nothing, g, case.initial[states], inputs.resolved_scale
        )
        o[batch, tokens] = np.swapaxes(part, 1, 2)
    return o, S


def _change(yard: Yardstick, o: np.ndarray, S: np.ndarray) -> float:
    worst = 0.0
    for name, x in (("o", o), ("S", S)):
        change = np.linalg.norm(rows(name, x) - rows(name, yard.exact[name]), axis=-1) / yard.legal[name]
        worst = max(worst, float(np.max(change, initial=0.0)))
    return worst
