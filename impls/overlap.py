"""Tell whether tensors share memory: what is written must not be read by other programs of the same launch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Blocks:
    """Blocks of so many bytes at the multiples of strides, the largest first, each so many times."""

    strides: tuple[tuple[int, int], ...]
    block: int

    @property
    def reach(self) -> int:
        """Return the bytes from the first one to behind the last one."""
        return sum((size - 1) * stride for stride, size in self.strides) + self.block

    @property
    def inner(self) -> "_Blocks":
        """Return what lies at each multiple of the largest stride."""
        return _Blocks(self.strides[1:], self.block)


def check_memory(tensors: dict[str, torch.Tensor | None], written: tuple[str, ...]) -> None:
    """Refuse, by ValueError, what is written and shares memory with another tensor.

    Pools of one stride, each in the gaps of the others as in the pages of an engine, share none.
    """
    lying = sorted((x.data_ptr(), name) for name, x in tensors.items() if x is not None and x.numel())
    for i, (first, name) in enumerate(lying):
        x = tensors[name]
        reach = x.nbytes if x.is_contiguous() else _blocks(x).reach
        for start, other in lying[i + 1 :]:
            if start - first >= reach:
                break
            found = [part for part in written if part in (name, other)]
            if found and not _disjoint(start - first, _blocks(x), _blocks(tensors[other])):
                rest = other if found[0] == name else name
                raise ValueError(f"{found[0]} must share no memory with {rest}, as strides tell: a step writes it")


def _blocks(x: torch.Tensor) -> _Blocks:
    block, outer = x.element_size(), []
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if stride * x.element_size() == block:
            block *= size
        elif size > 1:
            outer.insert(0, (stride * x.element_size(), size))
    return _Blocks(tuple(outer), block)


def _disjoint(distance: int, x: _Blocks, y: _Blocks) -> bool:
    """Tell whether y, so many bytes behind x, is certain to share nothing with it: not where strides differ."""
    if distance >= x.reach or -distance >= y.reach:
        return True
    stride = x.strides[0][0] if x.strides else 0
    if not y.strides or not y.strides[0][0] == stride >= max(x.inner.reach, y.inner.reach):
        return False
    at = distance % stride
    return _disjoint(at, x.inner, y.inner) and _disjoint(at - stride, x.inner, y.inner)
