"""Other people's kernels as ready-made targets: `python -m verify fla`, where their packages are installed.

A peer is imported only when it is named. What its documentation excludes is declared here and shown as UNSUPPORTED with
its share; what it raises on is found by the probe.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec

import torch

from impls.contracts import at_least_float32
from impls.peers import fla, flash_kda
from verify.recipes import Recipe

ON_TRITON = ("cuda", "interpret")
BELOW = "documented: gates below {} overflow"


@dataclass(frozen=True)
class Peer:
    """Somebody's kernel: its package, and either the place of a function with FLA's signature or an adapter class."""

    distribution: str
    """The package as pip names it."""
    place: str
    """package.module:function, what a script calls."""
    summary: str
    adapter: type | None = None
    """None: the function itself is the target."""
    keywords: Mapping[str, object] = field(default_factory=dict)
    """What a script adds to a call."""
    same_signature: bool = True
    """The function can be called as FLA's chunk_kda: a failing case gets a script."""
    unwrapped: bool = False
    """It is what the function's decorators wrap."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    head_dims: tuple[int, ...] = ()
    """K and V that it takes, where they are few: the others are not drawn."""

    @property
    def installed(self) -> bool:
        """Tell whether its package is there, without importing it."""
        return find_spec(self.place.partition(".")[0].partition(":")[0]) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        return metadata.version(self.distribution)


class FlaChunk:
    """FLA's chunk_kda, whose Triton kernels also run in the interpreter: its autotuner then takes the first choice."""

    safe_gate = False
    dtypes = ("float32", "bfloat16", "float16")
    devices = ON_TRITON
    chunk_sizes = (32, 64)
    contract = staticmethod(fla.contract)
    keywords = (
        *("scale", "initial_state", "output_final_state", "cu_seqlens", "chunk_size", "state_v_first", "A_log"),
        *("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"),
        *("lower_bound", "dt_bias"),
    )

    def __init__(self):
        self._function = fla.load(self.safe_gate)

    def __call__(self, q, k, v, g, beta, **keywords):
        return self._function(q, k, v, g, beta, **keywords)


class FlaSafeGate(FlaChunk):
    """The same with safe_gate, which is documented for gates in [-5, 0) and asks for a lower bound inside."""

    safe_gate = True
    refuses = {"g < -5": BELOW.format(-5)}

    @staticmethod
    def settle(recipe: Recipe) -> Recipe:
        return replace(recipe, activation="lower_bound") if recipe.activation == "softplus" else recipe


class FlaRecurrent(FlaChunk):
    """FLA's fused_recurrent_kda: token by token, forward only."""

    form = "recurrent"
    chunk_sizes = ()
    keywords = tuple(x for x in FlaChunk.keywords if x != "chunk_size")
    refuses = {"backward": "documented: no autograd function"}
    contract = staticmethod(partial(at_least_float32, bitwise=frozenset()))

    def __init__(self):
        self._function = fla.load_recurrent()


class FlashKda:
    """FlashKDA's forward: K = V = 128, bfloat16, everything activated inside, states stored [V, K]."""

    dtypes = ("bfloat16",)
    devices = ("cuda",)
    refuses = {"HV > H": "documented: HV = H", "backward": "inference only", "allow_neg_eigval": "sigmoid only"}
    contract = staticmethod(flash_kda.contract)

    def __init__(self):
        self._function = flash_kda.load()

    def __call__(self, q, k, v, g, beta, *, initial_state=None, output_final_state=False, **keywords):
        state = None if initial_state is None else initial_state.mT.contiguous()
        o, S = self._function(
            q, k, v, g, beta, initial_state=state, output_final_state=output_final_state, state_v_first=True, **keywords
        )
        return o, None if S is None else S.mT

    @staticmethod
    def settle(recipe: Recipe) -> Recipe:
        return replace(recipe, l2norm=True, activation="lower_bound", sigmoid="sigmoid", gates_float32=False)


class AttentionGym:
    """attention-gym's chunk_kda: its eager reference on a CPU, its kernels on a GPU; states stored [V, K]."""

    function = "chunk_kda"
    dtypes = ("float32", "bfloat16", "float16")
    devices = ("cpu", "cuda")
    refuses = {"g = -inf": "documented: finite gates"}

    def __init__(self):
        self._function = getattr(importlib.import_module("attn_gym.linear"), self.function)

    def __call__(
        self, q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        state = None if initial_state is None else initial_state.mT.contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        how = {"scale": scale, "cu_seqlens": offsets, "output_final_state": output_final_state}
        o, S = self._function(q, k, v, g, beta, state, impl="fused" if q.is_cuda else "reference", **how)
        return o, None if S is None else S.mT


class AttentionGymRecurrent(AttentionGym):
    """attention-gym's recurrent_kda."""

    function = "recurrent_kda"
    form = "recurrent"


class FlashInfer:
    """flashinfer's recurrent_kda, a decode step in bfloat16: token by token here, states stored [V, K] and in place."""

    form = "recurrent"
    dtypes = ("bfloat16",)
    devices = ("cuda",)
    refuses = {"varlen": "one token a call", "backward": "inference only", "T = 0": "one token a call"}
    contract = "bfloat16"

    def __init__(self):
        self._step = importlib.import_module("flashinfer.kda_decode").recurrent_kda

    def __call__(
        self,
        q,
        k,
        v,
        g,
        beta,
        *,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
    ):
        B, T, HV, K, V = *v.shape[:3], q.shape[3], v.shape[3]
        state = v.new_zeros((B, HV, V, K)) if initial_state is None else initial_state.mT.to(v.dtype).contiguous()
        rows = []
        for t in range(T):
            token = [x[:, t : t + 1].contiguous() for x in (q, k, v, g, beta)]
            how = {"scale": scale, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "output_final_state": True}
            o, state = self._step(*token, initial_state=state, **how)
            rows.append(o.clone())
        return torch.cat(rows, dim=1), state.mT.float() if output_final_state else None


class Transformers:
    """A torch function of transformers, and not what its decorator puts in its place where FLA is installed."""

    place = ""

    def __init__(self):
        module, _, name = self.place.partition(":")
        self._function = inspect.unwrap(getattr(importlib.import_module(module), name))
        self.keywords = tuple(inspect.signature(self._function).parameters)

    def __call__(self, q, k, v, g, beta, *, initial_state=None, output_final_state=False, **keywords):
        return self._function(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state, **keywords
        )


def _transformers(family: str) -> dict[str, Peer]:
    """Return the torch functions of one of transformers' three families with KDA."""
    found = {}
    for form in ("chunk", "recurrent"):
        place = f"transformers.models.{family}.modeling_{family}:{form}_kimi_delta_attention"
        adapter = type(f"Transformers_{family}_{form}", (Transformers,), {"place": place, "form": form})
        told, missing = f"transformers' {family}, {form}, in torch", {"initial_state": None}
        found[f"transformers_{family}_{form}"] = Peer("transformers", place, told, adapter, missing, unwrapped=True)
    return found


_FLA = "fla.ops.kda:chunk_kda"
PEERS: dict[str, Peer] = {
    "fla": Peer("fla-core", _FLA, "FLA's chunk_kda: any gate, in Triton", FlaChunk, devices=ON_TRITON),
    "fla_safe_gate": Peer(
        "fla-core", _FLA, "FLA's chunk_kda with safe_gate", FlaSafeGate, {"safe_gate": True}, devices=ON_TRITON
    ),
    "fla_recurrent": Peer(
        "fla-core", "fla.ops.kda:fused_recurrent_kda", "FLA's fused_recurrent_kda", FlaRecurrent, devices=ON_TRITON
    ),
    "flash_kda": Peer(
        *("flash_kda", "flash_kda:fwd", "FlashKDA's forward, in CUTLASS", FlashKda),
        same_signature=False,
        devices=("cuda",),
        head_dims=(flash_kda.HEAD_DIM,),
    ),
    **_transformers("kimi_linear"),
    **_transformers("glm5_next"),
    **_transformers("bailing_hybrid"),
    "flashinfer_recurrent": Peer(
        *("flashinfer-python", "flashinfer.kda_decode:recurrent_kda", "flashinfer's decode step", FlashInfer),
        same_signature=False,
        devices=("cuda",),
        head_dims=(128,),
    ),
    "attention_gym": Peer(
        *("attn-gym", "attn_gym.linear:chunk_kda", "attention-gym's chunk_kda", AttentionGym), same_signature=False
    ),
    "attention_gym_recurrent": Peer(
        *("attn-gym", "attn_gym.linear:recurrent_kda", "attention-gym's recurrent_kda", AttentionGymRecurrent),
        same_signature=False,
    ),
}
"""By the name on the command line."""
