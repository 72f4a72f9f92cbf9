"""Find sequences, chunks and segments inside a Triton program, padded or packed, without a table made beforehand.

A span is a run of `span` tokens of one sequence: a chunk, or a segment of several chunks. Span i of sequence n is kept
in slot n cdiv(T, span) + i of a padded batch [B, T], and in slot cu_seqlens[n] // span + n + i of a packed one: a
sequence of L tokens has at most one span more than the multiples of `span` that it steps over, so slots never collide,
and T // span + N of them are enough. Positions are clamped into [0, T]: a wrong cu_seqlens reads nothing out of bounds.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(cu_seqlens, i_n, T):
    """Return the first row on the flat token axis, and the length, of sequence i_n."""
    if cu_seqlens is None:
        return i_n.to(tl.int64) * T, T + 0 * i_n
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), T)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1).to(tl.int64), first), T)
        return first, (last - first).to(tl.int32)


@triton.jit
def first_slot(cu_seqlens, i_n, T, span):
    """Return the slot of the first span of sequence i_n."""
    if cu_seqlens is None:
        return i_n.to(tl.int64) * ((T + span - 1) // span)
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), T)
        return first // span + i_n


@triton.jit
def owner(cu_seqlens, slot, T, N, span):
    """Return the sequence to which a slot belongs: the last one whose first slot is not behind it."""
    if cu_seqlens is None:
        return slot // ((T + span - 1) // span)
    else:
        low, high = 0 * slot, 0 * slot + N - 1
        while low < high:
            middle = (low + high + 1) // 2
            found = first_slot(cu_seqlens, middle, T, span) <= slot
            low, high = tl.where(found, middle, low), tl.where(found, high, middle - 1)
        return low


@triton.jit
def spans_before(cu_seqlens, i_n, T, span):
    """Return how many spans all sequences before i_n have: the row of its first one where rows have no gaps."""
    if cu_seqlens is None:
        return i_n.to(tl.int64) * ((T + span - 1) // span)
    else:
        count = 0 * i_n.to(tl.int64)
        for n in range(i_n):
            _, length = bounds(cu_seqlens, count * 0 + n, T)
            count += (length + span - 1) // span
        return count


@triton.jit
def tile(rows, columns, stride, CONTIGUITY: tl.constexpr):
    """Return offsets [rows, columns] of a row-major tile, told to be contiguous by so many elements per thread."""
    return tl.max_contiguous(rows[:, None] * stride + columns[None, :], [1, CONTIGUITY])


@triton.jit
def inside(rows, n_rows, columns, n_columns, EVEN: tl.constexpr):
    """Return the mask of a tile; where the width is EVEN no column is outside."""
    if EVEN:
        return (rows < n_rows)[:, None]
    else:
        return (rows < n_rows)[:, None] & (columns < n_columns)[None, :]


@triton.jit
def state_offsets(i_s, o_v, o_k, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr):
    """Return offsets [BV, BK] into states [.., K, V], or [.., V, K] where V_FIRST, of the state i_s."""
    if V_FIRST:
        return i_s * (K * V) + o_v[:, None] * K + o_k[None, :]
    else:
        return i_s * (K * V) + o_k[None, :] * V + o_v[:, None]
