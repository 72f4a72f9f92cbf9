"""Count what KDA costs: floating-point operations, bytes that must move, bytes that must be kept.

One multiplication, addition or subtraction is one FLOP, a product of m x k with k x n matrices 2 m k n. Exponentials
are counted apart. Everything is exact for the algorithm named, nothing is a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kda_spec.types import Sizes

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Flops:
    """Hold counts: FLOPs inside matrix products, FLOPs outside of them, exponentials."""

    matmul: int
    elementwise: int
    exponentials: int

    @property
    def total(self) -> int:
        """Return all FLOPs, exponentials not among them."""
        return self.matmul + self.elementwise


def kda_flops_paper(T: int, d: int, C: int = 64) -> int:
    """Return equation 13, the FLOPs of one head of KDA: 6 T d^2 + 3 T C d + T C^2."""
    return 6 * T * d**2 + 3 * T * C * d + T * C**2


def attention_flops_paper(T: int, d: int) -> int:
    """Return equation 14, the dominant FLOPs of one head of full attention: 2 T^2 d."""
    return 2 * T**2 * d


def recurrent_flops(sizes: Sizes) -> Flops:
    """Return the FLOPs of the recurrence, token by token, for pre-activated gates.

    Per token and value head: k^T S~, the read S^T q and the outer product with its addition (2 K V each) count as
    matmul; decay K V, error V, beta k K and scale q K as elementwise; K exponentials.
    """
    K, V, rows = sizes.K, sizes.V, sizes.B * sizes.T * sizes.HV
    return Flops(matmul=rows * 6 * K * V, elementwise=rows * (K * V + V + 2 * K), exponentials=rows * K)


def tree_chunk_flops(sizes: Sizes, chunk_size: int, lengths: Sequence[int] | None = None) -> Flops:
    """Return the FLOPs of the tree-chunk form (chunks of C = 2^n tokens, the last one of a sequence padded).

    Per chunk and value head, with the blocks of triangular matrices taken as dense:

        level s = 1, 2, .., C/2   late rows of q and k times early rows of k, C/2s pairs              2 C s K
                                  inverse: -X_late L X_early, C/2s pairs                              2 C s^2
                                  late q, late k, early k, before, after times decays                 5 C K / 2
                                  beta times the rows of L                                            C s / 2
        once                      diagonal of q k^T                                                   2 C K
                                  (k before) S, (q before) S, (k after)^T delta                       6 C K V
                                  X diag(beta) (v - ..), A delta                                      4 C^2 V
                                  q before, k before, k after, scale q                                4 C K
                                  X times diag(beta)                                                  C^2
                                  v - .., sum of the two parts of o; decay and sum of S               2 C V + 2 K V

    There are log2 C levels; s adds up to C - 1 over them, s^2 to (C^2 - 1) / 3. `lengths` are those of the packed
    sequences; None means B sequences of T tokens. Raises ValueError for a chunk_size that is no power of two or lengths
    that do not add up to B * T.
    """
    C, K, V = chunk_size, sizes.K, sizes.V
    if C < 1 or C & (C - 1):
        raise ValueError(f"chunk_size must be a power of two, got {C}")
    heads = sizes.HV * _chunks(sizes, C, lengths)
    levels = C.bit_length() - 1
    tree = 2 * C * (C - 1) * K + 2 * C * (C * C - 1) // 3
    tree_scaling = levels * (5 * C * K) // 2 + C * (C - 1) // 2
    dense = 2 * C * K + 6 * C * K * V + 4 * C * C * V
    dense_scaling = 4 * C * K + C * C + 2 * C * V + 2 * K * V
    return Flops(heads * (tree + dense), heads * (tree_scaling + dense_scaling), heads * C * K)


def dplr_chunk_flops(sizes: Sizes, chunk_size: int, lengths: Sequence[int] | None = None) -> Flops:
    """Return the FLOPs of the tree-chunk form of general DPLR, counted as `tree_chunk_flops` counts KDA's.

    What binding a and b to k saves (section 6.2): per chunk and head, with C, K, V as there,

        level s = 1, 2, .., C/2   late rows of q and b times early rows of k and a                    4 C s K
                                  inverse, as there                                                   2 C s^2
                                  late q, late b, early k, early a times decays, which are three      7 C K / 2
        once                      diagonals of q k^T and q a^T                                        4 C K
                                  b' S, q' S, k'^T v, a'^T x                                          8 C K V
                                  A_bk v, X (..), A_qk v, A_qa x                                      8 C^2 V
                                  q', b', k', a', scale q                                             5 C K
                                  sums of two parts: x, o twice, S twice; the decay of S              3 C V + 3 K V
    """
    C, K, V = chunk_size, sizes.K, sizes.V
    if C < 1 or C & (C - 1):
        raise ValueError(f"chunk_size must be a power of two, got {C}")
    heads, levels = sizes.HV * _chunks(sizes, C, lengths), C.bit_length() - 1
    tree = 4 * C * (C - 1) * K + 2 * C * (C * C - 1) // 3
    dense = 4 * C * K + 8 * C * K * V + 8 * C * C * V
    scaling = levels * (7 * C * K) // 2 + 5 * C * K + 3 * C * V + 3 * K * V
    return Flops(heads * (tree + dense), heads * scaling, heads * C * K)


def minimal_bytes(
    sizes: Sizes,
    dtype: str = "bfloat16",
    gate_dtype: str = "float32",
    state_dtype: str = "float32",
    initial_state: bool = False,
    final_state: bool = False,
) -> int:
    """Return the bytes a forward pass must move: every input read once, every output written once.

    dtype is that of q, k, v and o, gate_dtype that of g and beta, state_dtype that of the states asked for.
    Raises ValueError for a dtype not in ITEMSIZE.
    """
    tokens = sizes.B * sizes.T
    rows = tokens * (2 * sizes.H * sizes.K + 2 * sizes.HV * sizes.V) * _itemsize("dtype", dtype)
    gates = tokens * sizes.HV * (sizes.K + 1) * _itemsize("gate_dtype", gate_dtype)
    return rows + gates + (initial_state + final_state) * state_bytes(sizes, state_dtype)


def minimal_backward_bytes(
    sizes: Sizes,
    dtype: str = "bfloat16",
    gate_dtype: str = "float32",
    state_dtype: str = "float32",
    initial_state: bool = False,
    final_state: bool = False,
) -> int:
    """Return the bytes a backward pass must move: inputs, do and dS_T read once, every gradient written once.

    dtypes as in `minimal_bytes`; initial_state: there is one, and it gets a gradient; final_state: there is a dS_T.
    """
    tokens = sizes.B * sizes.T
    rows = tokens * (4 * sizes.H * sizes.K + 3 * sizes.HV * sizes.V) * _itemsize("dtype", dtype)
    gates = tokens * sizes.HV * 2 * (sizes.K + 1) * _itemsize("gate_dtype", gate_dtype)
    return rows + gates + (2 * initial_state + final_state) * state_bytes(sizes, state_dtype)


def state_bytes(sizes: Sizes, dtype: str = "float32") -> int:
    """Return the bytes of the states of N sequences, N HV K V items: constant in T, 0 more per token."""
    return sizes.N * sizes.HV * sizes.K * sizes.V * _itemsize("dtype", dtype)


def attention_cache_bytes_per_token(heads: int, K: int, V: int, dtype: str = "bfloat16") -> int:
    """Return the bytes one token adds to the cache of a full-attention layer: a key and a value per head."""
    return heads * (K + V) * _itemsize("dtype", dtype)


def latent_cache_bytes_per_token(latent: int = 512, rope: int = 64, dtype: str = "bfloat16") -> int:
    """Return the bytes one token adds to the cache of an MLA layer: the latent and the key part beside it."""
    return (latent + rope) * _itemsize("dtype", dtype)


def convolution_cache_bytes(N: int, channels: int, taps: int = 4, dtype: str = "bfloat16") -> int:
    """Return the bytes of the inputs that short convolutions of so many channels keep of N sequences: constant in T."""
    return N * (taps - 1) * channels * _itemsize("dtype", dtype)


def _chunks(sizes: Sizes, C: int, lengths: Sequence[int] | None) -> int:
    lengths = [sizes.T] * sizes.B if lengths is None else lengths
    if sum(lengths) != sizes.B * sizes.T:
        raise ValueError(f"lengths must add up to B * T = {sizes.B * sizes.T}, got {sum(lengths)}")
    return sum(-(-length // C) for length in lengths)


def _itemsize(name: str, dtype: str) -> int:
    if dtype not in ITEMSIZE:
        raise ValueError(f"{name} must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    return ITEMSIZE[dtype]
