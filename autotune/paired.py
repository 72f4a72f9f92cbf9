"""Tell two configurations apart by samples taken in the same rounds: Wilcoxon's signed-rank test, exact."""

from collections.abc import Sequence

LEVEL = 0.05
"""Chance of calling equal ones different."""
TIE = 0.01
"""Relative difference below which two configurations are the same to a user."""


def signed_rank(differences: Sequence[float]) -> float:
    """Return the two-sided probability of ranks as one-sided as these where neither side is quicker.

    Zeros are left out, equal sizes share their mean rank. Exact: all signs of the ranks are counted. 1 without samples.
    """
    signed = sorted((x for x in differences if x), key=abs)
    ranks = _doubled_ranks([abs(x) for x in signed])
    total = sum(ranks)
    counts = [1] + [0] * total
    for rank in ranks:
        counts = [n + (counts[i - rank] if i >= rank else 0) for i, n in enumerate(counts)]
    positive = sum(rank for rank, x in zip(ranks, signed, strict=True) if x > 0)
    extreme = min(positive, total - positive)
    return min(1.0, 2 * sum(counts[: extreme + 1]) / 2 ** len(ranks))


def _doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Return twice the rank of each of the sorted sizes, so that shared ranks stay whole."""
    first = {size: i for i, size in reversed(list(enumerate(sizes)))}
    last = {size: i for i, size in enumerate(sizes)}
    return [first[size] + last[size] + 2 for size in sizes]
