"""What an error is divided by. Gate Y: what legal roundings lose in the same case; gate R: a running error bound.

Y, per row (token and head; value column of a state), is the root mean square error of the simulators that round where
the precision contract says. Its floor does not depend on the candidate: the median row, the rounding of the output, and
the running error bound of one accumulator rounding a step,

    e_t = max(alpha_t) (e_{t-1} + ||S_{t-1}||) + beta_t ||k_t|| (||v_t|| + sqrt(K) ||k_t|| ||alpha_t S_{t-1}||)
          + ||S_t||   (times u)

which holds because ||(I - beta k k^T) Diag(alpha)|| <= max(alpha) inside the domain; for ||S|| stands the larger of
the norm and the size of the parts that a chunk adds up to S (`verify.bounds`). The same recurrence per value column, in
units of the operands' roundoff, is R (facts: Higham, Accuracy and Stability, chapter 3). No absolute tolerance
anywhere: `tiny` is the spacing of the output dtype near zero.
"""

from dataclasses import dataclass, replace

import numpy as np

from impls.contracts import PrecisionContract
from kda_spec.gates import (
    beta_sigmoid,
    beta_sigmoid_backward,
    l2norm,
    l2norm_backward,
    lower_bound_gate,
    lower_bound_gate_backward,
    softplus_gate,
    softplus_gate_backward,
)
from kda_spec.gradients import gradients
from kda_spec.recurrent import recurrent
from kda_spec.types import Inputs
from verify import bounds, simulators
from verify.cases import Activation, Case
from verify.exact import LARGEST, SMALLEST_STEP, UNIT_ROUNDOFF, round_to
from verify.simulators import Rounding
from verify.stopwatch import WATCH

OPERAND_SHARE = 0.5
"""Share of an operand's roundoff that the floor grants a kernel with narrow operands. Without it the judge's own
simulators, run at chunk lengths that Y does not use, were up to 53 (o) and 237 (S) times the yardstick where Y was
lucky."""


def activated(case: Case) -> Case:
    """Compute in float64 what the op computes inside, and return the case on activated inputs."""
    a = case.activation
    q, k = (l2norm(case.q), l2norm(case.k)) if a.l2norm else (case.q, case.k)
    g = case.g
    if a.gate == "softplus":
        g = softplus_gate(case.g, a.A_log, a.dt_bias)
    elif a.gate != "none":
        g = lower_bound_gate(case.g, a.lower_bound, a.A_log, a.dt_bias)
    beta = case.beta if a.sigmoid == "none" else beta_sigmoid(case.beta, a.sigmoid == "twice")
    return replace(case, q=q, k=k, g=g, beta=beta, activation=Activation())


def through_activations(case: Case, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Carry gradients of activated inputs back to the raw ones, A_log and dt_bias included."""
    a, out = case.activation, dict(grads)
    if a.l2norm:
        out["dq"], out["dk"] = l2norm_backward(grads["dq"], case.q), l2norm_backward(grads["dk"], case.k)
    if a.gate == "softplus":
        out["dg"], out["dA_log"], out["ddt_bias"] = softplus_gate_backward(grads["dg"], case.g, a.A_log, a.dt_bias)
    elif a.gate != "none":
        out["dg"], out["dA_log"], out["ddt_bias"] = lower_bound_gate_backward(
            grads["dg"], case.g, a.lower_bound, a.A_log, a.dt_bias
        )
    if a.sigmoid != "none":
        out["dbeta"] = beta_sigmoid_backward(grads["dbeta"], case.beta, a.sigmoid == "twice")
    if out.get("ddt_bias") is not None:
        out["ddt_bias"] = out["ddt_bias"].reshape(case.HV, case.K)
    return {name: x for name, x in out.items() if x is not None}


def rows(name: str, x: np.ndarray) -> np.ndarray:
    """View a tensor as rows [..., n] that are judged one by one: tokens and heads, columns of states, single betas."""
    if name in ("S", "dS0"):
        return np.swapaxes(x, -1, -2)
    return x[..., None] if name in ("dbeta", "dA_log") else x


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The definition's outputs of one case and, row by row, what errors in them are measured against.

    exact[name] has the shape of the tensor, legal[name] and never[name] the shape of its rows; never (gate R) covers o
    and S.
    """

    exact: dict[str, np.ndarray]
    legal: dict[str, np.ndarray]
    never: dict[str, np.ndarray]


def measure(case: Case, contract: PrecisionContract, backward: bool) -> Yardstick:
    """Run the definition and the simulators on a case."""
    with WATCH.on("definition"):
        return _measure(case, contract, backward)


def _measure(case: Case, contract: PrecisionContract, backward: bool) -> Yardstick:
    inner = activated(case)
    inputs = inner.inputs()
    rounding = Rounding.of(contract)
    exact, gradients_of = exact_of(case, inputs, inner, backward)
    runs = [_simulate(inner, inputs, rounding, C) for C in (1, 16, 64)[: 3 if case.T > 16 else 2]]
    floors, never = _floors(inner, inputs, contract, backward)
    if backward:
        grads = _simulate_backward(inner, inputs, rounding)
        runs.append(through_activations(case, grads))
        floors = _raw_floors(case, inner, floors, gradients_of, UNIT_ROUNDOFF[contract.accumulator])
    never = {name: never[name] + _output_rounding(name, exact[name], dtype_of(case, name)) for name in never}
    legal = {
        name: _legal(name, x, [run[name] for run in runs if name in run], dtype_of(case, name), floors[name])
        for name, x in exact.items()
    }
    return Yardstick(exact, legal, never)


def simulate(case: Case, contract: PrecisionContract, C: int) -> dict[str, np.ndarray]:
    """Run a case as a kernel with chunks of C tokens that rounds where the contract says; o and S in their dtypes."""
    inner = activated(case)
    outputs = _simulate(inner, inner.inputs(), Rounding.of(contract), C)
    return {name: round_to(x.astype(np.float64), dtype_of(case, name)) for name, x in outputs.items()}


def outputs(case: Case) -> dict[str, np.ndarray]:
    """Run the definition alone on a case; o and S in float64."""
    with WATCH.on("definition"):
        inner = activated(case)
        return exact_of(case, inner.inputs(), inner, False)[0]


def dtype_of(case: Case, name: str) -> str:
    """Return the dtype of an output or gradient: that of the inputs, the gates or the state."""
    if name in ("S", "dS0", "dA_log", "ddt_bias"):
        return case.state_dtype
    return case.gate_dtype if name in ("dg", "dbeta") else case.dtype


def exact_of(
    case: Case, inputs: Inputs, inner: Case, backward: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    outputs = recurrent(inputs)
    exact = {"o": outputs.o, "S": outputs.final_state}
    if not backward:
        return exact, {}
    d = gradients(inputs, inner.do, inner.dS)
    named = {"dq": d.q, "dk": d.k, "dv": d.v, "dg": d.g, "dbeta": d.beta, "dS0": d.initial_state}
    return exact | through_activations(case, named), named


def _output_rounding(name: str, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Bound the rounding of a row to its dtype: half a spacing of its size, and near zero the spacing of the format."""
    reference = rows(name, exact)
    return UNIT_ROUNDOFF[dtype] * np.linalg.norm(reference, axis=-1) + SMALLEST_STEP[dtype] * np.sqrt(
        reference.shape[-1]
    )


def _legal(name: str, exact: np.ndarray, runs: list[np.ndarray], dtype: str, floor) -> np.ndarray:
    reference = rows(name, exact)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = [np.linalg.norm(rows(name, round_to(x.astype(np.float64), dtype)) - reference, axis=-1) for x in runs]
    Y = np.sqrt(np.mean(np.square(errors), axis=0))
    median = np.median(Y) if Y.size else 0.0
    rounding = _output_rounding(name, exact, dtype)
    # a row beyond the dtype's range is not judged: infinity is then a right answer
    rounding = np.where(np.max(np.abs(reference), axis=-1, initial=0.0) > LARGEST[dtype] / 2, np.inf, rounding)
    return np.maximum.reduce([Y, np.broadcast_to(median, Y.shape), rounding, np.broadcast_to(floor, Y.shape)])


def _gather(inputs: Inputs, shapes: dict[str, tuple[int, ...]], one_run) -> dict[str, np.ndarray]:
    """Run every group of equal sequences heads first, and put the parts back where the tensors have them."""
    out = {name: np.zeros(shape) for name, shape in shapes.items()}
    for batch, tokens, states in inputs.runs():
        for name, x in one_run(batch, tokens, states).items():
            if name in ("S", "dS0", "never_S"):
                out[name][states] = x
            else:
                x = np.swapaxes(x, 1, 2)
                heads = out[name].shape[2]
                out[name][batch, tokens] = x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:]).sum(axis=3)
    return out


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    state = case.dS.shape
    return {
        "o": case.v.shape,
        "S": state,
        "dq": case.q.shape,
        "dk": case.k.shape,
        "dv": case.v.shape,
        "dg": case.g.shape,
        "dbeta": case.beta.shape,
        "dS0": state,
    }


def _simulate(case: Case, inputs: Inputs, rounding: Rounding, C: int) -> dict[str, np.ndarray]:
    def run(batch, tokens, states):
        arguments = (*inputs.heads_first(batch, tokens), case.initial[states], inputs.resolved_scale, rounding)
        o, S = simulators.sequential(*arguments) if C == 1 else simulators.chunked(*arguments, C)
        return {"o": o, "S": S}

    shapes = _shapes(case)
    return _gather(inputs, {name: shapes[name] for name in ("o", "S")}, run)


def _simulate_backward(case: Case, inputs: Inputs, rounding: Rounding) -> dict[str, np.ndarray]:
    def run(batch, tokens, states):
        return simulators.adjoint(
            *inputs.heads_first(batch, tokens),
            case.initial[states],
            inputs.resolved_scale,
            np.swapaxes(case.do[batch, tokens], 1, 2),
            case.dS[states],
            rounding,
        )

    shapes = _shapes(case)
    return _gather(inputs, {name: shapes[name] for name in simulators.GRADIENTS}, run)


def _floors(case: Case, inputs: Inputs, contract: PrecisionContract, backward: bool) -> tuple[dict, dict]:
    """Return the floors of Y and, in the operand's roundoff, gate R of o and S."""
    scale, u = abs(inputs.resolved_scale), UNIT_ROUNDOFF[contract.accumulator]
    u_operand = max(UNIT_ROUNDOFF[contract.operand], u)
    narrow = OPERAND_SHARE * u_operand if u_operand > u else 0.0
    least = SMALLEST_STEP[contract.operand] / (2 * u_operand) if narrow else 0.0

    def run(batch, tokens, states):
        arrays, S0 = inputs.heads_first(batch, tokens), case.initial[states]
        sizes = bounds.forward(*arrays, S0, least)
        last, noise = (sizes[x][..., -1, :] if arrays[0].shape[-2] else 0 * S0[..., 0, :] for x in ("e", "noise"))
        reach = scale * (np.linalg.norm(arrays[0], axis=-1) + least * np.sqrt(case.K))
        read = reach * np.linalg.norm(np.hypot(sizes["noise"], sizes["s"]), axis=-1)
        bound = {"never_o": reach * np.linalg.norm(sizes["read"], axis=-1), "never_S": last}
        out = bound | {"o": np.hypot(u * bound["never_o"], narrow * read), "S": np.hypot(u * last, narrow * noise)}
        if backward:
            do = np.swapaxes(case.do[batch, tokens], 1, 2)
            grads = bounds.backward(*arrays, scale, do, case.dS[states], sizes)
            out |= {name: max(u, narrow / 4) * x for name, x in grads.items()}
        return out

    states, values, keys = (case.N, case.HV, case.V), case.beta.shape, case.q.shape[:3]
    shapes = {"o": values, "S": states, "never_o": values, "never_S": states}
    if backward:
        shapes |= {"dq": keys, "dk": keys, "dv": values, "dg": values, "dbeta": values, "dS0": states}
    floors = _gather(inputs, shapes, run)
    return floors, {name: u_operand * floors.pop(f"never_{name}") for name in ("o", "S")}


def _raw_floors(case: Case, inner: Case, floors: dict, grads: dict, u: float) -> dict[str, np.ndarray]:
    """Carry the floors of gradients through the activations: |derivative| * floor, plus a rounding of every term."""
    a, out = case.activation, dict(floors)
    if a.l2norm:
        for name, x in (("dq", case.q), ("dk", case.k)):
            length = np.sqrt(np.sum(x * x, axis=-1) + 1e-6)
            out[name] = (floors[name] + 2 * u * np.linalg.norm(grads[name], axis=-1)) / length
    if a.gate != "none":
        slope, by_A, blur, argument = _gate_slopes(case, inner)
        # a floor is the norm of a row; errors of its channels, and of tokens that a parameter sums over, add in squares
        loss, size = floors["dg"][..., None] / np.sqrt(case.K), u * np.abs(grads["dg"])
        by_x, by_A = (
            np.hypot(loss * slope, size * (slope + blur)),
            np.hypot(loss * by_A, size * (by_A + blur * argument)),
        )
        out["dg"] = np.linalg.norm(by_x, axis=-1)
        out["dA_log"] = np.linalg.norm(np.linalg.norm(by_A, axis=-1), axis=(0, 1))
        out["ddt_bias"] = np.linalg.norm(np.linalg.norm(by_x, axis=-1), axis=(0, 1))
    if a.sigmoid != "none":
        slope = np.abs(beta_sigmoid_backward(np.ones_like(case.beta), case.beta, a.sigmoid == "twice"))
        # y (1 - y) is what everybody computes; 1 - y cancels for large inputs and leaves one rounding of y
        out["dbeta"] = floors["dbeta"] * slope + 2 * u * np.abs(grads["dbeta"])
    return out


def _gate_slopes(case: Case, inner: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | float, np.ndarray]:
    """Return |dg/dx|, |dg/dA_log|, what 1 - sigmoid loses by cancellation, and |x + dt_bias|, [B, T, HV, K]."""
    a, ones = case.activation, np.ones_like(case.g)
    argument = np.abs(case.g + np.reshape(a.dt_bias, (case.HV, case.K)))
    if a.gate == "softplus":
        return np.abs(softplus_gate_backward(ones, case.g, a.A_log, a.dt_bias)[0]), np.abs(inner.g), 0.0, argument
    slope = np.abs(lower_bound_gate_backward(ones, case.g, a.lower_bound, a.A_log, a.dt_bias)[0])
    rate = 1.0 if a.A_log is None else np.exp(a.A_log)[:, None]
    return slope, slope * argument, np.abs(inner.g) * rate, argument
