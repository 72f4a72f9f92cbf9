"""Compile functions of fixed shapes for the CPU: torch's Inductor without dynamo, so nothing is guarded or recompiled.

Where matrix products decide, Inductor's own template multiplies instead of the library. On AMD's CPUs the library keeps
to AVX2: 180 GFLOP/s on two cores for [16, 64, 128] @ [16, 128, 128] in float32, of 490 that AVX-512 allows. The
template reaches 141 in its tiles of 8 x 32 sums, because gcc 12 writes an array of more than 12 registers back to
memory at every step, and 423 in tiles of 6 x 32. Without AVX-512 (Zen 3) the library reaches 129 to 144, and the
template 170 in tiles of 6 x 16; 78 to 161 in 4 x 16, 5 x 16, 8 x 8 and 3 x 32. Two rows times the states of a decode
step are bound by memory, and want whole lines of it: ROW_TILES.
"""

import contextlib
import contextvars
import functools
import importlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from unittest.mock import patch

import torch

from impls.pages import keep_freed_memory
from impls.threads import exactly

TILES = {"VecAVX512": (6, 32, 1), "VecAVX2": (6, 16, 1)}
"""Rows, columns and depth of the sums that the template keeps in registers, for the vectors of the processor."""
ROW_TILES = {"VecAVX512": (2, 64, 1), "VecAVX2": (2, 32, 1)}
"""The same for products of two rows: four vectors of columns."""

_ANY_ROWS = {"assert_indirect_indexing": False, "max_fusion_size": 1}

_compiling = threading.Lock()


@functools.cache
def can_compile() -> bool:
    """Tell whether there is a C++ compiler, and prepare for it; warn, once, where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        warnings.warn(f"compile=True runs uncompiled, up to three times slower: {error}", stacklevel=2)
        return False
    keep_freed_memory()
    return True


@functools.cache
def _keep_stand_in() -> None:
    """Have torch keep what stands for the CUDA devices that a build for CUDA does not find on this machine.

    It belongs to the thread that traced first, and dies with it: in torch 2.11 the next one to trace then crashes.
    """
    from torch._subclasses import FakeTensorMode

    traced = threading.Event()

    def stay():
        try:
            with FakeTensorMode():
                pass
        finally:
            traced.set()
        threading.Event().wait()

    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        threading.Thread(target=stay, daemon=True).start()
        traced.wait()


def _in_a_thread(function: Callable) -> Callable:
    """Return a function that runs alone, in a thread of its own, with as many of torch's threads as the caller has.

    Nothing can be traced where dispatch keys are excluded, and inside of a graph's first call they are: torch.compile
    watches whether a custom op returns what it was given.
    """

    @functools.wraps(function)
    def run(*arguments, **keywords):
        _keep_stand_in()
        context, threads, found = contextvars.copy_context(), torch.get_num_threads(), Future()

        def work():
            try:
                with _compiling, exactly(threads):  # a new thread has the process's number
                    found.set_result(context.run(function, *arguments, **keywords))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=work).start()
        return found.result()

    return run


class Compiled:
    """Hold what `compiled` made of a function of tensors."""

    def __init__(self, run: Callable, awaited: list[Callable[[], None]]):
        self.run, self.awaited = run, awaited

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        self.wait()
        return self.run(list(tensors))

    def wait(self) -> None:
        """Wait for the C++ compiler, if it is at work for this function."""
        if self.awaited:
            with _compiling:
                for wait in self.awaited:
                    wait()
                self.awaited.clear()

    def with_memory(self) -> Callable:
        """Return the same function for one owner: what a call returns lies in memory that the next call overwrites.

        Inductor's code allocates a tensor or takes a view in 0.8 us; of what is done within chunks, 750 us a block,
        those are 70.
        """
        return _WithMemory(self)

    def in_threads(self) -> Callable:
        """Return the same function, of those that return nothing, with memory of its own in every thread."""
        here = threading.local()

        def call(*tensors):
            try:
                run = here.run
            except AttributeError:
                run = here.run = self.with_memory()
            found = run(*tensors)
            assert not found, "what is returned would be overwritten"

        return call


class _WithMemory:
    """Run Inductor's code with the tensors that its first run allocated."""

    def __init__(self, compiled: Compiled):
        self.compiled, self.run, self.kept = compiled, None, _Kept()

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.run is None:
            self.compiled.wait()
            self.run = _rebound(self.compiled.run, self.kept)
        if self.kept.at:  # a finalizer or a signal's handler came in the middle of a call
            return self.compiled(*tensors)
        try:
            return self.run(list(tensors))
        finally:
            self.kept.at = 0


class _Kept:
    """Hold the tensors that a run of some code made, in order, and where the next run has come to."""

    def __init__(self):
        self.made: list[torch.Tensor] = []
        self.own: set[int] = set()
        self.at = 0

    def again(self, make: Callable, *arguments) -> torch.Tensor:
        """Return what came here in the last run."""
        at = self.at
        self.at = at + 1
        if at == len(self.made):
            with torch.inference_mode(False):  # what is made in it may not be modified outside
                self.made.append(make(*arguments))
            self.own.add(id(self.made[at]))
        return self.made[at]


def _rebound(run: Callable, kept: _Kept) -> Callable:
    """Return Inductor's code with `kept` in the place of what it allocates by, and views what it allocated by."""
    function = getattr(run, "__func__", run)
    names = function.__globals__
    empty, view = names["empty_strided_cpu"], names["reinterpret_tensor"]

    def viewed(x, *rest):  # arguments may come with other memory the next time
        return kept.again(view, x, *rest) if id(x) in kept.own else view(x, *rest)

    names = names | {"empty_strided_cpu": lambda *like: kept.again(empty, *like), "reinterpret_tensor": viewed}
    again = types.FunctionType(function.__code__, names)
    return again if function is run else types.MethodType(again, run.__self__)


@_in_a_thread
def compiled(
    function: Callable,
    inputs: Sequence[torch.Tensor],
    tiles: Mapping[str, tuple[int, int, int]] | None = None,
    rows: bool = False,
) -> Compiled:
    """Compile a function of tensors for the shapes, strides and dtypes of `inputs`.

    tiles: what the template is to multiply in, where the processor has such vectors; None: the library multiplies.
    rows: it takes rows out of tensors of any size, whose elements it then finds by their strides alone, and works on
    tensor by tensor: from four at once memory gives 9 GB/s instead of 13.

    Returns a function of tensors of that kind; it returns a sequence, and modifies what the function modifies. It looks
    at no shapes, strides or dtypes (3% of a prefill), only at the elements, in the order of those of `inputs`.
    Compiling takes seconds, and a fraction of one where an earlier process left its result in Inductor's cache. The C++
    compiler may still be at work when this returns: the first call waits for it, and fails where it failed. So it works
    on one function while Inductor prepares the next.
    Inductor is called as AOTAutograd calls it, whose layers around every call take 8 us, and its own layers are passed
    by, which write down what is compiled at a first call. A wrapper in C++ then saves nothing, and takes up to 3 s
    longer to compile.
    """
    assert len({id(x) for x in inputs}) == len(inputs), "one tensor twice would be compiled as one argument"
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def results(*tensors):
        return () if (found := function(*tensors)) is None else found

    what_the_key_lacks = "kda", tiles, pick_vec_isa(), torch.get_num_threads()
    tag = " ".join(map(str, (torch.compiler.config.cache_key_tag, *what_the_key_lacks)))
    template = _template(tiles) if tiles else contextlib.nullcontext(_ANY_ROWS if rows else {})
    cache = torch.compiler.config.patch(cache_key_tag=tag)
    fakes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # without an environment nothing is cached
    with cache, torch.inference_mode(False), torch.no_grad(), template as patches, _unawaited() as awaited:
        decompositions = select_decomp_table() | (_DECOMPOSITIONS if tiles and patches else {})
        # a tensor made in inference mode may not be modified outside it, not even where only its shape is looked at
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if x.is_inference() else x for x in inputs]
        inputs = [fakes.from_tensor(x) for x in inputs]
        with fakes:
            graph = make_fx(functionalize(results, remove="mutations"), decompositions)(*inputs)
        with inductor.patch({"size_asserts": False, **patches}), tracing(TracingContext(fakes)), _hurried():
            run = compile_fx_inner(graph, inputs).current_callable

    return Compiled(run, awaited)


@contextlib.contextmanager
def _hurried() -> Iterator[None]:
    """Have Inductor, in all threads, find the same code with less work.

    It simplifies indices to find strides in them, which expanding does too (3 of 7 s of Python), compiles the same few
    texts of its template 119 times and parses the same expressions 266 times (1.3 of 1.7 s for `over_chunk`).
    """
    import sympy
    from torch._inductor.codegen import cpp, cpp_template_kernel
    from torch._inductor.codegen.common import KernelTemplate

    expanding = types.SimpleNamespace(**vars(sympy) | {"simplify": sympy.expand})
    from_string = staticmethod(functools.cache(KernelTemplate._template_from_string))
    with (
        patch.object(sys.modules[cpp.stride_at_vec_range.__module__], "sympy", expanding),
        patch.object(KernelTemplate, "_template_from_string", from_string),
        patch.object(cpp_template_kernel, "parse_expr", functools.cache(cpp_template_kernel.parse_expr)),
    ):
        yield


@contextlib.contextmanager
def _unawaited() -> Iterator[list[Callable[[], None]]]:
    """Have Inductor in this thread not wait for the C++ compiler; yield a list of what does."""
    from torch._inductor.async_compile import AsyncCompile

    wait, here, awaited = AsyncCompile.wait, threading.get_ident(), []

    def postponed(self, scope):
        if threading.get_ident() == here:
            awaited.append(functools.partial(wait, self, scope))
        else:
            wait(self, scope)

    with patch.object(AsyncCompile, "wait", postponed):
        yield awaited


def _baddbmm(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return x + a b: the template knows products of contiguous rows, and adds x unless it is modified in place.

    It then takes a pass of its own, 7% of the product that a chunk adds to its states.
    """
    return x + torch.bmm(a.contiguous(), b)


_DECOMPOSITIONS = {
    torch.ops.aten.baddbmm.default: _baddbmm,
    torch.ops.aten.baddbmm_.default: lambda x, a, b: x.copy_(_baddbmm(x, a, b)),
}


def vectors(tiles: Mapping[str, tuple[int, int, int]]) -> type | None:
    """Return the kind of the processor's vectors, None where there are no tiles for it."""
    importlib.import_module("torch._inductor.lowering")  # or the next import is circular
    from torch._inductor import cpu_vec_isa

    here = cpu_vec_isa.pick_vec_isa()
    return next((kind for name in tiles if isinstance(here, kind := getattr(cpu_vec_isa, name))), None)


@contextlib.contextmanager
def _template(tiles: Mapping[str, tuple[int, int, int]]) -> Iterator[dict[str, object]]:
    """Yield what makes Inductor multiply in its template, in these tiles; nothing where we have none."""
    if (kind := vectors(tiles)) is None:
        yield {}
        return
    from torch._inductor.codegen import cpp_micro_gemm as template

    ours = template.generate_gemm_config(kind, [tiles[kind.__name__]], input_dtype=torch.float32)
    configs, products = template.micro_gemm_configs, template.CppMicroGemmFP32Vec
    usual = configs[products]
    configs[products] = ours
    try:
        yield {"max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP"}
    finally:
        configs[products] = usual
