"""What the probe says about small targets with one known refusal, deafness or fault each, and what domain is left."""

import inspect
import sys
import warnings

import numpy as np
import pytest
import torch

from verify.families import materialise
from verify.probe import QUESTIONS, probe, restrict, shares
from verify.recipes import AXES, DTYPES, Recipe
from verify.resolve import resolve
from verify.targets import STANDARD, Target, call, default_contract

KEYWORDS = {axis: question.keywords[0] for axis, question in QUESTIONS.items() if question.keywords}


def activated(q, k, g, beta, norm, gate, sigmoid, doubled, lower_bound, A_log, dt_bias):
    if norm:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if gate:
        x = g + (0 if dt_bias is None else dt_bias.double().reshape(g.shape[2:]))
        rate = 1.0 if A_log is None else A_log.double().exp()[:, None]
        g = -rate * torch.nn.functional.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)
    return q, k, g, (1 + doubled) * torch.sigmoid(beta) if sigmoid else beta


def loop(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    lower_bound=None,
    A_log=None,
    dt_bias=None,
    state_v_first=False,
    cu_seqlens=None,
    chunk_size=None,
):
    """Run KDA token by token in float64, with everything that FLA's signature has."""
    dtype = q.dtype
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    q, k, g, beta = activated(
        q,
        k,
        g,
        beta,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
        A_log,
        dt_bias,
    )
    q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    spans = spans if ends is None else [(0, a, b) for a, b in zip(ends, ends[1:], strict=False)]
    rows, states = [[] for _ in range(q.shape[0])], []
    for n, (b, start, stop) in enumerate(spans):
        S = v.new_zeros(v.shape[2], q.shape[-1], v.shape[-1])
        if initial_state is not None:
            S = initial_state[n].double()
            S = S.transpose(-1, -2) if state_v_first else S
        for t in range(start, stop):
            S = g[b, t].exp()[..., None] * S
            delta = beta[b, t][:, None] * (v[b, t] - torch.einsum("hk,hkv->hv", k[b, t], S))
            S = S + torch.einsum("hk,hv->hkv", k[b, t], delta)
            rows[b].append(scale * torch.einsum("hk,hkv->hv", q[b, t], S))
        states.append(S.transpose(-1, -2) if state_v_first else S)
    o = torch.stack([torch.stack(x) for x in rows]) if rows[0] else torch.zeros_like(v)
    return o.to(dtype), torch.stack(states) if output_final_state else None


def without(*names):
    """Make a target that swallows the named keywords: FLA's own **kwargs."""

    def deaf(q, k, v, g, beta, output_final_state=False, **kwargs):
        kept = {name: x for name, x in kwargs.items() if name not in names}
        return loop(q, k, v, g, beta, output_final_state=output_final_state, **kept)

    return deaf


def no_packing(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    return loop(q, k, v, g, beta, scale, initial_state, output_final_state)


def one_group(q, k, v, *rest, **keywords):
    if v.shape[2] != q.shape[2]:
        raise NotImplementedError(f"grouped heads\nH={q.shape[2]}, HV={v.shape[2]}")
    return loop(q, k, v, *rest, **keywords)


def subtracts_gates(q, k, v, g, beta, **keywords):
    return loop(q, k, v, g + (g.sum() - g.sum()), beta, **keywords)


def detached(*tensors, **keywords):
    o, S = loop(*(x.detach() for x in tensors), **keywords)
    return o, S if S is None else S.detach()


def detached_gates(q, k, v, g, beta, **keywords):
    return loop(q, k, v, g.detach(), beta, **keywords)


def bfloat16_only(q, *rest, **keywords):
    assert all(x.dtype == torch.bfloat16 for x in (q, *rest))
    return loop(q, *rest, **keywords)


def contiguous_only(q, *rest, **keywords):
    if not q.is_contiguous():
        raise ValueError
    return loop(q, *rest, **keywords)


def stride_blind(q, *rest, **keywords):
    return loop(torch.as_strided(q, q.shape, torch.empty_like(q).stride()), *rest, **keywords)


def in_float32(*tensors, **keywords):
    o, S = loop(*tensors, **keywords)
    return o.float().to(o.dtype), S.float()


def always_float32(*tensors, **keywords):
    o, S = loop(*tensors, **keywords)
    return o.float(), S


def forgets_the_state(*tensors, **keywords):
    return loop(*tensors, **keywords)[0], None


def raises(*tensors, **keywords):
    raise RuntimeError("no kernel image\nis available")


def state_demanded(q, k, v, g, beta, initial_state, output_final_state, **kwargs):
    return loop(q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state, **kwargs)


def some_chunks(*tensors, chunk_size=64, **keywords):
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size must be 32 or 64, got {chunk_size}")
    o, S = loop(*tensors, **keywords)
    return (-o if chunk_size == 32 else o), S


def no_state_without_tokens(q, *rest, **keywords):
    o, S = loop(q, *rest, **keywords)
    return o, S if q.shape[1] else torch.empty_like(S)


def three_results(*tensors, **keywords):
    return (*loop(*tensors, **keywords), None)


def one_result(*tensors, **keywords):
    return loop(*tensors, **keywords)[0]


def talkative(*tensors, **keywords):
    print("using the fallback")
    print("slow", file=sys.stderr)
    warnings.warn("install something", stacklevel=1)
    return loop(*tensors, **keywords)


def unable(reason):
    return "refused", reason


def lacking(*axes):
    return {axis: unable(f"keyword {KEYWORDS[axis]} not in the signature") for axis in axes}


def deaf_to(*axes):
    return {axis: ("ignored", f"{KEYWORDS[axis]}= is accepted and has no effect") for axis in axes}


FINE = ("supported", "")
SWALLOWED = {"chunk_size": unable("keyword chunk_size not in the signature; swallowed, it changes no bit")}

TARGETS = {
    "takes everything": (loop, {}),
    "talks": (talkative, SWALLOWED),
    "demands a state": (state_demanded, SWALLOWED),
    "deaf to scale": (without("scale"), deaf_to("scale") | SWALLOWED),
    "deaf to lower_bound": (without("lower_bound"), deaf_to("lower_bound") | SWALLOWED),
    "deaf to all": (without(*STANDARD), deaf_to(*KEYWORDS) | SWALLOWED),
    "no cu_seqlens": (
        no_packing,
        lacking(*(set(KEYWORDS) - {"scale", "initial_state", "lower_bound", "allow_neg_eigval"}))
        | {
            "lower_bound": unable("keyword lower_bound not in the signature"),
            "allow_neg_eigval": unable("keyword allow_neg_eigval not in the signature"),
            "chunk_size": unable("keyword chunk_size not in the signature"),
        },
    ),
    "no groups": (one_group, SWALLOWED | {"HV > H": unable("NotImplementedError: grouped heads")}),
    "NaN for -inf": (subtracts_gates, SWALLOWED | {"g = -inf": ("wrong", "o is not finite")}),
    "no autograd": (detached, SWALLOWED | {"backward": unable("RuntimeError: element 0 of tensors does not require")}),
    "no gradient of g": (detached_gates, SWALLOWED | {"backward": ("wrong", "dg is off by 1.0e+00")}),
    "bfloat16 only": (
        bfloat16_only,
        SWALLOWED | dict.fromkeys(("float32", "float16", "float64", "float32 gates"), unable("AssertionError")),
    ),
    "contiguous only": (contiguous_only, SWALLOWED | {"strided inputs": unable("ValueError")}),
    "blind to strides": (stride_blind, SWALLOWED | {"strided inputs": ("wrong", "o is not finite")}),
    "computes in float32": (in_float32, SWALLOWED | {"float64": ("wrong", "o is off by ")}),
    "o in float32": (
        always_float32,
        SWALLOWED
        | {
            "float64": ("wrong", "o is off by "),
            "dtype of o": ("wrong", "o comes in float32 for bfloat16 inputs; o comes in float32 for float16 inputs; "),
        },
    ),
    "one chunk size wrong": (some_chunks, {"chunk_size": ("wrong", "C=32: o is off by 2.0e+00 of its norm")}),
    "T = 0 unwritten": (no_state_without_tokens, SWALLOWED | {"T = 0": ("wrong", "S is not finite")}),
    "three results": (
        three_results,
        dict.fromkeys(
            (*DTYPES, *QUESTIONS), ("wrong", "expected (o, final_state), two tensors, got (Tensor, Tensor, NoneType)")
        )
        | {"chunk_size": ("wrong", "C=16: expected (o, final_state)")},
    ),
    "no state": (
        forgets_the_state,
        dict.fromkeys(
            (*DTYPES, *QUESTIONS), ("wrong", "expected (o, final_state), two tensors, got (Tensor, NoneType)")
        )
        | {"chunk_size": ("wrong", "C=16: expected (o, final_state)")},
    ),
    "one result": (
        one_result,
        dict.fromkeys((*DTYPES, *QUESTIONS), ("wrong", "expected (o, final_state), two tensors, got Tensor"))
        | {"chunk_size": ("wrong", "C=16: expected (o, final_state)")},
    ),
}


def foreign(function) -> Target:
    named = frozenset(inspect.signature(function).parameters) & STANDARD
    return Target("a kernel", function, default_contract, DTYPES, named=named, foreign=True)


@pytest.mark.parametrize("name", TARGETS)
def test_every_axis_gets_its_outcome_and_its_reason(name):
    function, special = TARGETS[name]
    found = {p.axis: p for p in probe(foreign(function))}
    assert set(found) == {*DTYPES, *AXES, "state_v_first", "strided inputs", "backward", "dtype of o"}
    for axis, p in found.items():
        outcome, reason = special.get(axis, FINE)
        assert (p.outcome, p.reason[: len(reason)]) == (outcome, reason), p
        assert (p.reason == "") == (outcome == "supported")


def outcomes(function, dtypes) -> dict[str, str]:
    return {p.axis: p.outcome for p in probe(foreign(function), dtypes)}


def test_only_the_dtypes_that_are_to_be_judged_are_asked():
    found = outcomes(in_float32, ("float32",))
    assert set(found) & set(DTYPES) == {"float32"}
    assert "wrong" not in found.values()
    assert "float32 gates" not in found
    assert outcomes(in_float32, ("bfloat16",))["float32 gates"] == "supported"
    assert outcomes(in_float32, ("float64",))["float64"] == "wrong"


def test_a_kernel_that_takes_none_of_the_asked_dtypes_but_others_refuses_them():
    assert outcomes(bfloat16_only, ("float32", "float64")) == {"float32": "refused", "float64": "refused"}


@pytest.mark.parametrize("dtypes", [DTYPES, ("float32",)], ids=len)
def test_a_kernel_that_raises_in_every_dtype_cannot_run(dtypes):
    (found,) = probe(foreign(raises), dtypes)
    assert (found.axis, found.outcome) == ("every dtype", "refused")
    assert found.reason == "it cannot run here: RuntimeError: no kernel image"


def test_prints_and_warnings_go_nowhere(capfd, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(foreign(talkative))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    "name, dtypes, chunks, backward, closed",
    [
        ("takes everything", DTYPES, (16, 32, 64), True, set()),
        ("deaf to scale", DTYPES, (), True, {"scale", "chunk_size"}),
        ("NaN for -inf", DTYPES, (), True, {"chunk_size"}),
        ("no autograd", DTYPES, (), False, {"backward", "chunk_size"}),
        ("bfloat16 only", ("bfloat16",), (), True, {"float32", "float16", "float64", "float32 gates", "chunk_size"}),
        ("one chunk size wrong", DTYPES, (32, 64), True, set()),
    ],
)
def test_the_domain_shrinks_by_refused_and_ignored_axes_only(name, dtypes, chunks, backward, closed):
    target = foreign(TARGETS[name][0])
    narrow = restrict(target, probe(target))
    assert (narrow.dtypes, narrow.chunks, narrow.backward, set(narrow.refused)) == (dtypes, chunks, backward, closed)


def test_a_restricted_target_is_called_with_none_for_a_state_that_it_demands():
    target = foreign(state_demanded)
    case = materialise(Recipe(T=3, K=2, V=2))
    with pytest.raises(TypeError, match="initial_state"):
        call(target, case)
    result = call(restrict(target, probe(target)), case)
    assert result.S.shape == (1, 1, 2, 2)


def test_a_declared_refusal_is_not_asked_again():
    target = Target("declared", loop, default_contract, ("float32",), backward=False, refused={"varlen": "no packing"})
    found = {p.axis: (p.outcome, p.reason) for p in probe(target)}
    assert found["varlen"] == ("refused", "no packing")
    assert found["backward"] == ("refused", "declared: no backward")
    assert found["float64"] == ("refused", "declared: takes float32")
    assert found["float32 gates"] == ("refused", "none of bfloat16, float16 is taken")


def test_a_row_of_the_table_takes_all_but_chunks():
    target = resolve("recurrent_torch", "cpu")
    found = probe(target)
    assert {p.axis for p in found if p.outcome != "supported"} == {"chunk_size"}
    assert restrict(target, found).dtypes == target.dtypes


def test_shares_are_those_of_the_strategy():
    known = shares()
    assert set(known) == set(AXES)
    # the strategy's own odds: one recipe in four is packed, one in five has a scale, three in four draw a chunk size
    expected = {
        "varlen": 1 / 4,
        "scale": 1 / 5,
        "chunk_size": 3 / 4,
        "initial_state": 1 / 2,
        "use_qk_l2norm_in_kernel": 1 / 6,
    }
    assert np.allclose([known[axis] for axis in expected], list(expected.values()), atol=0.1)
    assert all(0 < share < 1 for share in known.values())
    assert {p.axis: p.share for p in probe(foreign(one_result))}["varlen"] == known["varlen"]


def test_the_torch_path_of_transformers():
    module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear").__name__
    target = resolve(f"{module}:chunk_kimi_delta_attention", "cpu")
    found = {p.axis: p for p in probe(target)}
    by_outcome = {
        name: {p.axis for p in found.values() if p.outcome == name} for name in ("refused", "ignored", "wrong")
    }
    flags = {"use_gate_in_kernel", "lower_bound", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"}
    assert by_outcome == {
        "refused": {"HV > H", "varlen"},
        "ignored": {"scale", "state_v_first", *flags},
        "wrong": {"g = -inf", "float64"},
    }
    assert restrict(target, found.values()).chunks == (16, 32, 64)


def test_the_recurrent_torch_path_of_transformers_demands_a_state_and_takes_infinite_gates():
    module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear").__name__
    found = {p.axis: p.outcome for p in probe(resolve(f"{module}:recurrent_kimi_delta_attention", "cpu"))}
    assert (found["float32"], found["initial_state"], found["g = -inf"]) == ("supported",) * 3
    assert (found["chunk_size"], found["scale"]) == ("refused", "ignored")
