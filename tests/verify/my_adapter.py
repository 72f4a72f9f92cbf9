"""An adapter as its users write it: other names, another layout, a domain of its own."""

from broken_kernels import float64_copy


class Transposed:
    """A kernel that stores states [V, K], has no packing, and takes float32 only."""

    dtypes = ("float32",)
    refuses = {"varlen": "one batch a call", "g < -5": "documented bound"}

    def __call__(self, q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False):
        o, S = float64_copy(q, k, v, g, beta, scale, initial_state, output_final_state)
        return o, S


class Undecayed(Transposed):
    """The same, with a bug."""

    def __call__(self, q, k, v, g, beta, **keywords):
        return super().__call__(q, k, v, 0 * g, beta, **keywords)


class Misspelt(Transposed):
    refuses = {"varlem": "a slip"}


class NoCall:
    pass
