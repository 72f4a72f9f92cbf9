"""State what an implementation rounds, and to what: the promise that the judge holds it to."""

from dataclasses import dataclass

BITWISE_CLAIMS = frozenset({"sequence_count", "length", "layout", "value_slices", "split"})

_PRECISION = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}


def unit_roundoff(dtype_name: str) -> float:
    """Return the unit roundoff 2^-p of a format with p significant bits; KeyError with the known names otherwise."""
    if dtype_name not in _PRECISION:
        raise KeyError(f"unknown format {dtype_name!r}; known: {', '.join(_PRECISION)}")
    return 2.0 ** -_PRECISION[dtype_name]


@dataclass(frozen=True)
class PrecisionContract:
    """Name the format to which each class of values is rounded, for inputs of one dtype.

    The fields hold names that `unit_roundoff` knows. Everybody must be bitwise causal by content, deterministic,
    indifferent to neighbours' content, and equivariant under permutations of batches and heads, sign flips and scaling
    by powers of two; `bitwise` lists what holds bit for bit beyond that (otherwise it holds within rounding):

        sequence_count  a sequence's results do not depend on how many others are computed with it, or on varlen
        length          the first tokens' outputs do not depend on how many tokens follow
        layout          strides, storage offsets and expanded inputs do not matter
        value_slices    a slice of the value channels gives the slice of the results
        split           cutting a sequence anywhere and passing the state on changes nothing

    They were measured on CPUs (x86, MKL); on a GPU the library that multiplies picks its kernel by the batch count.
    They hold within one configuration: where tuned files have another for another shape, results agree within rounding.
    """

    operand: str
    """What both factors of every matrix product are rounded to."""
    accumulator: str
    """What sums of products are accumulated in."""
    state: str
    """What S is rounded to between tokens or chunks."""
    inverse: str
    """What the inverse of the chunk's unit triangular matrix is computed in."""
    stored: str
    """What intermediates are rounded to between the passes."""
    output: str
    """The dtype of o."""
    bitwise: frozenset[str] = frozenset()
    """Extra bitwise claims, out of BITWISE_CLAIMS."""

    def __post_init__(self):
        """Refuse formats and claims that nobody could judge."""
        for name in (self.operand, self.accumulator, self.state, self.inverse, self.stored, self.output):
            unit_roundoff(name)
        if unknown := self.bitwise - BITWISE_CLAIMS:
            raise ValueError(f"bitwise must be a subset of {sorted(BITWISE_CLAIMS)}, got also {sorted(unknown)}")


def at_least_float32(dtype_name: str, bitwise: frozenset[str]) -> PrecisionContract:
    """Return the contract of the torch implementations: float32 throughout, float64 for float64 inputs."""
    wide = "float64" if dtype_name == "float64" else "float32"
    return PrecisionContract(wide, wide, wide, wide, wide, output=dtype_name, bitwise=bitwise)


def narrow_operands(dtype_name: str, bitwise: frozenset[str]) -> PrecisionContract:
    """Return the contract of the Triton chunk kernels: products of operands in the inputs' format, sums in float32.

    In float16 a product q k within a chunk beyond 65,504 is infinite, as it is stored: |q| |k| must stay below that.
    The inverse multiplies in tf32 where beta |k|^2 <= 1 is certain, in three products of tf32 or in float32 elsewhere.
    """
    if dtype_name == "float32":
        return at_least_float32(dtype_name, bitwise)
    return PrecisionContract(dtype_name, "float32", "float32", "tf32", dtype_name, output=dtype_name, bitwise=bitwise)
