"""A decode step reads parts of a projection where they lie: one launch, and nothing beside it."""

import pytest
import torch

from impls import decode_triton
from impls.decode import GatedNorm, decode_kda

N, H, HV, K, V = 3, 2, 4, 6, 5
SIZES = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV,), "z": (HV, V)}
GATE = torch.linspace(-1, 1, HV)


def projected(T: int) -> dict[str, torch.Tensor]:
    """Return views of one projection [N, T, everything]."""
    widths = [torch.Size(x).numel() for x in SIZES.values()]
    whole = torch.randn(N, T, sum(widths), generator=torch.Generator().manual_seed(0))
    return {name: x.view(N, T, *SIZES[name]) for name, x in zip(SIZES, whole.split(widths, 2), strict=True)}


def stepped(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    state = torch.randn(N, HV, K, V, generator=torch.Generator().manual_seed(1))
    tokens = [x[name] for name in ("q", "k", "v", "g", "beta")]
    norm = GatedNorm(torch.linspace(1, 2, V), x["z"])
    asked = {"use_gate_in_kernel": True, "A_log": GATE, "use_qk_l2norm_in_kernel": True, "norm": norm}
    o = decode_kda(*tokens, state, implementation="decode_triton", use_beta_sigmoid_in_kernel=True, **asked)
    return o, state


@pytest.mark.parametrize("T", [1, 3])
def test_parts_of_a_projection_are_read_where_they_lie(T, monkeypatch):
    x = projected(T)
    expected = stepped({name: y.contiguous() for name, y in x.items()})
    copied, real = [], torch.Tensor.contiguous

    def contiguous(x):
        copied.extend([] if x.is_contiguous() else [x.shape])
        return real(x)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    found = stepped(x)
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))
    assert not copied


@pytest.mark.parametrize(
    "turned",
    [lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), lambda y: y.mT.contiguous().mT if y.ndim > 3 else y],
    ids=["token first", "channel first"],
)
def test_what_lies_otherwise_is_copied_and_has_the_same_bits(turned):
    x = projected(3)
    expected = stepped({name: y.contiguous() for name, y in x.items()})
    found = stepped({name: turned(y) for name, y in x.items()})
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "strides", "row"),
    [
        ((3, 1, 2, 4), (99, 7, 4, 1), 99),
        ((3, 2, 2, 4), (40, 20, 4, 1), 20),
        ((3, 2, 2, 4), (50, 20, 4, 1), None),
        ((1, 2, 2, 4), (1, 20, 4, 1), 20),
        ((1, 1, 2, 4), (1, 1, 4, 1), 8),
        ((3, 2, 2, 4), (40, 20, 1, 2), None),
        ((3, 2, 1, 4), (40, 20, 77, 1), 20),
        ((0, 2, 2, 4), (40, 20, 4, 1), 20),
    ],
)
def test_the_distance_of_tokens(shape, strides, row):
    assert decode_triton.row_of(torch.empty(500).as_strided(shape, strides)) == row
