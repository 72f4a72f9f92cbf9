"""Screen configurations by the compiler before any is measured: what spills or does not fit is out, the rest in order.

The neighbours of a point are compiled side by side, in processes that can be killed, while nothing is timed: most of
their kernels are the same, and what is compiled once is recalled.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.outcomes import UsageError
from autotune.space import Setting, Space
from autotune.timing import Box

if TYPE_CHECKING:  # it imports triton, which only this stage needs
    from autotune.compiling import Compiler

PATIENCE = 60.0
"""Seconds that one kernel may take to compile."""
MOST = 8
"""Compilers side by side, with a core left for the rest."""


def compiler(cache: Path) -> "AbstractContextManager[Compiler]":
    """Return the pool of compilers; UsageError where kernels cannot be compiled."""
    try:
        from autotune.compiling import Compiler
        from impls.compiler_triton import Interpreting, check_compiling
    except ImportError as error:
        raise UsageError(f"triton is needed to compile: {error}") from error
    try:
        check_compiling()
    except Interpreting as error:
        raise UsageError(str(error)) from error
    return Compiler(cache, min(MOST, max(1, (os.cpu_count() or 2) - 1)), PATIENCE)


def screen(
    space: Space, setting: Setting, pool: "Compiler", box: Callable[[], Box]
) -> Callable[[list], dict[object, float | str]]:
    """Return what `search.Search` screens by: configurations -> microseconds by estimate, or what is wrong.

    box: called for the time that is left; what it cuts off is left out of the answer.
    """
    from autotune.ranking import Ranking

    ranking = Ranking(space, setting, pool, Box(0))

    def screened(configs: list) -> dict[object, float | str]:
        ranking.box = box()
        ranking.rank(configs)
        known = ((config, ranking.known.get(config)) for config in configs)
        return {config: x.trouble or x.microseconds for config, x in known if x}

    return screened
