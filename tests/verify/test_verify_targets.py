"""A call hands over exact values between guard bands, poisons what is allocated, and names what cannot be judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from verify.families import materialise
from verify.poison import poisoned_allocations
from verify.recipes import DTYPES, Recipe
from verify.resolve import resolve
from verify.targets import (
    GUARD,
    Malformed,
    TargetError,
    arguments,
    call,
    default_contract,
    guarded,
)

CASE = materialise(Recipe("float32", 1, 2, 4, 2, 1, 3, 5, gates="mild", state=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_lies_between_bands_of_nan(dtype):
    x = guarded(np.arange(6.0).reshape(2, 3), dtype, "cpu")
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    assert x.is_contiguous() and x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert memory.numel() == 6 + 2 * GUARD
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()


def test_every_tensor_of_a_call_is_guarded():
    tensors, _ = arguments(CASE, resolve("recurrent_torch", "cpu"))
    assert set(tensors) == {"q", "k", "v", "g", "beta", "initial_state"}
    assert all(x.storage_offset() == GUARD for x in tensors.values())


ALLOCATIONS = {
    "empty": lambda: torch.empty(3),
    "empty_like": lambda: torch.empty_like(torch.zeros(3)),
    "empty_strided": lambda: torch.empty_strided((3,), (1,)),
    "new_empty": lambda: torch.zeros(3).new_empty(3),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_memory_that_nobody_wrote_is_nan_during_a_call(allocate):
    with poisoned_allocations():
        assert allocate().isnan().all()


def test_poisoning_leaves_integers_and_the_meta_device_alone():
    with poisoned_allocations():
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
        assert torch.empty(2, device="meta").device.type == "meta"


@pytest.mark.parametrize("error", [None, ValueError])
def test_poisoning_ends_with_the_call_however_it_ends(error):
    before = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    try:
        with poisoned_allocations():
            assert torch.empty is not before[0]
            if error:
                raise error
    except ValueError:
        pass
    assert (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty) == before


def test_a_call_hands_over_exact_values_and_returns_every_gradient():
    result = call(resolve("recurrent_torch", "cpu"), CASE, backward=True)
    assert set(result.numbers()) == {"o", "S", "dq", "dk", "dv", "dg", "dbeta", "dS0"}
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for x in result.numbers().values())


@pytest.mark.parametrize(
    "returned, came",
    [
        (lambda o: o, "Tensor"),
        (lambda o: [o, o], "list"),
        (lambda o: (o, None), r"\(Tensor, NoneType\)"),
        (lambda o: (o, o, o), r"\(Tensor, Tensor, Tensor\)"),
        (lambda o: (1.0, o), r"\(float, Tensor\)"),
    ],
)
def test_what_is_no_pair_of_tensors_is_named(returned, came):
    target = replace(resolve("recurrent_torch", "cpu"), function=lambda q, k, v, *_, **__: returned(v))
    with pytest.raises(Malformed, match=f"expected .o, final_state., two tensors, got {came}$"):
        call(target, CASE)


def test_no_state_is_right_where_nobody_asked_for_it():
    target = replace(resolve("recurrent_torch", "cpu"), function=lambda q, k, v, *_, **__: (v, None))
    assert call(target, CASE, final_state=False).S is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("nonsense", "unknown.*known.*recurrent_torch.*package.module:function"),
        ("no_such_module:f", "ModuleNotFoundError.*no_such_module"),
        ("broken_kernels:no_such_function", "no no_such_function in broken_kernels.*It has"),
        ("raises_on_import:f", "raises_on_import:f: SystemExit"),
        ("broken_kernels:not_callable", "expected a function with the signature of chunk_kda, got int"),
    ],
)
def test_what_cannot_be_judged_is_named(name, message):
    with pytest.raises(TargetError, match=message):
        resolve(name, "cpu")


def test_a_device_that_an_implementation_lacks_is_named_with_those_that_it_has():
    with pytest.raises(TargetError, match="recurrent_torch runs on cpu, cuda, not on interpret"):
        resolve("recurrent_torch", "interpret")


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "launch.json"
    path.write_text('{"colour": 3}')
    with pytest.raises(TargetError, match="not a launch configuration of chunk_torch.*colour"):
        resolve("chunk_torch", "cpu", path)


def test_keywords_are_read_off_a_signature():
    target = resolve("broken_kernels:float64_copy", "cpu")
    assert target.foreign
    assert target.named == {"scale", "initial_state", "output_final_state", "cu_seqlens"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_contract_is_operands_in_the_input_dtype_and_sums_in_float32(dtype):
    contract = default_contract(dtype)
    assert contract.operand == contract.output == dtype
    assert contract.accumulator == contract.state == ("float64" if dtype == "float64" else "float32")
    assert resolve("broken_kernels:float64_copy", "cpu", contract="float16").contract(dtype).operand == "float16"
