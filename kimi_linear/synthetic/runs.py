"""A run in words and numbers: task, toy and training, so that equal runs are told from others, and go on."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace

from kimi_linear.synthetic.mixers import MixerConfig
from kimi_linear.synthetic.model import ToyConfig
from kimi_linear.synthetic.tasks import TASKS, Task

RATES = (5e-5, 1e-4, 5e-4, 1e-3)
"""The paper's grid of learning rates."""
DTYPES = ("float32", "bfloat16")


class RunError(ValueError):
    """A run that cannot be."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of a run, device and threads apart."""

    task: str
    mixer: str
    length: int
    alphabet: int
    head_dim: int
    hidden: int
    batch: int
    steps: int
    rate: float
    warmup: int
    stop: float = 0.999
    """Accuracy at which a run is over: the mean of a window."""
    seed: int = 0
    heads: int = 2
    layers: int = 2
    mlp: int = 2
    conv: int = 4
    output_gate: str = "sigmoid"
    dtype: str = "float32"
    """What matrices are multiplied in; parameters and optimizer are float32."""
    clip: float = 1.0
    """Norm that the gradient is shortened to."""
    weight_decay: float = 0.01
    window: int = 50
    """Steps of a line of the curve."""

    def __post_init__(self):
        if self.task not in TASKS:
            raise RunError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("batch", "steps", "window", "layers"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RunError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.warmup, self.weight_decay, self.seed, self.mlp) < 0:
            raise RunError("warmup, weight decay, seed and mlp must be at least 0")
        if self.dtype not in DTYPES:
            raise RunError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _ = self.toy  # the task's and the mixer's own checks

    @property
    def drawn(self) -> Task:
        """Return the task."""
        return TASKS[self.task](self.length, self.alphabet)

    @property
    def toy(self) -> ToyConfig:
        """Return the model's sizes."""
        mixer = MixerConfig(self.mixer, self.heads, self.head_dim, self.hidden, self.conv, self.output_gate)
        return ToyConfig(mixer, self.drawn.vocabulary, self.layers, self.mlp)

    @property
    def label(self) -> str:
        """Name the mixer with its ablations."""
        parts = [self.mixer, "" if self.conv else "no convolution"]
        parts.append({"sigmoid": "", "none": "no output gate", "silu": "SiLU gate"}[self.output_gate])
        return ", ".join(filter(None, parts))

    @property
    def folder(self) -> str:
        """Name a folder that no other run has: what it is, and a hash of all of it but the rate, and the rate."""
        rest = json.dumps(replace(self, rate=1.0).to_json(), sort_keys=True)
        digest = hashlib.sha256(rest.encode()).hexdigest()[:8]
        return f"{self.task}-{self.length}-{self.mixer}-seed{self.seed}-{digest}/rate-{self.rate:g}"

    def to_json(self) -> dict:
        """Return JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Run":
        """Read a run back; RunError where a field is unknown or missing."""
        if unknown := sorted(set(data) - {each.name for each in fields(Run)}):
            raise RunError(f"a run has no {', '.join(unknown)}")
        try:
            return Run(**data)
        except TypeError as error:
            raise RunError(f"no run: {error}") from error


# Half a second a step on one core of an Intel Xeon, and so many steps that KDA has 96% with three seeds: what is
# compared is who learns sooner. Mamba2's heads begin with memories of 3 to 67 tokens (`mixers._spread`): of palindromes
# of 128 tokens it has 86% to 94%. In pilots whose letters came again it had 97% of 64 tokens, as KDA with decays drawn
# independently, and of 256, as in the paper, KDA itself had 88% after 1,000 steps of 16 sequences. MQAR of 128 tokens
# took KDA more than 725 steps with one of three seeds.
SMALL = Run(
    "mqar", "kda", length=64, alphabet=128, head_dim=64, hidden=64, batch=64, steps=475, rate=1e-3, warmup=100,
    stop=0.99, window=25,
)  # fmt: skip
PAPER = replace(
    SMALL, length=1024, alphabet=2048, head_dim=128, hidden=256, steps=20_000, warmup=500, dtype="bfloat16",
    window=100, stop=0.999,
)  # fmt: skip
SETTINGS = {
    "small": dict.fromkeys(TASKS, SMALL) | {"palindrome": replace(SMALL, length=128, batch=32, steps=725)},
    "paper": dict.fromkeys(TASKS, PAPER),
}
"""By name and task; mixer, rate and seed are chosen beside them, and as many letters as the task has of a length."""
