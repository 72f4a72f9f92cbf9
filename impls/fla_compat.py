"""Have `from fla.ops.kda import chunk_kda, fused_recurrent_kda` give ours, where FLA is installed and where it is not.

    from impls import fla_compat
    fla_compat.install()          # before the model's code is imported
    ...
    fla_compat.uninstall()

Where flash-linear-attention is installed it is imported as ever, and the two functions are replaced in it: in the
module that defines them and wherever its own modules have them by name. All the rest of it is itself. Where it is not
installed the packages fla, fla.ops and fla.ops.kda are there, empty but for the two. Code that has imported them before
`install` keeps what it has. Ours differ in that an unknown keyword is a TypeError; see `impls.ops`.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from impls.ops import chunk_kda, fused_recurrent_kda

MODULE = "fla.ops.kda"
PACKAGES = ("fla", "fla.ops", MODULE)
OURS = {function.__name__: function for function in (chunk_kda, fused_recurrent_kda)}

_lock = threading.RLock()
_theirs: dict[str, object] = {}
"""FLA's own functions by name, from when its module was seen."""


def install() -> None:
    """Make FLA's two functions resolve to ours from now on; nothing happens where they do already."""
    with _lock:
        if _finder in sys.meta_path:
            return
        sys.meta_path.insert(0, _finder)
        if MODULE in sys.modules:
            _take(sys.modules[MODULE])


def uninstall() -> None:
    """Undo `install`: FLA has its functions back, and where it is not installed it cannot be imported again."""
    with _lock:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        _swap(OURS, _theirs)
        _theirs.clear()
        for name in PACKAGES[::-1]:
            if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Empty):
                del sys.modules[name]
        importlib.invalidate_caches()


def _take(module: ModuleType) -> None:
    """Replace FLA's functions, known from its module, wherever FLA has them by name."""
    _theirs.update({name: getattr(module, name) for name in OURS})
    _swap(_theirs, OURS)


def _swap(old: dict[str, object], new: dict[str, object]) -> None:
    inside = [module for name, module in sys.modules.items() if name.split(".")[0] == "fla" and module is not None]
    for module in inside:
        for name in new:
            if name in old and vars(module).get(name) is old[name]:
                setattr(module, name, new[name])


class _Empty(Loader):
    """Load a package of an FLA that is not installed: empty, the one of KDA with our functions."""

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "A stand-in for flash-linear-attention, which is not installed: `impls.fla_compat`."
        module.__path__ = []
        if module.__name__ == MODULE:
            vars(module).update(OURS, __all__=list(OURS))


class _Replacing(Loader):
    """Load FLA's module of KDA as its own loader does, then replace the two functions."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        with _lock:
            if _finder in sys.meta_path:
                _take(module)


class _Finder(MetaPathFinder):
    """Find the packages around FLA's KDA: FLA's own where the finders behind this one know them, else empty ones."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = self._theirs(name, path, target)
        if spec is None:
            return ModuleSpec(name, _Empty(), is_package=True)
        if name == MODULE:
            spec.loader = _Replacing(spec.loader)
        return spec

    def _theirs(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        found = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        return next((spec for spec in found if spec is not None), None)


_finder = _Finder()
