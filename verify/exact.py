"""Exact numbers: rounding to the dtypes that kernels use, and random draws that are the same on every machine.

NumPy promises the raw stream of its bit generators but not its distributions, so every draw here is built from raw
Philox integers with operations that IEEE 754 defines exactly (integer sums, division by powers of two, sqrt, one
division).
"""

import hashlib

import numpy as np

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-10, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half the spacing of numbers just above 1: the largest relative error of one rounding to nearest. The whole
spacing for tf32, to which the matrix instructions cut what they are given."""

SMALLEST_STEP = {
    "bfloat16": 2.0**-126,
    "float16": 2.0**-24,
    "tf32": 2.0**-126,
    "float32": 2.0**-126,
    "float64": 2.0**-500,
}
"""Absolute spacing below which a dtype stops resolving; kernels may flush float32 and bfloat16 subnormals to zero."""

LARGEST = {"bfloat16": 3.3e38, "float16": 65504.0, "tf32": 3.4e38, "float32": 3.4e38, "float64": 1.7e308}
"""Largest finite number."""


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round [...] to the nearest number of `dtype` (ties to even; tf32 is cut), returned in the dtype of x."""
    x = np.asarray(x)
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "float64":
            return x
        if dtype == "float16":
            return x.astype(np.float16).astype(x.dtype)
        single = x.astype(np.float32)
        if dtype == "bfloat16":
            single = _drop_bits(single, 16)
        if dtype == "tf32":
            single = (np.ascontiguousarray(single).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            single = single.reshape(x.shape)
        return single.astype(x.dtype)


def _drop_bits(single: np.ndarray, bits: int) -> np.ndarray:
    words = np.ascontiguousarray(single).view(np.uint32)
    half = np.uint32((1 << (bits - 1)) - 1) + ((words >> np.uint32(bits)) & np.uint32(1))
    return ((words + half) & np.uint32(0xFFFFFFFF ^ ((1 << bits) - 1))).view(np.float32).reshape(single.shape)


class Dice:
    """Random draws named by a seed and a label: equal names give equal numbers, whatever was drawn before."""

    def __init__(self, seed: int, *label: object):
        digest = hashlib.sha256(repr((seed, *label)).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def raw(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw raw 64-bit integers."""
        return self._bits.random_raw(int(np.prod(shape))).reshape(shape)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Draw integers in [low, high)."""
        return low + (self.raw(shape) % np.uint64(high - low)).astype(np.int64)

    def integer(self, low: int, high: int) -> int:
        """Draw one integer in [low, high)."""
        return int(self.integers(low, high))

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw multiples of 2^-24 in [0, 1)."""
        return (self.raw(shape) >> np.uint64(40)).astype(np.float64) / 2.0**24

    def signs(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw -1 or 1."""
        return 1.0 - 2.0 * self.integers(0, 2, shape)

    def bell(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw integers with a bell-shaped distribution of standard deviation 65,536 and magnitude below 2^19."""
        words = self.raw((*shape, 3))
        parts = [(words >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
        return np.sum(np.stack(parts).astype(np.int64), axis=(0, -1)) - 6 * 65535

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw approximately standard normal numbers, multiples of 2^-16 in (-6, 6)."""
        return self.bell(shape) / 65536.0

    def permutation(self, n: int) -> np.ndarray:
        """Draw a permutation of 0..n-1."""
        return np.argsort(self.raw((n,)), kind="stable")

    def shuffle(self, n: int) -> np.ndarray:
        """Draw a permutation of 0..n-1 that moves something, for n of at least 2."""
        order = self.permutation(n)
        return np.roll(order, 1) if np.array_equal(order, np.arange(n)) else order


def unit_rows(integers: np.ndarray) -> np.ndarray:
    """Normalise integer rows [..., K] to Euclidean norm 1: exact sum of squares, one square root, one division."""
    squares = np.sum(integers.astype(np.int64) ** 2, axis=-1, keepdims=True)
    return integers / np.sqrt(np.maximum(squares, 1).astype(np.float64))
