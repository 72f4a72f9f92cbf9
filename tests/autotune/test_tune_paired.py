"""Wilcoxon's signed-rank test against values that can be counted by hand."""

import itertools

import pytest

from autotune.paired import signed_rank


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (4, 2 / 16), (5, 2 / 32), (6, 2 / 64), (10, 2 / 1024)])
def test_all_on_one_side(n, p):
    assert signed_rank([-x for x in range(1, n + 1)]) == pytest.approx(p)


def test_it_is_the_share_of_signs_that_are_at_least_as_one_sided():
    ranks, total = range(1, 7), 21
    sums = [sum(rank for rank, up in zip(ranks, ups, strict=True) if up) for ups in itertools.product((0, 1), repeat=6)]
    for ups, observed in zip(itertools.product((-1, 1), repeat=6), sums, strict=True):
        expected = sum(min(x, total - x) <= min(observed, total - observed) for x in sums) / len(sums)
        assert signed_rank([rank * up for rank, up in zip(ranks, ups, strict=True)]) == pytest.approx(expected)


def test_equal_sizes_share_a_rank_and_zeros_say_nothing():
    assert signed_rank([]) == signed_rank([0.0, 0.0]) == 1.0
    assert signed_rank([1, -1, 0]) == 1.0
    assert signed_rank([2, 2, 2, 2, 2, 2, 0]) == pytest.approx(2 / 64)


def test_sides_are_alike():
    samples = [0.3, -0.1, 0.7, 0.2, -0.4, 0.9]
    assert signed_rank(samples) == signed_rank([-x for x in samples])
