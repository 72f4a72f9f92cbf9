"""What is to be run: profiles with their sizes, and the plan of one target that a worker process gets."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Demands:
    """What is asked of one recipe beyond its own calls."""

    repeats: int = 3
    """Calls with equal inputs, the first one among them, that must give equal bits."""
    programs: int = 16
    """Programs that a crowded call must launch of every kernel; where none is seen, pairs of a sequence and a head."""
    tokens: int = 3
    """Tokens of the longest sequence of a crowded call."""


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
            "before every merge: minutes",
            200,
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
            Demands(repeats=10, programs=1024, tokens=33),
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
    recipe: dict | None = None
    """Judge this one recipe only, without drawing: a replay."""
    budgeted: bool = True
    """In the interpreter: ask by the profile's budget. False where a number of recipes was asked for: then on all."""
    kills: int = 0
    """Stop after so many failing recipes, without shrinking: the self-test asks whether a mutant dies, not how."""

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Plan":
        """Read a plan back."""
        return Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
