"""Ask a target what it takes: each axis of the domain once, with one tiny fixed case, before the properties run.

A refusal narrows the domain and is shown with the share of the recipes that it costs. A keyword that is swallowed and
changes nothing is a finding. So is a wrong answer, which narrows nothing: the properties judge it and shrink it.
"""

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from verify import yardstick
from verify.cases import Case
from verify.families import materialise
from verify.properties.isolation import strided
from verify.recipes import AXES, DTYPES, Recipe, drawn, recipes
from verify.targets import STANDARD, Malformed, Result, Target, arguments, call_tensors

BASE = Recipe(seed=5, T=9, H=2, K=8, V=8, gates="mild", betas="uniform")
CHUNKS = (16, 32, 64)
EVERY = "every dtype"
"""The axis under which a target is told that raises whatever it gets."""
DRAWS = 256
"""Recipes drawn for the shares: standard error 3% at most, in 1.8 s."""

GROSS = {"float64": 1e-8, "float32": 2e-2, "float16": 2e-2, "bfloat16": 6e-2}
"""Relative error of a tensor above which an answer is wrong: square roots of the unit roundoff, tf32's for float32
because kernels that multiply in tf32 are for the properties to judge. float64 inputs computed in float32 stand out."""


@dataclass(frozen=True)
class Probe:
    """What a target made of one axis.

    outcome  "supported", "refused" (it raised, or lacks the keyword), "ignored" (it swallowed the keyword: a finding)
             or "wrong" (it answered, far from the definition: a finding, and the axis stays in the domain)
    share    the part of all recipes that the axis covers; None for what no recipe holds (dtypes, layouts, gradients)
    taken    the chunk sizes that it takes, for that axis
    """

    axis: str
    outcome: str
    reason: str = ""
    share: float | None = None
    taken: tuple[int, ...] = ()


@dataclass(frozen=True)
class Question:
    """A change of the tiny case, the keywords that it adds to the call (the axis's own first), and how to call."""

    changes: dict = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    strided: bool = False
    backward: bool = False


QUESTIONS = {
    "HV > H": Question({"G": 2}),
    "varlen": Question({"lengths": (4, 5)}, ("cu_seqlens",)),
    "T = 0": Question({"T": 0}),
    "initial_state": Question({"state": True}, ("initial_state",)),
    "scale": Question({"scale": True}, ("scale",)),
    "K != V": Question({"V": 16}),
    "g = -inf": Question({"gates": "resets_inf", "plant": 6}),
    "g < -5": Question({"gates": "strong"}),
    "use_qk_l2norm_in_kernel": Question(
        {"l2norm": True, "keys": "long", "queries": "large"}, ("use_qk_l2norm_in_kernel",)
    ),
    "use_gate_in_kernel": Question({"activation": "softplus"}, ("use_gate_in_kernel", "A_log", "dt_bias")),
    "lower_bound": Question({"activation": "lower_bound"}, ("lower_bound",)),
    "use_beta_sigmoid_in_kernel": Question({"sigmoid": "sigmoid"}, ("use_beta_sigmoid_in_kernel",)),
    "allow_neg_eigval": Question({"sigmoid": "twice"}, ("allow_neg_eigval",)),
    "float32 gates": Question({"gates_float32": True}),
    "state_v_first": Question({}, ("state_v_first",)),
    "strided inputs": Question(strided=True),
    "backward": Question(backward=True),
}
"""One question an axis, asked in the first dtype that works; dtypes and chunk sizes are asked beside them."""


def probe(target: Target, dtypes: tuple[str, ...] = DTYPES) -> tuple[Probe, ...]:
    """Ask about the dtypes that are to be judged and about every axis; about no axis where none of them is taken.

    The target's exceptions are refusals. Where it raises in whatever dtype, nothing can be judged.
    Prints and warnings are swallowed.
    """
    target = complete(target)
    with quiet():
        asked = [_base(target, dtype) for dtype in dtypes]
        if base := _first(asked, dtypes):
            asked += [_dtype_of_o(target, asked), *_axes(target, base), *_float32_gates(target, asked)]
        elif all(_base(target, dtype).outcome == "refused" for dtype in DTYPES if dtype not in dtypes):
            asked = [Probe(EVERY, "refused", _cannot_run(asked[0].reason))]
    known = shares()
    return tuple(replace(p, share=known.get(p.axis)) for p in asked)


def _cannot_run(reason: str) -> str:
    """Say what a target raises whatever it gets, and what to do where it looks for a GPU that is not there."""
    lacks = "active drivers" in reason  # what Triton says where there is no GPU
    hint = "; Triton kernels can be judged without a GPU by --device interpret" if lacks else ""
    return f"it cannot run here: {reason}{hint}"


def _base(target: Target, dtype: str) -> Probe:
    return _declared(target, dtype) or _ask(target, dtype, dtype, Question())


def _axes(target: Target, base: str) -> list[Probe]:
    """Ask about every axis, in the dtype `base`."""
    single = [axis for axis in QUESTIONS if axis != "float32 gates"]
    axes = [_declared(target, axis) or _ask(target, axis, base, QUESTIONS[axis]) for axis in single]
    return [*axes, _declared(target, "chunk_size") or _chunk_sizes(target, base)]


def _dtype_of_o(target: Target, asked: list[Probe]) -> Probe:
    """Compare the dtype of o with that of q, in every dtype that is taken: whoever swaps kernels relies on it."""
    other = []
    for dtype in [p.axis for p in asked if p.outcome != "refused"]:
        with contextlib.suppress(Exception):  # no pair of tensors came: said under the dtype itself
            came = str(_run(target, _case(target, dtype, Question()), Question()).o.dtype).removeprefix("torch.")
            other += [f"o comes in {came} for {dtype} inputs"] if came != dtype else []
    return Probe("dtype of o", "wrong" if other else "supported", "; ".join(other))


def restrict(target: Target, probes: Iterable[Probe]) -> Target:
    """Return the target narrowed to what it takes: without refused and ignored axes, dtypes, gradients, chunk sizes."""
    closed = {p.axis: p.reason for p in probes if p.outcome in ("refused", "ignored")}
    taken = next((p.taken for p in probes if p.axis == "chunk_size"), target.chunks)
    return replace(
        complete(target),
        refused=target.refused | closed,
        dtypes=tuple(dtype for dtype in target.dtypes if dtype not in closed and EVERY not in closed),
        backward=target.backward and "backward" not in closed,
        chunks=() if "chunk_size" in closed else taken,
    )


def complete(target: Target) -> Target:
    """Return the target with None for keywords that its signature demands and FLA's leaves out, like initial_state."""
    parameters = _parameters(target.function) or {}
    required = [n for n, p in parameters.items() if n in STANDARD and p.default is p.empty]
    if not required:
        return target

    @functools.wraps(target.function)
    def completed(*tensors, **keywords):
        return target.function(*tensors, **(dict.fromkeys(required) | keywords))

    return replace(target, function=completed)


@functools.cache
def shares() -> dict[str, float]:
    """Measure how much of the unrestricted recipe space each axis of `AXES` covers, on recipes of a fixed seed."""
    strategy = recipes(DTYPES, tokens=33, work=400_000, chunks=CHUNKS)
    met = [drawn(strategy, number) for number in range(DRAWS)]
    return {axis: sum(neutral(r) != r for r in met) / len(met) for axis, neutral in AXES.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what Python code prints and warns: a target's remarks neither stop a run nor mix with its output."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _first(probes: Iterable[Probe], dtypes: tuple[str, ...]) -> str | None:
    """Return the first of `dtypes` that gave a right answer, else any answer."""
    outcomes = {p.axis: p.outcome for p in probes}
    return next((d for wanted in ("supported", "wrong") for d in dtypes if outcomes.get(d) == wanted), None)


def _declared(target: Target, axis: str) -> Probe | None:
    if axis in target.refused:
        return Probe(axis, "refused", target.refused[axis])
    if axis in DTYPES and axis not in target.dtypes:
        return Probe(axis, "refused", f"declared: takes {', '.join(target.dtypes)}")
    if axis == "backward" and not target.backward:
        return Probe(axis, "refused", "declared: no backward")
    return None


def _case(target: Target, dtype: str, question: Question) -> Case:
    """Make the tiny case of a question, as the target takes it."""
    return materialise(target.settle(replace(BASE, dtype=dtype, **question.changes)))


def _ask(target: Target, axis: str, dtype: str, question: Question) -> Probe:
    case = _case(target, dtype, question)
    if unknown := _unknown(target, case, question):
        return Probe(axis, "refused", f"keyword {unknown} not in the signature")
    try:
        got = _run(target, case, question).numbers()
    except Malformed as error:
        return Probe(axis, "wrong", str(error))
    except Exception as error:
        return Probe(axis, "refused", _one_line(error))
    exact = yardstick.measure(case, target.contract(dtype), question.backward).exact
    wrong = _difference(got, {name: exact[name] for name in ("o", "S", *got)}, GROSS[dtype])
    if wrong and question.keywords and _without_effect(target, case, question, got):
        return Probe(axis, "ignored", f"{question.keywords[0]}= is accepted and has no effect")
    return Probe(axis, "wrong" if wrong else "supported", wrong)


def _float32_gates(target: Target, asked: list[Probe]) -> list[Probe]:
    """Ask about float32 gates beside narrow inputs, if any of these is to be judged: beside others they are nothing."""
    axis, narrow = "float32 gates", ("bfloat16", "float16")
    if not any(p.axis in narrow for p in asked):
        return []
    if dtype := _first(asked, narrow):
        return [_declared(target, axis) or _ask(target, axis, dtype, QUESTIONS[axis])]
    return [Probe(axis, "refused", f"none of {', '.join(p.axis for p in asked if p.axis in narrow)} is taken")]


def _chunk_sizes(target: Target, dtype: str) -> Probe:
    """Ask about every chunk size with tokens for two chunks of 16. Taken are those that it does not refuse."""
    asked = {C: Question({"T": 17, "chunk": C}, ("chunk_size",)) for C in target.chunks or CHUNKS}
    found = {C: _ask(target, "chunk_size", dtype, question) for C, question in asked.items()}
    taken = tuple(C for C, p in found.items() if p.outcome != "refused")
    if not taken:
        return next(iter(found.values()))
    wrong = [f"C={C}: {found[C].reason}" for C in taken if found[C].outcome != "supported"]
    if not wrong and "chunk_size" not in target.named and all(_inert(target, dtype, asked[C]) for C in taken):
        # a right answer does not depend on C, so a C without effect is no finding, but it proves no invariance either
        return Probe("chunk_size", "refused", "keyword chunk_size not in the signature; swallowed, it changes no bit")
    return Probe("chunk_size", "wrong" if wrong else "supported", "; ".join(wrong), taken=taken)


def _inert(target: Target, dtype: str, question: Question) -> bool:
    case = _case(target, dtype, question)
    return _without_effect(target, case, question, _run(target, case, question).numbers(), limit=0.0)


def _without_effect(target: Target, case: Case, question: Question, got: dict, limit: float | None = None) -> bool:
    """True if the call without the question's keywords gives the same numbers: within what is gross, or `limit`."""
    try:
        without = _run(target, case, question, leave_out=question.keywords).numbers()
    except Exception:
        return False
    return not _difference(got, without, GROSS[case.dtype] if limit is None else limit)


def _run(target: Target, case: Case, question: Question, leave_out: tuple[str, ...] = ()) -> Result:
    v_first = "state_v_first" in question.keywords
    tensors, keywords = arguments(case, target, v_first)
    if question.strided:
        tensors = {name: strided(x) for name, x in tensors.items()}
    leaves = {n: x.detach().requires_grad_(question.backward) for n, x in tensors.items() if n not in leave_out}
    keywords = {name: value for name, value in keywords.items() if name not in leave_out}
    return call_tensors(target, case, leaves, keywords, question.backward, state_v_first=v_first)


def _parameters(function: Callable) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def _unknown(target: Target, case: Case, question: Question) -> str | None:
    """Return a keyword of the call that the target has no place for; None where it has, or where nobody can tell."""
    parameters = _parameters(target.function)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    tensors, keywords = arguments(case, target, "state_v_first" in question.keywords)
    passed = [*question.keywords, *list(tensors)[5:], *keywords, "output_final_state"]
    return next((name for name in passed if name not in parameters), None)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _difference(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float) -> str:
    """Describe the first tensor that is further off than `limit`, relative to its norm; empty where all are near."""
    for name, x in expected.items():
        if name not in got:
            return f"{name} is missing"
        if got[name].shape != x.shape:
            return f"{name} has shape {got[name].shape}, expected {x.shape}"
        if (error := _relative(got[name], x)) > limit:
            return f"{name} is not finite" if np.isinf(error) else f"{name} is off by {error:.1e} of its norm"
    return ""


def _relative(x: np.ndarray, y: np.ndarray) -> float:
    """Return ||x - y|| / ||y||, equal infinities and NaN counting as equal; infinity if anything else is not finite."""
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if not np.all(np.isfinite(np.where(same, 0.0, x)) & np.isfinite(np.where(same, 0.0, y))):
        return np.inf
    size = np.linalg.norm(np.where(np.isfinite(y), y, 0.0))
    return float(np.linalg.norm(np.where(same, 0.0, x) - np.where(same, 0.0, y)) / max(size, 1e-30))
