"""The counts are those of an algorithm that runs: a counting tree-chunk form gives KDA's numbers and the formula's."""

import numpy as np
import pytest

from kda_spec import Sizes, general_dplr, kda
from kda_spec.costs import (
    Flops,
    attention_cache_bytes_per_token,
    attention_flops_paper,
    dplr_chunk_flops,
    kda_flops_paper,
    latent_cache_bytes_per_token,
    minimal_backward_bytes,
    minimal_bytes,
    recurrent_flops,
    state_bytes,
    tree_chunk_flops,
)


class Counter:
    """Compute with NumPy and count: products of matrices as 2 m k n, other operations one per element of the result."""

    def __init__(self):
        self.matmul = self.elementwise = self.exponentials = 0

    def product(self, a, b):
        self.matmul += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    def row_dots(self, a, b):
        self.matmul += 2 * a.size
        return (a * b).sum(1)

    def each(self, operation, a, b):
        result = operation(a, b)
        self.elementwise += result.size
        return result

    def times(self, a, b):
        return self.each(np.multiply, a, b)

    def exp(self, a):
        self.exponentials += a.size
        return np.exp(a)


def merge(n: Counter, group, sibling):
    """Merge two groups (q, k, beta, before, after, A, X) of s tokens into one of 2s; decays are only multiplied."""
    (q0, k0, beta0, before0, after0, A0, X0), (q1, k1, beta1, before1, after1, A1, X1) = group, sibling
    zero = np.zeros_like(A0)
    q_late, k_late, k_early = n.times(q1, before1), n.times(k1, before1), n.times(k0, after0)
    both = n.product(np.concatenate([q_late, k_late]), k_early.T)
    s = len(q0)
    corner = -n.product(n.product(X1, n.times(both[s:], beta1[:, None])), X0)
    return (
        np.concatenate([q0, q1]),
        np.concatenate([k0, k1]),
        np.concatenate([beta0, beta1]),
        np.concatenate([before0, n.times(before1, before0[-1])]),
        np.concatenate([n.times(after0, before1[-1]), after1]),
        np.block([[A0, zero], [both[:s], A1]]),
        np.block([[X0, zero], [corner, X1]]),
    )


def counted_chunk(n: Counter, q, k, v, g, beta, S, scale):
    q, alpha = n.times(scale, q), n.exp(g)
    diagonal = n.row_dots(q, k)
    one = [slice(i, i + 1) for i in range(len(q))]
    groups = [(q[i], k[i], beta[i], alpha[i], np.ones_like(k[i]), diagonal[i, None], np.eye(1)) for i in one]
    while len(groups) > 1:
        groups = [merge(n, *pair) for pair in zip(groups[::2], groups[1::2], strict=True)]
    *_, before, after, A, X = groups[0]
    X_beta = n.times(X, beta[None])
    delta = n.product(X_beta, n.each(np.subtract, v, n.product(n.times(k, before), S)))
    o = n.each(np.add, n.product(n.times(q, before), S), n.product(A, delta))
    written = n.product(n.times(k, after).T, delta)
    return o, n.each(np.add, n.times(before[-1][:, None], S), written)


@pytest.mark.parametrize("C", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("K, V", [(4, 4), (5, 3)])
def test_tree_chunk_counts_are_those_of_a_run(cases, C, K, V):
    rng, n = np.random.default_rng(C), Counter()
    T = 2 * C
    q, k = rng.standard_normal((2, T, K)) / K
    v, g, beta, S = rng.standard_normal((T, V)), -rng.random((T, K)), rng.random(T), rng.standard_normal((K, V))
    expected, S_T = kda(q, k, v, g, beta, S)
    chunks = []
    for rows in (slice(0, C), slice(C, T)):
        o, S = counted_chunk(n, q[rows], k[rows], v[rows], g[rows], beta[rows], S, K**-0.5)
        chunks.append(o)
    assert cases.relative(np.concatenate(chunks), expected) < 1e-12 and cases.relative(S, S_T) < 1e-12
    assert Flops(n.matmul, n.elementwise, n.exponentials) == tree_chunk_flops(Sizes(1, T, 1, 1, K, V, 1), C)


def merge_dplr(n: Counter, group, sibling):
    """Merge two groups (rows q, b, k, a; decays up to, before and behind a token; A_qk, A_qa, A_bk, X) of s tokens."""
    (rows0, (upto0, before0, behind0), squares0), (rows1, (upto1, before1, behind1), squares1) = group, sibling
    late = n.times(rows1[0], upto1), n.times(rows1[1], before1)
    early = n.times(rows0[2], behind0), n.times(rows0[3], behind0)
    s, total = len(upto0), upto0[-1]
    corner = n.product(np.concatenate(late), np.concatenate(early).T)
    corners = [corner[:s, :s], corner[:s, s:], corner[s:, :s]]
    corners.append(-n.product(n.product(squares1[3], corner[s:, s:]), squares0[3]))
    decays = (
        np.concatenate([upto0, n.times(upto1, total)]),
        np.concatenate([before0, n.times(before1, total)]),
        np.concatenate([n.times(behind0, upto1[-1]), behind1]),
    )
    zero = np.zeros((s, s))
    squares = [np.block([[x, zero], [y, z]]) for x, y, z in zip(squares0, corners, squares1, strict=True)]
    return [np.concatenate(pair) for pair in zip(rows0, rows1, strict=True)], decays, squares


def counted_dplr_chunk(n: Counter, q, k, v, a, b, g, S, scale):
    q, alpha, one = n.times(scale, q), n.exp(g), np.ones((1, k.shape[1]))
    qk, qa = n.row_dots(q, k), n.row_dots(q, a)
    groups = []
    for i in range(len(q)):
        squares = [qk[i, None, None], qa[i, None, None], np.zeros((1, 1)), np.eye(1)]
        groups.append(([x[i : i + 1] for x in (q, b, k, a)], (alpha[i : i + 1], one, one), squares))
    while len(groups) > 1:
        groups = [merge_dplr(n, *pair) for pair in zip(groups[::2], groups[1::2], strict=True)]
    _, (upto, before, behind), (qk, qa, bk, X) = groups[0]
    x = n.product(X, n.each(np.add, n.product(n.times(b, before), S), n.product(bk, v)))
    o = n.each(np.add, n.product(n.times(q, upto), S), n.product(qk, v))
    o = n.each(np.subtract, o, n.product(qa, x))
    S = n.each(np.add, n.times(upto[-1][:, None], S), n.product(n.times(k, behind).T, v))
    return o, n.each(np.subtract, S, n.product(n.times(a, behind).T, x))


@pytest.mark.parametrize("C", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("K, V", [(4, 4), (5, 3)])
def test_dplr_counts_are_those_of_a_run(cases, C, K, V):
    rng, n, T = np.random.default_rng(C), Counter(), 2 * C
    q, k, a, b = rng.standard_normal((4, T, K)) / K
    v, g, S = rng.standard_normal((T, V)), -rng.random((T, K)), rng.standard_normal((K, V))
    expected, S_T = general_dplr(q, k, v, a, b, g, S)
    chunks = []
    for rows in (slice(0, C), slice(C, T)):
        o, S = counted_dplr_chunk(n, *(x[rows] for x in (q, k, v, a, b, g)), S, K**-0.5)
        chunks.append(o)
    assert cases.relative(np.concatenate(chunks), expected) < 1e-12 and cases.relative(S, S_T) < 1e-12
    assert Flops(n.matmul, n.elementwise, n.exponentials) == dplr_chunk_flops(Sizes(1, T, 1, 1, K, V, 1), C)


def test_binding_a_and_b_to_k_saves_products():
    """At 128 channels and C = 16 a free a and b cost 1.41 times the FLOPs, at C = 64 1.54 times, in the same form."""
    sizes = Sizes(1, 64, 1, 1, 128, 128, 1)
    ratios = [dplr_chunk_flops(sizes, C).total / tree_chunk_flops(sizes, C).total for C in (16, 64)]
    assert ratios == pytest.approx([1.41, 1.54], abs=0.005)


def test_recurrent_counts_are_those_of_a_run():
    rng, n, (T, K, V) = np.random.default_rng(0), Counter(), (3, 5, 4)
    S, scale = np.zeros((K, V)), K**-0.5
    rows = *rng.random((2, T, K)), rng.random((T, V)), -rng.random((T, K)), rng.random(T)
    for q, k, v, g, beta in zip(*rows, strict=True):
        S = n.times(n.exp(g)[:, None], S)
        error = n.each(np.subtract, v[None], n.product(k[None], S))
        S = S + n.product(n.times(beta, k)[:, None], error)
        n.product(n.times(scale, q)[None], S)
    # An outer product is K V multiplications, its sum with S K V additions: the 2 K V that `product` counts.
    assert Flops(n.matmul, n.elementwise, n.exponentials) == recurrent_flops(Sizes(1, T, 1, 1, K, V, 1))


def test_counts_scale_with_value_heads_and_chunks_and_pad_the_last():
    one = tree_chunk_flops(Sizes(1, 16, 1, 1, 8, 8, 1), 16)
    assert tree_chunk_flops(Sizes(2, 40, 2, 4, 8, 8, 2), 16).total == 2 * 3 * 4 * one.total
    assert tree_chunk_flops(Sizes(1, 40, 1, 1, 8, 8, 4), 16, lengths=[0, 1, 17, 22]).total == 5 * one.total
    assert tree_chunk_flops(Sizes(1, 0, 1, 1, 8, 8, 1), 16).total == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: tree_chunk_flops(s, 48), "chunk_size must be a power of two, got 48"),
        (lambda s: tree_chunk_flops(s, 16, [3]), r"lengths must add up to B \* T = 8, got 3"),
        (lambda s: minimal_bytes(s, "int8"), "dtype must be one of float64, .*, float16, got 'int8'"),
        (lambda s: state_bytes(s, "fp32"), "dtype must be one of"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Sizes(1, 8, 1, 1, 4, 4, 1))


def test_paper_s_equations():
    assert kda_flops_paper(T=1000, d=128) == 6 * 1000 * 16384 + 3 * 1000 * 64 * 128 + 1000 * 4096
    assert attention_flops_paper(T=1000, d=128) == 256_000_000
    # Both leading terms are 6 T K V: reading for the error, reading for the output, writing.
    ours = tree_chunk_flops(Sizes(1, 64, 1, 1, 2048, 2048, 1), 64).matmul / kda_flops_paper(64, 2048)
    assert 1 < ours < 1.05


def test_bytes_of_a_case_counted_by_hand():
    sizes = Sizes(B=2, T=10, H=2, HV=4, K=8, V=16, N=2)
    q = k = 2 * 10 * 2 * 8 * 2
    v = o = 2 * 10 * 4 * 16 * 2
    g, beta, S = 2 * 10 * 4 * 8 * 4, 2 * 10 * 4 * 4, 2 * 4 * 8 * 16 * 4
    assert state_bytes(sizes) == S and state_bytes(sizes, "bfloat16") == S // 2
    assert minimal_bytes(sizes) == q + k + v + o + g + beta
    assert minimal_bytes(sizes, initial_state=True, final_state=True) == minimal_bytes(sizes) + 2 * S
    assert minimal_bytes(sizes, "float32") == 2 * (q + k + v + o) + g + beta
    backward = 2 * (q + k + v + g + beta) + o
    assert minimal_backward_bytes(sizes) == backward
    assert minimal_backward_bytes(sizes, initial_state=True, final_state=True) == backward + 3 * S


def test_cache_bytes_of_the_released_model():
    # Kimi-Linear-48B: 32 heads of 128 x 128 in KDA layers, a latent of 512 + 64 in its MLA layers.
    assert state_bytes(Sizes(1, 1, 32, 32, 128, 128, 1)) == 2 * 1024**2
    assert latent_cache_bytes_per_token() == 1152
    assert attention_cache_bytes_per_token(heads=32, K=128, V=128) == 16384
