"""General DPLR runs members of the family by their own update rules: DeltaNet, GDN, RWKV7, Comba, KDA and others."""

import numpy as np
import pytest
import torch

from impls.dplr_ops import FORMS, dplr
from kda_spec.family import FAMILY, Parameters

FLOAT32 = 1e-6
"""As twice that of tests/impls/test_dplr.py: inputs are rounded once more."""
H, T, K, V = 2, 40, 6, 5


ONE_GATE = ("RetNet", "Mamba2", "Comba", "GDN")
"""Members whose decay is common to all channels."""


def drawn(member) -> Parameters:
    """Draw everything that a member may use, keys of length 1; half of the gates are strong."""
    random, shape = np.random.default_rng(0), (1, H, T)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in random.normal(size=(2, *shape, K))]
    g = -np.exp(2 * random.normal(size=(*shape, 1 if member.name in ONE_GATE else K)) - 1)
    return Parameters(
        v=random.normal(size=(*shape, V)), k=unit[0], g=g, beta=random.random(shape), feedback=random.random(shape),
        k_hat=unit[1], rate=random.random((*shape, K)),
    )  # fmt: skip


def by_rule(member, q: np.ndarray, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Return o [1, H, T, V] and the last states [1, H, K, V], token by token by the member's rule."""
    o, S = np.zeros((1, H, T, V)), np.zeros((1, H, K, V))
    for h in range(H):
        for t in range(T):
            own = Parameters(**{name: x[0, h, t] for name, x in vars(parameters).items()})
            S[0, h] = member.rule(S[0, h], own)
            o[0, h, t] = q[0, h, t] @ S[0, h] / np.sqrt(K)
    return o, S


def close(x: torch.Tensor, exact: np.ndarray) -> bool:
    return np.linalg.norm(x.double().numpy() - exact) <= FLOAT32 * np.linalg.norm(exact)


def test_those_that_the_report_compares_are_among_them():
    assert {"DeltaNet", "GDN", "RWKV7", "Comba", "KDA"} <= {member.name for member in FAMILY}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
def test_a_member_is_its_own_rule(name, member):
    parameters = drawn(member)
    q = np.random.default_rng(1).normal(size=(1, H, T, K))
    exact, last = by_rule(member, q, parameters)
    k, v, a, b, g = member.arguments(parameters)
    rows = (np.broadcast_to(x, (1, H, T, x.shape[-1] if x is v else K)) for x in (q, k, v, a, b, g))
    tokens = [torch.tensor(np.float32(x)).transpose(1, 2).contiguous() for x in rows]
    o, S = dplr(*tokens, output_final_state=True, implementation=name, chunk_size=16)
    assert close(o, exact.swapaxes(1, 2)) and close(S, last)
