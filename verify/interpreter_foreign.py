"""What other people's kernels need of Triton's interpreter, where it differs from compiled code.

Their autotuners measure on a device: here the first configuration that is not pruned away is taken. A loop's variable
is a plain Python int there, and `i.to(tl.int64)`, which compiles, is an AttributeError: here it is an int that has
`to`. A builtin that a module imported by name (`from ... import gather`) stays the compiler's there: here it is looked
up. Products for which bf16x3 or bf16x6 is asked are taken as they are in float32.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

MARK = "_adapted_to_foreign_kernels"
RANGE = "_range_of_loop_integers"


def adapt() -> None:
    """Adapt the interpreter of this process, which is mended already; a second call changes nothing."""
    from triton.runtime import autotuner, interpreter

    if hasattr(interpreter, MARK):
        return
    autotuner.Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    transform = interpreter.FunctionRewriter._transform_ast
    integers = loop_integers(interpreter)

    def transformed(self, source: str) -> ast.AST:
        scope = self.fn.__globals__
        scope.setdefault(RANGE, integers)
        scope.update({name: _late(x, interpreter.tl) for name, x in scope.items() if _imported_builtin(x)})
        return ast.fix_missing_locations(_Loops().visit(transform(self, source)))

    interpreter.FunctionRewriter._transform_ast = transformed
    builder = interpreter.interpreter_builder
    known = builder.options.allowed_dot_input_precisions
    builder.options = replace(builder.options, allowed_dot_input_precisions=tuple({*known, "bf16x3", "bf16x6"}))
    setattr(interpreter, MARK, True)


def _imported_builtin(x: object) -> bool:
    """Tell whether a global of a kernel's module is a function of the language, imported by name."""
    return callable(x) and getattr(x, "__triton_builtin__", False) and not isinstance(x, type)


def _late(builtin: Callable, tl: ModuleType) -> Callable:
    """Return a function that looks the builtin up when it is called, where the interpreter has replaced it."""
    name = builtin.__name__
    owner = next((x for x in (tl, tl.math) if getattr(x, name, None) is builtin), None)
    return builtin if owner is None else lambda *args, **named: getattr(owner, name)(*args, **named)


class _Loops(ast.NodeTransformer):
    """Let loops over `range` run over integers that have `to`."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) and node.iter.func.id == "range":
            node.iter.func = ast.copy_location(ast.Name(RANGE, ast.Load()), node.iter.func)
        return node


def loop_integers(interpreter: ModuleType):
    """Return a `range` whose integers can be cast to a Triton type; sums, differences and products of them, too."""
    import numpy as np

    tl = interpreter.tl

    class LoopInteger(int):
        """An int with `to`, as compiled code has it."""

        def to(self, dtype, **how):
            kind = tl.core._unwrap_if_constexpr(dtype)
            data = np.array([int(self)], dtype=interpreter._get_np_dtype(kind))
            return tl.core.tensor(interpreter.TensorHandle(data, kind), kind)

    def lifted(name: str):
        plain = getattr(int, name)

        def operation(self, other):
            result = plain(self, other)
            return result if result is NotImplemented else LoopInteger(result)

        return operation

    for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):
        setattr(LoopInteger, f"__{name}__", lifted(f"__{name}__"))

    def loop(*bounds) -> Iterator[LoopInteger]:
        return map(LoopInteger, range(*(int(_number(x)) for x in bounds)))

    return loop


def _number(x) -> int:
    """Return the value of a bound: an int, a constant expression, or a scalar tensor."""
    if handle := getattr(x, "handle", None):
        return handle.data.item()
    return getattr(x, "value", x)
