"""Interpreted Triton kernels of one operation each: what bfloat16 gives under each of them."""

import torch
import triton
import triton.language as tl

SIZE = 16


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(x_ptr + o), tl.load(y_ptr + o)
    if OP == "add":
        z = x + y
    elif OP == "subtract":
        z = x - y
    elif OP == "multiply":
        z = x * y
    elif OP == "negate":
        z = -x
    elif OP == "absolute":
        z = tl.abs(x)
    elif OP == "scaled":
        z = x * 0.7
    elif OP == "constant":
        z = tl.full([N], 0.7, tl.bfloat16) + x
    elif OP == "select":
        z = tl.where(x < y, x, y)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "clamp":
        z = tl.clamp(x, -0.5, 0.25)
    elif OP == "equal":
        z = (x == x).to(tl.bfloat16)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "sum":
        z = tl.full([N], 0.0, tl.bfloat16) + tl.sum(x, 0)
    elif OP == "max":
        z = tl.full([N], 0.0, tl.float32) + tl.max(x, 0)
    elif OP == "running":
        z = tl.cumsum(x, 0)
    elif OP == "divide":
        z = x / y
    tl.store(out_ptr + o, z)


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out_ptr + o, tl.load(x_ptr + o).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, out_ptr, ADD: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b, c = tl.load(a_ptr + o), tl.load(b_ptr + o), tl.load(c_ptr + o)
    if ADD:
        z = tl.dot(tl.trans(a), b, acc=c, input_precision=PRECISION)
    else:
        z = tl.dot(tl.trans(a), b, input_precision=PRECISION)
    tl.store(out_ptr + o, z)


@triton.jit
def _atomic(x_ptr, out_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.atomic_add(out_ptr + o, tl.load(x_ptr + o))


@triton.jit
def _masked(x_ptr, out_ptr, first, N: tl.constexpr):
    o = tl.arange(0, N)
    mask = (o >= first) & (tl.program_id(0) < first)
    tl.store(out_ptr + o, tl.load(x_ptr + o, mask=mask, other=-1.0))


def elementwise(operation: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Run one operation on x and y [16] bfloat16."""
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, OP=operation, N=SIZE)
    return out


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Load x [N], N a power of two, and store it as another dtype."""
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, N=x.numel())
    return out


def dot(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, add: bool, dtype: torch.dtype, precision: str = "ieee"
) -> torch.Tensor:
    """Compute a^T b in a precision of Triton's, plus c [16, 16] float32 with `add`, and store it as `dtype`."""
    out = torch.empty(a.shape, dtype=dtype)
    _dot[(1,)](a, b, c, out, ADD=add, PRECISION=precision, N=SIZE)
    return out


def from_position(x: torch.Tensor, first: int) -> torch.Tensor:
    """Load x [N] from a position on, -1 before it, by a mask of a comparison of a block and one of a scalar."""
    out = torch.empty_like(x)
    _masked[(1,)](x, out, first, N=x.numel())
    return out


def atomic_add(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add x to out, element by element."""
    _atomic[(1,)](x, out, N=x.numel())
