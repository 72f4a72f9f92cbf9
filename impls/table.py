"""The table of implementations: one frozen record each; a new implementation is one more row."""

from collections.abc import Callable
from dataclasses import dataclass

from impls.checks import MAX_HEAD_DIM
from impls.configs import CHUNK_SIZES, ChunkTorchConfig
from impls.contracts import BITWISE_CLAIMS, PrecisionContract, at_least_float32


@dataclass(frozen=True)
class Impl:
    """Describe one implementation, without importing it: `load` does that."""

    name: str
    summary: str
    load: Callable[[], Callable]
    """Import the implementation and return its function: (q, k, v, g, beta, *, config=None, **keywords) -> results."""
    contract: Callable[[str], PrecisionContract]
    """Return what is rounded how, for inputs of the named dtype."""
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    backward: bool
    chunk_sizes: tuple[int, ...] | None
    """The chunk lengths C it takes, None where it has no chunks."""
    config: type | None = None
    """The dataclass of its launch configurations, None where nothing can be configured."""

    def call(self, q, k, v, g, beta, *, config=None, **keywords):
        """Run it, or fail: return (o, final state or None), and the kept states with return_intermediate_states.

        `keywords` are those of `impls.chunk_kda` by name, A_log, dt_bias, chunk_size and state_interval among them; an
        unknown one is a TypeError. `config` is a launch configuration of this implementation, None for its default.
        """
        return self.load()(q, k, v, g, beta, config=config, **keywords)

    def supports(
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        K: int = 1,
        V: int = 1,
        backward: bool = False,
        chunk_size: int | None = None,
    ) -> str | None:
        """Return None where it covers these inputs, otherwise the reason why it does not."""
        if device.split(":")[0] not in self.devices:
            return f"{self.name} runs on {', '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"{self.name} takes {', '.join(self.dtypes)}, not {dtype}"
        if not (1 <= K <= MAX_HEAD_DIM and 1 <= V <= MAX_HEAD_DIM):
            return f"{self.name} takes K and V from 1 to {MAX_HEAD_DIM}, not K = {K}, V = {V}"
        if backward and not self.backward:
            return f"{self.name} has no backward"
        if chunk_size is not None and chunk_size not in (self.chunk_sizes or ()):
            return f"{self.name} takes chunk sizes {self.chunk_sizes or 'of no kind'}, not {chunk_size}"
        return None


def _recurrent_torch() -> Callable:
    from impls.recurrent_torch import recurrent_torch

    return recurrent_torch


def _chunk_torch() -> Callable:
    from impls.chunk_torch import chunk_torch

    return chunk_torch


_FLOATS = ("float64", "float32", "bfloat16", "float16")

IMPLEMENTATIONS: tuple[Impl, ...] = (
    Impl(
        name="recurrent_torch",
        summary="token by token in torch; the decode step",
        load=_recurrent_torch,
        contract=lambda dtype: at_least_float32(dtype, bitwise=BITWISE_CLAIMS),
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        backward=True,
        chunk_sizes=None,
    ),
    Impl(
        name="chunk_torch",
        summary="chunk by chunk in torch, in the tree form; eager or compiled",
        load=_chunk_torch,
        contract=lambda dtype: at_least_float32(dtype, bitwise=BITWISE_CLAIMS - {"value_slices", "split"}),
        devices=("cpu", "cuda"),
        dtypes=_FLOATS,
        backward=True,
        chunk_sizes=CHUNK_SIZES,
        config=ChunkTorchConfig,
    ),
)


def find(name: str) -> Impl:
    """Return the implementation of that name; KeyError with the known names where there is none."""
    for implementation in IMPLEMENTATIONS:
        if implementation.name == name:
            return implementation
    raise KeyError(f"unknown implementation {name!r}; known: {', '.join(i.name for i in IMPLEMENTATIONS)}")
