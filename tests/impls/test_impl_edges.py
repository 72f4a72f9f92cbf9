"""Bad calls are refused at the edge, with the argument's name, what was expected and what came."""

import inspect
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import impls
from impls import ChunkTorchConfig, chosen, chunk_kda, find, fused_recurrent_kda, kda, table
from impls.configs import invalid
from impls.contracts import PrecisionContract, unit_roundoff

ROOT = Path(__file__).parents[2]
B, T, H, HV, K, V = 2, 5, 2, 4, 3, 6


def good(**changes):
    arguments = {
        "q": torch.zeros(B, T, H, K),
        "k": torch.zeros(B, T, H, K),
        "v": torch.zeros(B, T, HV, V),
        "g": torch.zeros(B, T, HV, K),
        "beta": torch.zeros(B, T, HV),
    }
    return arguments | changes


def packed(*bounds, **changes):
    one = {name: x[:1] for name, x in good().items()}
    return one | {"cu_seqlens": torch.tensor(bounds)} | changes


GATE = {"use_gate_in_kernel": True}
META = {name: x.to("meta") for name, x in good().items()}
CHUNKED = find("chunk_torch").call
KNOWN = f"known: {', '.join(row.name for row in impls.IMPLEMENTATIONS)}"

BAD = [
    (chunk_kda, good(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    (chunk_kda, good(q=torch.zeros(B, T, K)), ValueError, "q must have 4 dimensions, got 3: [2, 5, 3]"),
    (chunk_kda, good(beta=torch.zeros(B, T, HV, 1)), ValueError, "beta must have 3 dimensions, got 4"),
    (chunk_kda, good(q=torch.zeros(B, T, H, K).long()), TypeError, "q must be one of float64, float32, bfloat16"),
    (chunk_kda, good(k=torch.zeros(B, T, H, K).half()), TypeError, "k must be one of float32, got float16"),
    (chunk_kda, good(v=torch.zeros(B, T, HV, V).double()), TypeError, "v must be one of float32, got float64"),
    (chunk_kda, good(g=torch.zeros(B, T, HV, K).int()), TypeError, "got int32"),
    (chunk_kda, good(k=torch.zeros(B, T, H, K + 1)), ValueError, "k must have shape [B, T, H, K] = [2, 5, 2, 3], got"),
    (chunk_kda, good(v=torch.zeros(B, T + 1, HV, V)), ValueError, "v must have shape [B, T, HV, V] = [2, 5, 4, 6]"),
    (chunk_kda, good(g=torch.zeros(B, T, H, K)), ValueError, "g must have shape [B, T, HV, K] = [2, 5, 4, 3]"),
    (chunk_kda, good(beta=torch.zeros(B, T, H)), ValueError, "beta must have shape [B, T, HV] = [2, 5, 4], got"),
    (
        chunk_kda,
        good(v=torch.zeros(B, T, 3, V)),
        ValueError,
        "HV, the heads of v, must be a positive multiple of H = 2",
    ),
    (chunk_kda, good(q=torch.zeros(B, T, H, 257)), ValueError, "K, the last size of q, must be from 1 to 256, got 257"),
    (chunk_kda, good(v=torch.zeros(B, T, HV, 0)), ValueError, "V, the last size of v, must be from 1 to 256, got 0"),
    (chunk_kda, good(k=torch.zeros(B, T, H, K, device="meta")), ValueError, "k must be on cpu like q, got meta"),
    (
        chunk_kda,
        good(initial_state=torch.zeros(B, HV, V, K)),
        ValueError,
        "initial_state must have shape [N, HV, K, V]",
    ),
    (
        chunk_kda,
        good(initial_state=torch.zeros(B, HV, K, V), state_v_first=True),
        ValueError,
        "initial_state must have shape [N, HV, V, K] = [2, 4, 6, 3], got [2, 4, 3, 6]",
    ),
    (chunk_kda, good(initial_state=torch.zeros(B, HV, K, V).double()), TypeError, "got float64"),
    (chunk_kda, good(initial_state=0.0), TypeError, "initial_state must be a torch.Tensor, got float"),
    (chunk_kda, packed(0, 5, initial_state=torch.zeros(2, HV, K, V)), ValueError, "= [1, 4, 3, 6], got [2, 4, 3, 6]"),
    (chunk_kda, good(cu_seqlens=torch.tensor([0, 5])), ValueError, "q must have batch size B = 1 with cu_seqlens, got"),
    (chunk_kda, packed(0.0, 5.0), TypeError, "cu_seqlens must be an int64 or int32 tensor, got torch.float32"),
    (chunk_kda, packed([0, 5]), ValueError, "cu_seqlens must have shape [N + 1], got [1, 2]"),
    (chunk_kda, packed(0, 4), ValueError, "cu_seqlens must run from 0 to T = 5, got 0 to 4"),
    (chunk_kda, packed(1, 5), ValueError, "cu_seqlens must run from 0 to T = 5, got 1 to 5"),
    (chunk_kda, packed(0, 4, 2, 5), ValueError, "cu_seqlens must never fall, got 4 then 2 at positions 1 and 2"),
    (chunk_kda, good(cu_seqlens_cpu=torch.tensor([0, 5])), ValueError, "expected both, got cu_seqlens=None"),
    (chunk_kda, packed(0, 5, cu_seqlens_cpu=torch.tensor([0, 2, 5])), ValueError, "cu_seqlens_cpu must have shape"),
    (chunk_kda, packed(0, 2, 5, cu_seqlens_cpu=torch.tensor([0, 3, 5])), ValueError, "cu_seqlens_cpu must equal"),
    (chunk_kda, good(**GATE), ValueError, "A_log must be given with use_gate_in_kernel=True"),
    (chunk_kda, good(A_log=torch.zeros(H), **GATE), ValueError, "A_log must have HV = 4 elements, got 2: [2]"),
    (
        chunk_kda,
        good(A_log=torch.zeros(HV), dt_bias=torch.zeros(HV), **GATE),
        ValueError,
        "dt_bias must have HV * K = 12 elements, got 4: [4]",
    ),
    (chunk_kda, good(A_log=[0.0] * HV, **GATE), TypeError, "A_log must be a torch.Tensor, got list"),
    (chunk_kda, good(q=torch.zeros(B, T, H, K).to_sparse()), TypeError, "q must be a dense tensor, got layout"),
    (chunk_kda, good(scale=torch.ones(())), TypeError, "scale must be a Python number, got Tensor"),
    (chunk_kda, good(scale="1"), TypeError, "scale must be a Python number, got str"),
    (chunk_kda, good(lower_bound="-5", **GATE), TypeError, "lower_bound must be a Python number, got str"),
    (chunk_kda, good(lower_bound=0.5, **GATE), ValueError, "lower_bound must be negative and finite, got 0.5"),
    (chunk_kda, good(lower_bound=-torch.inf, **GATE), ValueError, "lower_bound must be negative and finite, got -inf"),
    (chunk_kda, good(allow_neg_eigval=True), ValueError, "requires use_beta_sigmoid_in_kernel=True"),
    (chunk_kda, good(chunk_size=48), ValueError, "chunk_torch takes chunk sizes (16, 32, 64, 128), not 48"),
    (CHUNKED, good(chunk_size=48), ValueError, "chunk_size must be one of (16, 32, 64, 128), got 48"),
    (CHUNKED, good(chunk_size="16"), ValueError, "chunk_size must be of type int, got '16'"),
    (chunk_kda, good(chunk_size=32.0), ValueError, "chunk_size must be of type int, got 32.0"),
    (chunk_kda, good(cp_context=object()), ValueError, "pass each part's final_state on"),
    (chunk_kda, good(use_graph=True), ValueError, "use_graph must be False: these ops bound nothing by it"),
    (chunk_kda, good(max_num_seqs=3), ValueError, "max_num_seqs must be None without use_graph=True, got 3"),
    (chunk_kda, good(state_v_first=True, transpose_state_layout=True), ValueError, "expected one, got both"),
    (chunk_kda, good(state_interval=0), ValueError, "state_interval must be a positive number of tokens, got 0"),
    (
        chunk_kda,
        good(return_intermediate_states=True, state_interval=40),
        ValueError,
        "state_interval must be a multiple of the chunk size 16, got 40",
    ),
    (
        chunk_kda,
        good(return_intermediate_states=True, q=torch.zeros(B, T, H, K, requires_grad=True)),
        ValueError,
        "needs torch.no_grad() or inference mode",
    ),
    (chunk_kda, good(scales=1.0), TypeError, "scales"),
    (fused_recurrent_kda, good(chunk_size=16), TypeError, "chunk_size"),
    (kda, good(scales=1.0), TypeError, "kda() got an unexpected keyword argument 'scales'"),
    (kda, good(launch=()), TypeError, "kda() got an unexpected keyword argument 'launch'"),
    (
        kda,
        good(op=None, implementation="chunk_torch"),
        TypeError,
        "kda() got an unexpected keyword argument 'op'",
    ),
    (kda, good(use_graph=True, implementation="chunk_torch"), ValueError, "use_graph must be False"),
    (chunk_kda, META, ValueError, "chunk_torch runs on cpu, cuda, not on meta"),
    (fused_recurrent_kda, META, ValueError, "recurrent_torch runs on cpu, cuda, not on meta"),
    (kda, META, ValueError, "recurrent_torch runs on cpu, cuda, not on meta; chunk_torch is of the form chunk"),
    (CHUNKED, META, ValueError, "chunk_torch runs on cpu, cuda, not on meta"),
    (kda, good(implementation="chunk_tritn"), KeyError, KNOWN),
    (kda, good(config=ChunkTorchConfig()), ValueError, "implementation must be named where a config is given"),
    (
        kda,
        good(implementation="recurrent_torch", chunk_size=16),
        ValueError,
        "chunk_size must be None for recurrent_torch",
    ),
    (kda, good(implementation="recurrent_torch", config=ChunkTorchConfig()), TypeError, "a RecurrentTorchConfig"),
    (CHUNKED, good(config="fast"), TypeError, "config must be a ChunkTorchConfig for chunk_torch, got 'fast'"),
    (CHUNKED, good(config=ChunkTorchConfig(16), chunk_size=32), ValueError, "config.chunk_size = 16, got 32"),
    (CHUNKED, good(config=ChunkTorchConfig(heads=0)), ValueError, "heads must be at least 1, got 0"),
]


@pytest.mark.parametrize("function, arguments, error, message", BAD, ids=[case[3] for case in BAD])
def test_bad_calls_are_refused_with_a_message(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(**arguments)
    assert message in str(raised.value)


def test_the_good_call_is_good():
    for function in (chunk_kda, fused_recurrent_kda, kda):
        o, S = function(**good())
        assert o.shape == (B, T, HV, V) and S is None


FLA_CHUNK = """q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel
    use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states
    state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs"""
FLA_RECURRENT = """q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel
    use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens"""


@pytest.mark.parametrize("function, names", [(chunk_kda, FLA_CHUNK), (fused_recurrent_kda, FLA_RECURRENT)])
def test_positional_arguments_stand_in_the_order_of_fla_0_6(function, names):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()


FLAGS = [p.name for p in inspect.signature(chunk_kda).parameters.values() if p.annotation in (bool, bool | None)]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_true_or_false_and_none_counts_as_false(draw, flag):
    inputs = draw(1, 20, 1, 1, 3, 2)
    takers = [kda, *(f for f in (chunk_kda, fused_recurrent_kda) if flag in inspect.signature(f).parameters)]
    for function in takers:
        for wrong in (1, "yes", torch.tensor(True)):
            with pytest.raises(TypeError, match=f"^{flag} must be True or False, got "):
                function(*inputs, **{flag: wrong})
        (o, S), (expected, _) = function(*inputs, **{flag: None}), function(*inputs)
        assert torch.equal(o, expected) and S is None


def test_kda_takes_every_keyword_of_chunk_kda(draw):
    inputs = draw(1, 20, 1, 1, 3, 2)
    parameters = inspect.signature(chunk_kda).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert torch.equal(kda(*inputs, **keywords)[0], chunk_kda(*inputs)[0])
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, S = kda(*inputs, output_final_state=True, disable_recompute=True, transpose_state_layout=True)
    assert S.shape == (1, 1, 2, 3)


def test_the_old_name_of_the_state_layout_works_and_warns_where_it_is_used(draw):
    inputs = draw(1, 4, 1, 1, 3, 2)
    for function in (chunk_kda, fused_recurrent_kda, kda):
        with pytest.warns(DeprecationWarning, match="state_v_first") as warned:
            _, S = function(*inputs, output_final_state=True, transpose_state_layout=True)
        assert warned[0].filename == __file__
        assert torch.equal(S, function(*inputs, output_final_state=True, state_v_first=True)[1])


def test_accepted_flags_change_nothing(draw):
    inputs = draw(1, 40, 1, 1, 3, 2, resets=True)
    o, _ = chunk_kda(*inputs)
    assert torch.equal(chunk_kda(*inputs, safe_gate=True, disable_recompute=True, lower_bound=-5.0)[0], o)


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({}, None),
        ({"device": "cuda:1", "dtype": "bfloat16", "K": 256, "V": 1, "backward": True, "chunk_size": 64}, None),
        ({"form": "chunk"}, None),
        ({"form": "recurrent"}, "is of the form chunk, not recurrent"),
        ({"device": "xpu"}, "runs on cpu, cuda, not on xpu"),
        ({"dtype": "int8"}, "takes float64, float32, bfloat16, float16, not int8"),
        ({"K": 257}, "takes K and V from 1 to 256, not K = 257, V = 1"),
        ({"chunk_size": 8}, "takes chunk sizes (16, 32, 64, 128), not 8"),
    ],
)
def test_the_table_says_what_is_supported_or_why_not(asked, reason):
    said = find("chunk_torch").supports(**asked)
    assert said is None if reason is None else said == f"chunk_torch {reason}"


@pytest.fixture
def ran(monkeypatch):
    """Return the names of the rows that ran, of a table where a narrow row stands before the other of each form."""
    names = []

    def noted(row):
        def load():
            names.append(row.name)
            return row.load()

        return replace(row, load=load)

    rows = impls.IMPLEMENTATIONS
    first = [replace(row, name=f"narrow_{row.form}", dtypes=("float32",), backward=False) for row in rows]
    monkeypatch.setattr(table, "IMPLEMENTATIONS", tuple(noted(row) for row in (*first, *rows)))
    return names


def test_the_public_ops_take_the_first_row_that_supports_the_inputs(draw, ran):
    few, many = draw(1, 16, 1, 1, 3, 2), draw(1, 17, 1, 1, 3, 2)
    kda(*few), kda(*many), kda(*few, chunk_size=16), chunk_kda(*few), fused_recurrent_kda(*many)
    assert ran == [f"narrow_{form}" for form in ("recurrent", "chunk", "chunk", "chunk", "recurrent")]
    ran.clear()
    wide, A_log = [x.double() for x in few], torch.zeros(1, requires_grad=True)
    kda(*wide), chunk_kda(*many, A_log=A_log, use_gate_in_kernel=True), kda(*many, implementation="chunk_torch")
    assert ran == ["recurrent_torch", "chunk_torch", "chunk_torch"]


def test_where_no_row_supports_the_inputs_every_one_says_why():
    with pytest.raises(ValueError) as raised:
        chosen(form="chunk", dtype="int8")
    reasons = "; ".join(row.supports(form="chunk", dtype="int8") for row in impls.IMPLEMENTATIONS)
    assert str(raised.value) == f"no implementation supports these inputs: {reasons}"
    assert chosen(form="chunk", device="cuda", backward=True) is find("chunk_triton")
    assert chosen(form="chunk", device="cpu") is find("chunk_torch")


@pytest.mark.parametrize("row", impls.IMPLEMENTATIONS, ids=lambda row: row.name)
def test_rows_survive_pickling(row):
    copy = pickle.loads(pickle.dumps(row))
    assert replace(copy, contract=row.contract) == row
    assert copy.contract("bfloat16") == row.contract("bfloat16")


@pytest.mark.parametrize(
    "config, wrong",
    [
        (ChunkTorchConfig(), None),
        (ChunkTorchConfig(128, 128, 1), None),
        (ChunkTorchConfig(64, 96), "block_tokens"),
        (ChunkTorchConfig(64, 0), "block_tokens"),
        (ChunkTorchConfig(64, "64"), "block_tokens"),
        (ChunkTorchConfig(chunk_size=24), "chunk_size"),
        (ChunkTorchConfig(heads=2.5), "heads"),
        (ChunkTorchConfig(heads=-1), "heads"),
        (ChunkTorchConfig(compile=1), "compile"),
    ],
)
def test_one_predicate_says_which_configurations_run(config, wrong):
    said = invalid(config)
    assert said is None if wrong is None else said.startswith(wrong)


def test_contracts_name_known_formats_and_claims_only():
    assert unit_roundoff("bfloat16") == 2**-8 and unit_roundoff("tf32") == unit_roundoff("float16") == 2**-11
    assert unit_roundoff("float32") == 2**-24 and unit_roundoff("float64") == 2**-53
    with pytest.raises(KeyError, match="unknown format 'fp8'"):
        PrecisionContract("fp8", *["float32"] * 5)
    with pytest.raises(ValueError, match="got also"):
        PrecisionContract(*["float32"] * 6, bitwise=frozenset({"always"}))
    for implementation in impls.IMPLEMENTATIONS:
        assert [implementation.contract(d).output for d in implementation.dtypes] == list(implementation.dtypes)
        assert all(implementation.contract(d).state == "float64" for d in implementation.dtypes if d == "float64")
        assert implementation.contract("bfloat16").state == "float32"


def test_import_needs_no_triton_and_loads_no_implementation():
    code = "import sys; sys.modules['triton'] = None; import impls; print('impls.chunk_torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
