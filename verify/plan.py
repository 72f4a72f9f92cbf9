"""What is to be run: profiles with their sizes, and the plan of one target that a worker process gets."""

from dataclasses import asdict, dataclass

COUNTED = ("cases", "rows", "runs", "discarded", "backward")
"""What is counted of a target, case by case."""
LEAST = ("repeats", "pairs", "programs")
"""Counts that are the least of all cases, not their sum: what the demands came to."""
MANY = 65_537
"""Sequences beyond 65,535, which is all that the second and the third side of a CUDA grid hold."""
RESTARTS = 3
"""Processes that go on behind cases that ended one, unless another number is asked for: each takes seconds to start."""


@dataclass(frozen=True)
class Demands:
    """What is asked of one recipe beyond its own calls."""

    repeats: int = 3
    """Calls with equal inputs, the first one among them, that must give equal bits."""
    programs: int = 16
    """Programs that a crowded call must launch of every kernel; where none is seen, pairs of a sequence and a head."""
    tokens: int = 3
    """Tokens of the longest sequence of a crowded call."""
    lives: int = 4
    """Lives of an engine on one recipe, the simplest first."""
    sequences: int = 0
    """Sequences of a call of more than a side of a grid may be; 0: no such call."""


@dataclass(frozen=True)
class Profile:
    """How much is tried: recipes per dtype, longest sequence, work of one case (B*HV*T*K*V), attempts at shrinking."""

    name: str
    summary: str
    examples: int
    tokens: int
    work: int
    shrinks: int
    dtypes: tuple[str, ...]
    demands: Demands = Demands()
    wide: tuple[int, ...] = ()
    """Head dimensions K and V that are drawn beside the usual ones."""
    aimed: int = 0
    """Recipes of a dtype more, which Hypothesis steers towards the worst ratio that it has met."""


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", "does it run at all: seconds", 6, 17, 50_000, 60, ("float32",)),
        Profile(
            "quick",
            "before every commit: under a minute on two cores",
            32,
            33,
            200_000,
            150,
            ("float32", "bfloat16"),
            Demands(programs=1024),
        ),
        Profile(
            "tune",
            "one configuration before it may be chosen, with --head-dims: a minute",
            12,
            65,
            4_000_000,
            60,
            ("float32", "bfloat16"),
            Demands(repeats=10, programs=1024, tokens=17),
        ),
        Profile(
            "ci",
            "before every merge: a quarter of an hour on two cores for ours",
            100,
            65,
            400_000,
            300,
            ("float32", "bfloat16", "float16", "float64"),
            Demands(programs=1024, tokens=17),
        ),
        Profile(
            "deep",
            "before every release: hours",
            5000,
            130,
            2_000_000,
            1000,
            ("float32", "bfloat16", "float16", "float64"),
            Demands(repeats=10, programs=1024, tokens=33, sequences=MANY),
            wide=(60, 100, 128, 256),
            aimed=2000,
        ),
    )
}


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs to judge one target; JSON values only."""

    target: str
    device: str
    profile: str
    dtypes: tuple[str, ...]
    seed: int
    examples: int
    properties: tuple[str, ...] = ()
    config: str | None = None
    contract: str | None = None
    head_dims: tuple[int, ...] = ()
    """Draw K and V out of these; none: small ones of every kind."""
    inputs: str | None = None
    """FILE#digest: draw recipes of these captured inputs instead of all families."""
    recipe: dict | None = None
    """Judge this one recipe only, without drawing: a replay."""
    budgeted: bool = True
    """In the interpreter: ask by the profile's budget. False where a number of recipes was asked for: then on all."""
    adapter: str | None = None
    """The file of the adapter class that the target's name names behind its colon."""
    shard: tuple[int, int] = (0, 1)
    """Judge the recipes whose number leaves this remainder, divided by that."""
    first: tuple[dict, ...] = ()
    """Recipes to be judged before those that are drawn: what failed before."""
    earlier: tuple[dict, ...] = ()
    """What a killed run has finished, as `resuming.finished` says it: not judged again, but counted."""
    reported: tuple[str, ...] = ()
    """Properties whose failure has been reported by a process that died: not reported again."""
    restarts: int = 0
    """Processes that may go on with it, one after the other, behind a case that ended one."""
    kills: int = 0
    """Stop after so many failing recipes, without shrinking: the self-test asks whether a mutant dies, not how."""

    def numbers(self, dtype: str) -> list[int]:
        """Return the numbers of the recipes that are left to be judged; those of `first` are -1, -2, ..."""
        part, parts = self.shard
        done = {case["number"] for case in self.earlier if case["dtype"] == dtype}
        first = [-1 - i for i, recipe in enumerate(self.first) if recipe["dtype"] == dtype]
        return [n for n in (*first, *range(self.examples)) if n % parts == part and n not in done]

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Plan":
        """Read a plan back."""
        return Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
