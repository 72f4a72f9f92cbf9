"""What the mended interpreter gives in bfloat16 is what torch gives; what it cannot mend is said, not computed."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from verify import interpreter
from verify.interpreter import narrow, repair, widen

repair()

import bfloat16_kernels as kernels  # noqa: E402

BF16 = torch.bfloat16
SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, 1.0, -1.0, 1e-40, -3e38)


def drawn(seed: int, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


OPERATIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "scaled": lambda x, y: x * torch.tensor(0.7, dtype=BF16),
    "constant": lambda x, y: x + torch.tensor(0.7, dtype=BF16),
    "select": torch.minimum,
    "maximum": torch.maximum,
    "clamp": lambda x, y: x.clamp(-0.5, 0.25),
    "equal": lambda x, y: torch.ones_like(x),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).to(BF16),
    "sum": lambda x, y: x.float().sum().to(BF16).expand_as(x),
    "max": lambda x, y: x.max().expand_as(x),
    "running": lambda x, y: x.float().cumsum(0).to(BF16),
}


@pytest.mark.parametrize("name, expected", OPERATIONS.items(), ids=OPERATIONS)
def test_an_operation_on_bfloat16_is_rounded_once(name, expected):
    x, y = drawn(1, kernels.SIZE), drawn(2, kernels.SIZE)
    assert torch.equal(kernels.elementwise(name, x, y), expected(x, y))


DROPPED = {"maximum": torch.fmax, "clamp": lambda x, y: x.nan_to_num(-0.5).clamp(-0.5, 0.25)}


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name, expected", DROPPED.items(), ids=DROPPED)
def test_a_nan_loses_to_a_number_as_in_compiled_code(name, expected, dtype):
    x, y = drawn(1, kernels.SIZE, dtype=dtype), drawn(2, kernels.SIZE, dtype=dtype)
    x[:2], y[1:3] = torch.nan, torch.nan
    torch.testing.assert_close(kernels.elementwise(name, x, y), expected(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("operand", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "onto an accumulator"])
def test_a_product_of_matrices_has_exact_operands_and_float32_sums(operand, stored, add):
    a, b = (drawn(seed, kernels.SIZE, kernels.SIZE, dtype=operand) for seed in (3, 4))
    c = drawn(5, kernels.SIZE, kernels.SIZE, dtype=torch.float32)
    exact = a.double().T @ b.double() + (c.double() if add else 0)
    got = kernels.dot(a, b, c, add, stored).double()
    torch.testing.assert_close(got, exact, rtol=0.004 if stored == BF16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("add", [False, True], ids=["alone", "onto an accumulator"])
def test_a_product_in_tf32_loses_what_the_instruction_loses_and_three_of_them_do_not(add):
    a, b, c = (drawn(seed, kernels.SIZE, kernels.SIZE, dtype=torch.float32) for seed in (3, 4, 5))
    cut = [torch.from_numpy(interpreter.tf32(x.numpy())).double() for x in (a, b)]
    start = c.double() if add else 0
    exact, lost = a.double().T @ b.double() + start, cut[0].T @ cut[1] + start
    got = {how: kernels.dot(a, b, c, add, torch.float32, how).double() for how in ("tf32", "tf32x3")}
    torch.testing.assert_close(got["tf32"], lost, rtol=1e-6, atol=1e-6)
    # two cuts leave 2^-20 of a factor: 16 products of up to 4 times 4
    torch.testing.assert_close(got["tf32x3"], exact, rtol=0, atol=2.0**-20 * 16)
    assert (lost - exact).abs().max() > 1e-4


WIDER = {"ties": 1 + 2.0**-8, "odd ties": 1 + 3 * 2.0**-8, "just above a tie": 1 + 2.0**-8 + 2.0**-20}


@pytest.mark.parametrize("target", [BF16, torch.float16], ids=str)
def test_float32_rounds_to_nearest_even_in_a_store(target):
    x = torch.tensor([*SPECIAL, *WIDER.values(), torch.nan, 3.4e38, 65520.0, 1e-7, -2.5], dtype=torch.float32)
    got, expected = kernels.cast(x, target), x.to(target)
    assert torch.equal(got.view(torch.int16)[:11], expected.view(torch.int16)[:11])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "source, target",
    [
        (BF16, torch.float32),
        (BF16, torch.float16),
        (BF16, torch.float64),
        (BF16, BF16),
        (BF16, torch.int32),
        (torch.float16, BF16),
        (torch.float64, BF16),
        (torch.int32, BF16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_casts_from_and_to_bfloat16_keep_the_value(source, target):
    whole = torch.tensor([0, 1, -1, 2, 3, -250, 255, 256], dtype=source)
    assert torch.equal(kernels.cast(whole, target), whole.to(target))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_scalar_comparison_masks(dtype):
    x = drawn(7, 8, dtype=dtype)
    assert torch.equal(kernels.from_position(x, 3), torch.cat([torch.full((3,), -1, dtype=dtype), x[3:]]))


def test_every_pattern_survives_widening_and_narrowing():
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = ~np.isnan(widen(bits))
    assert np.array_equal(narrow(widen(bits))[numbers], bits[numbers])
    assert np.isnan(widen(narrow(widen(bits[~numbers])))).all()


@pytest.mark.parametrize("payload", [0x7F800001, 0xFF800001, 0x7FFFFFFF])
def test_a_nan_whose_payload_is_cut_off_stays_a_nan(payload):
    assert np.isnan(widen(narrow(np.array([payload], np.uint32).view(np.float32)))).all()


def test_narrowing_agrees_with_torch_on_random_patterns():
    bits = np.random.Generator(np.random.Philox(0)).integers(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    assert np.array_equal(narrow(x), torch.from_numpy(x).to(BF16).view(torch.uint16).numpy())


def test_float64_is_rounded_once_and_not_by_way_of_float32():
    tie = 1 + 2.0**-8
    x = np.array([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, 1e300, 0.0])
    assert widen(narrow(x)).tolist() == [1.0, 1 + 2.0**-7, 1.0, -1 - 2.0**-7, np.inf, 0.0]


def test_atomic_sums_of_bfloat16_raise():
    with pytest.raises(Exception, match="atomic operations on bfloat16"):
        kernels.atomic_add(drawn(6, 4), torch.zeros(4, dtype=BF16))


def test_a_second_repair_changes_nothing():
    builder = triton_interpreter.InterpreterBuilder
    before = {name: getattr(builder, name) for name in dir(builder)}
    repair()
    assert {name: getattr(builder, name) for name in dir(builder)} == before


def test_a_launch_leaves_the_language_as_it_was():
    before = [dict(vars(language)) for language in (tl, tl.core, tl.tensor)]
    kernels.elementwise("sum", drawn(1, kernels.SIZE), drawn(2, kernels.SIZE))
    assert [dict(vars(language)) for language in (tl, tl.core, tl.tensor)] == before


def test_a_version_that_lacks_a_part_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(triton_interpreter, interpreter.MARK)
    monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_dot")
    cast = triton_interpreter.InterpreterBuilder.cast_impl
    with pytest.raises(RuntimeError, match=r"triton .* without InterpreterBuilder.create_dot: bfloat16 is not mended"):
        repair()
    assert triton_interpreter.InterpreterBuilder.cast_impl is cast


def test_a_triton_that_compiles_is_refused(monkeypatch):
    monkeypatch.setattr("triton.language.standard._sum_combine", print)
    with pytest.raises(RuntimeError, match="imported without TRITON_INTERPRET=1"):
        repair()


def test_no_triton_is_said(monkeypatch):
    monkeypatch.setattr(interpreter, "installed", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        repair()


@pytest.mark.parametrize("shape", [(4,), (2, 8)], ids=str)
@pytest.mark.parametrize("element", [tl.float32, tl.bfloat16, tl.int1, tl.pointer_type(tl.float32)], ids=str)
def test_types_that_are_looked_up_are_those_that_triton_makes(element, shape):
    made, plain = [tl.block_type(element, list(shape)) for _ in range(2)][1], object.__new__(tl.block_type)
    tl.block_type.__init__.__wrapped__(plain, element, list(shape))
    assert (made.name, made.numel, made.element_ty) == (plain.name, plain.numel, element) and made == plain
    handle, one, other = object(), *(object.__new__(tl.tensor) for _ in range(2))
    tl.tensor.__init__(one, handle, made)
    tl.tensor.__init__.__wrapped__(other, handle, plain)
    assert [x.value for x in one.shape] == [x.value for x in other.shape] == list(shape)
    assert (one.handle, one.numel.value, one.dtype) == (handle, other.numel.value, other.dtype)
    assert triton_interpreter._get_np_dtype(made) == triton_interpreter._get_np_dtype.__wrapped__(plain)
