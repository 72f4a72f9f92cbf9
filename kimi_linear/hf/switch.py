"""Run transformers' KDA models on our ops: `enable()`, `disable()`, or `with enable():`.

Each KDA layer of kimi_linear, glm5_next and bailing_hybrid calls two functions that it looks up in the globals of its
module at every call: chunk_kimi_delta_attention and recurrent_kimi_delta_attention. Those are replaced, by name: models
that are loaded already follow, and `disable` leaves nothing behind. The library's own ways in do not reach as far: its
kernel mapping is there only with the package `kernels`, for models loaded with use_kernels=True, and is overwritten
when the next of them is loaded; its decorators ask for fla.ops.kda once, while the module is imported (who wants that
finds it in `impls.fla_compat`). Where `kernels` is installed the two names hold its layers, and are replaced as well.
"""

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from kimi_linear.hf.absorbed import absorbing
from kimi_linear.hf.routes import FAMILIES, MLA, ROUTED, UNEVEN, modeling
from kimi_linear.hf.widths import evened

KNOWN = ("5.20", "5.21", "5.22", "5.23")
"""Releases of transformers whose layers call the two functions as is assumed here: tried with all three families."""
LEADING = ["query", "key", "value", "g", "beta"]
TAKEN = {*LEADING, "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}


@dataclass(frozen=True)
class Patch:
    """Remember what a name of a module or a class held before, and what it holds now."""

    owner: ModuleType | type
    name: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


_lock = threading.RLock()
_patches: dict[tuple[int, str], Patch] = {}
_asked: bool | None = None
"""What is enabled: None for nothing, else whether MLA is absorbed."""


@dataclass(frozen=True)
class Enabled:
    """Tell what was enabled. As a context manager it goes back, at its end, to what was enabled before it."""

    version: str
    families: tuple[str, ...]
    absorbed_mla: bool
    before: bool | None

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *exception) -> None:
        if self.before is None:
            disable()
        else:
            enable(absorbed_mla=self.before)

    def __str__(self) -> str:
        mla = "; MLA of kimi_linear decodes over latents" if self.absorbed_mla else ""
        return f"KDA of {', '.join(self.families)} in transformers {self.version} runs on impls.kda{mla}"


def enable(*, absorbed_mla: bool = False) -> Enabled:
    """Route the KDA layers of transformers' three families to our ops, on CPU and GPU, and return what was done.

    Loaded models follow, and those loaded later. Called again, what it was asked for last holds. On a CPU the MLA of
    two families gets torch's fused attention as well: `kimi_linear.hf.widths`. absorbed_mla: steps of kimi_linear's MLA
    attend over the latents in the cache, without keys and values of the past being made of them; see
    `kimi_linear.hf.absorbed`. Raises ModuleNotFoundError without transformers, RuntimeError for a release that is not
    known, or whose functions are others; then nothing is changed.
    """
    if not isinstance(absorbed_mla, bool):
        raise TypeError(f"absorbed_mla must be True or False, got {absorbed_mla!r}")
    global _asked
    version = _known_version()
    modules = [modeling(family) for family in FAMILIES]
    for module in modules:
        _check_functions(module, version)
    with _lock:
        wanted = list(_wanted(modules, absorbed_mla))
        _keep({(id(owner), name) for owner, name, _ in wanted})
        for owner, name, make in wanted:
            _replace(owner, name, make)
        before, _asked = _asked, absorbed_mla
    return Enabled(version, tuple(FAMILIES), absorbed_mla, before)


def disable() -> None:
    """Give transformers its own functions back; nothing happens where they were never taken.

    Raises RuntimeError, and leaves everything, where somebody else has replaced one of ours since.
    """
    global _asked
    with _lock:
        _keep(set())
        _asked = None


def _known_version() -> str:
    version = importlib.import_module("transformers").__version__
    if ".".join(version.split(".")[:2]) not in KNOWN:
        raise RuntimeError(f"transformers {version} is not known to kimi_linear.hf, which knows {', '.join(KNOWN)}")
    return version


def _check_functions(module: ModuleType, version: str) -> None:
    for ours in ROUTED:
        function = getattr(module, ours.__name__, None)
        # the package `kernels` makes a layer of the function, whose forward has its signature
        names = list(inspect.signature(getattr(function, "forward", function)).parameters) if function else []
        if names[: len(LEADING)] != LEADING or not set(names) >= TAKEN:
            what = f"has the parameters {', '.join(names)}" if function else "is missing"
            raise RuntimeError(f"{module.__name__}.{ours.__name__} of transformers {version} {what}, unexpectedly")


def _wanted(modules: list[ModuleType], absorbed_mla: bool) -> Iterator[tuple[ModuleType | type, str, Callable]]:
    """Yield every owner and name to replace, and what makes the new value of the old one."""
    for module in modules:
        for ours in ROUTED:
            yield module, ours.__name__, lambda before, ours=ours: ours
        if module.__name__.split(".")[-2] in UNEVEN:
            yield module, "ALL_ATTENTION_FUNCTIONS", evened
    if absorbed_mla:
        yield getattr(modules[0], MLA), "forward", absorbing


def _replace(owner: ModuleType | type, name: str, make: Callable) -> None:
    if (id(owner), name) not in _patches:
        before = getattr(owner, name)
        patch = _patches[id(owner), name] = Patch(owner, name, before, make(before))
        setattr(owner, name, patch.now)


def _keep(wanted: set[tuple[int, str]]) -> None:
    """Undo the patches that are not wanted; RuntimeError, before any is undone, where one was patched over."""
    undone = {key: patch for key, patch in _patches.items() if key not in wanted}
    for patch in undone.values():
        if getattr(patch.owner, patch.name) is not patch.now:
            raise RuntimeError(f"{patch} has been replaced by somebody else since enable(): undo that first")
    for key, patch in undone.items():
        setattr(patch.owner, patch.name, patch.before)
        del _patches[key]
