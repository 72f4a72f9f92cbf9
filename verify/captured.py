"""Captured inputs as one more family: q, k, v, g, beta of a trained layer, from a safetensors file.

`python -m kimi_linear.synthetic capture` writes such a file; anybody's will do: q and k [B, T, H, K], k normalised, v
[B, T, HV, V], g [B, T, HV, K] the log decay, beta [B, T, HV], activated. A recipe says which windows of it a case
takes, so that it is cut, varied and made smaller like any other: sequences, where they begin, heads and channels follow
from its seed and its sizes. What is rounded and shrunk for a dtype is so as of all other families.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from verify.exact import Dice
from verify.recipes import Recipe

NAMES = ("q", "k", "v", "g", "beta")
DIGITS = 16
LONGEST = 1e-2
"""What a key's length may exceed 1 by: normalised in bfloat16."""


class CapturedError(ValueError):
    """A file without captured inputs; the message names it, what was expected and what came."""


@dataclass(frozen=True, eq=False)
class Captured:
    """The arrays of a file, in float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray


def named(path: Path) -> str:
    """Return FILE#digest, as it stands in a recipe; CapturedError for a file that holds no captured inputs."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CapturedError(f"{path}: {error.strerror}") from error
    _check(path, _tensors(path, content))
    return f"{path}#{hashlib.sha256(content).hexdigest()[:DIGITS]}"


@cache
def read(name: str) -> Captured:
    """Read FILE#digest; CapturedError where the file is not there any more, or is another one."""
    path, _, digest = name.rpartition("#")
    if not path or named(Path(path)) != name:
        raise CapturedError(f"{path or name}: expected the file with SHA-256 {digest}..., got another one")
    return Captured(**_tensors(Path(path), Path(path).read_bytes()))


def _tensors(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise CapturedError(f"{path}: captured inputs need safetensors: install kda-forge[model]") from error
    try:
        found = load(content)
    except SafetensorError as error:
        raise CapturedError(f"{path}: no safetensors file: {error}") from error
    if missing := [name for name in NAMES if name not in found]:
        raise CapturedError(f"{path}: expected q, k, v, g and beta, got no {', '.join(missing)}")
    return {name: found[name].double().numpy() for name in NAMES}


def _check(path: Path, x: dict[str, np.ndarray]) -> None:
    """Refuse what lies outside of the domain that implementations are judged on."""
    if x["q"].ndim != 4 or x["v"].ndim != 4 or 0 in x["q"].shape + x["v"].shape:
        raise CapturedError(f"{path}: q and v must be [B, T, H, K] and [B, T, HV, V], got {_sizes(x)}")
    (B, T, H, K), (HV, V) = x["q"].shape, x["v"].shape[2:]
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "g": (B, T, HV, K), "beta": (B, T, HV)}
    if HV % H or any(x[name].shape != shape for name, shape in shapes.items()):
        raise CapturedError(f"{path}: shapes of q, k, v, g and beta must fit each other, got {_sizes(x)}")
    for name in NAMES:
        if not np.isfinite(x[name]).all():
            raise CapturedError(f"{path}: {name} must be finite")
    if (x["g"] > 0).any() or (x["beta"] < 0).any() or (x["beta"] > 2).any():
        raise CapturedError(f"{path}: g must be at most 0 (log decays) and beta from 0 to 2, both activated")
    if (longest := np.linalg.norm(x["k"], axis=-1).max()) > 1 + LONGEST:
        raise CapturedError(f"{path}: keys must be normalised, got one of length {longest:.3g}")


def _sizes(x: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(x[name].shape)}" for name in NAMES)


def head_dims(name: str) -> tuple[int, ...]:
    """Return K, and V where it is another: what recipes draw theirs from."""
    found = read(name)
    return tuple(sorted({found.k.shape[-1], found.v.shape[-1]}))


def recast(recipe: Recipe, name: str) -> Recipe:
    """Return a drawn recipe with captured numbers instead of its families': sizes, packing, state and dtype stay."""
    words = {"keys": "unit", "queries": "unit", "values": "normal", "gates": "zero", "betas": "one", "plant": 0}
    if (read(name).beta > 1).any():
        words["betas"] = "above_one"  # the class of the triangular solve
    plain = {"l2norm": False, "activation": "none", "sigmoid": "none"}
    return replace(recipe, captured=name, G=ratio(name), **words, **plain)


def ratio(name: str) -> int:
    """Return HV / H."""
    found = read(name)
    return found.v.shape[2] // found.q.shape[2]


def cut(recipe: Recipe) -> Captured:
    """Cut the arrays of a recipe: q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV].

    Each sequence of the batch is one of the file's, from a token of its own on, all from one head on, which the seed
    chooses; behind the last token, head or channel of the file comes its first.
    """
    found, dice = read(recipe.captured), Dice(recipe.seed, "captured")
    B, T, H, K = found.q.shape
    rows, first, head = dice.integers(0, B, (recipe.B,)), dice.integers(0, T, (recipe.B,)), dice.integer(0, H)
    tokens = (first[:, None] + np.arange(recipe.T)) % T
    q_heads = (head + np.arange(recipe.H)) % H
    v_heads = (q_heads[:, None] * (found.v.shape[2] // H) + np.arange(recipe.G) % (found.v.shape[2] // H)).reshape(-1)
    K, V = np.arange(recipe.K) % K, np.arange(recipe.V) % found.v.shape[-1]

    def taken(x: np.ndarray, heads: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        picked = x[rows[:, None], tokens][:, :, heads]
        return picked if channels is None else picked[..., channels]

    return Captured(
        q=taken(found.q, q_heads, K),
        k=taken(found.k, q_heads, K),
        v=taken(found.v, v_heads, V),
        g=taken(found.g, v_heads, K),
        beta=taken(found.beta, v_heads),
    )
