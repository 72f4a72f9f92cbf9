"""Count what the launches of chunk_triton's backward move and multiply: the part of `impls.traffic` for them."""

from impls.plan import ITEMSIZE, Launch, Problem
from kda_spec.costs import minimal_backward_bytes, tree_chunk_flops
from kda_spec.types import Sizes

WRITTEN = {
    "within": ("A", "X", "Z", "q_before", "k_before", "k_after", "last", "strength"),
    "replay": ("states", "errors", "o", "final"),
    "walk_back": ("adjoints", "solved", "dv", "dS0"),
    "token_gradients": ("dq", "dk", "dg", "dbeta", "of_A_log", "of_dt_bias"),
    "parameters": ("dA_log", "ddt_bias"),
}
_ROWS = ("q_before", "k_before", "k_after", "last", "strength", "A", "X", "Z")
"""What every value tile of a walk reads."""


def sizes_of(p: Problem, gate_dtype: str) -> dict[str, int]:
    """Return the bytes of the gradients that come in and go out."""
    item, gate, tokens, states = ITEMSIZE[p.dtype], ITEMSIZE[gate_dtype], p.B * p.T, p.HV * p.K * p.V * 4
    return {
        **dict.fromkeys(("dq", "dk"), tokens * p.H * p.K * item),
        **dict.fromkeys(("do", "dv"), tokens * p.HV * p.V * item),
        **dict.fromkeys(("dS", "dS0"), p.N * states),
        "dg": tokens * p.HV * p.K * gate,
        "dbeta": tokens * p.HV * gate,
        "dA_log": p.HV * 4,
        "ddt_bias": p.HV * p.K * 4,
    }


def repeats(launch: Launch, p: Problem) -> dict[str, int]:
    """Return how many times each tensor is asked for that is asked for more than once."""
    shared, chunks = p.HV // p.H, p.spans(launch.constants["C"]) if "C" in launch.constants else 0
    if launch.name == "within":
        return {"q": shared, "k": shared, "A_log": chunks, "dt_bias": chunks}
    if launch.name == "token_gradients":  # once to recompute, once behind the gradients to differentiate activations
        gates = 2 if p.gate != "none" else 1
        raw = dict.fromkeys(("q", "k"), shared + p.l2norm)
        return raw | {"g": gates, "A_log": gates * chunks, "dt_bias": gates * chunks}
    if launch.name == "parameters":
        return {}
    return dict.fromkeys(_ROWS, -(-p.V // launch.constants["BV"]))


def flops(launch: Launch, p: Problem) -> int:
    """Return the FLOPs of the matrix products of one launch."""
    if launch.name == "parameters":
        return 0
    c = launch.constants
    C, BK, V = c["C"], c["BK"], -(-p.V // c["BV"]) * c["BV"] if "BV" in c else 0
    count = {"within": _within, "replay": _replay, "walk_back": _walk_back, "token_gradients": _tokens}[launch.name]
    return p.spans(C) * p.HV * count(launch.buffers, C, BK, V, c["LEVELS"])


def _within(there: tuple[str, ...], C: int, BK: int, V: int, levels: int) -> int:
    """Return those of the tree, as the forward's, and of the second inverse."""
    tree = 2 * C * C * BK + levels * C * C * BK + (levels - 1) * 4 * C**3
    return tree + (2 * C**3 if "Z" in there else 0)


def _replay(there: tuple[str, ...], C: int, BK: int, V: int, levels: int) -> int:
    """Return two products with the state and one of C x C; as many again, less one, for outputs."""
    with_state, square = 2 * C * BK * V, 2 * C * C * V
    return 2 * with_state + square + (with_state + square if "o" in there else 0)


def _walk_back(there: tuple[str, ...], C: int, BK: int, V: int, levels: int) -> int:
    """Return two products with the state and one of C x C, and one of each for the outputs' gradients."""
    with_state, square = 2 * C * BK * V, 2 * C * C * V
    return 2 * with_state + square + (with_state + square if "do" in there else 0)


def _tokens(there: tuple[str, ...], C: int, BK: int, V: int, levels: int) -> int:
    """Return do and y with the states, e with their gradients, e with both; per level two products and two sums."""
    if "states" not in there:
        return 0
    values = 2 * 2 * C * BK * V + 2 * C * 2 * C * V + (2 * C * BK * V if "adjoints" in there else 0)
    return values + (levels * (4 + 4 + 2 + 2) + 4) * C * C * BK


def least(problem: Problem, chunk_size: int, gate_dtype: str) -> tuple[int, int]:
    """Return the bytes and FLOPs of a backward at least: a product of the forward has a gradient by either side.

    States count where there are an initial and a final one.
    """
    p = problem
    sizes, states = Sizes(B=p.B, T=p.T, H=p.H, HV=p.HV, K=p.K, V=p.V, N=p.N), (p.initial, p.final)
    moved = minimal_backward_bytes(sizes, p.dtype, gate_dtype, initial_state=states[0], final_state=states[1])
    return moved, 2 * tree_chunk_flops(sizes, chunk_size).matmul
