"""What Triton's interpreter can afford, by a count of work and never by a clock: equal plans judge equal cases.

Each property is asked on a number of recipes of every dtype. Recipes are drawn until all have had theirs: the common
properties finish on the first few, later recipes make only the calls of those that need a rare case.
"""

from dataclasses import dataclass, replace

from verify.cases import Case
from verify.plan import PROFILES, Demands

CHUNK = 16
"""Tokens of a chunk where the call names no chunk length."""
BACKWARD = 3
"""Work of a call with gradients, in forward calls: measured on chunk_triton in the interpreter, 144 ms against 44."""
TILE = 64
"""Value channels that one program of an interpreted kernel computes."""


@dataclass(frozen=True)
class Budget:
    """How much of a profile is tried in the interpreter."""

    asked: int
    """Recipes on which a property is asked, for every dtype: a quarter of them, at least one, with gates of minus
    infinity."""
    tokens: int
    """Longest sequence; up to four of half as many are packed."""
    units: int
    """Work of all calls for one dtype, after which no recipe is begun: see `cost`."""
    shrinking: int
    """Work of the calls that make one failure small."""

    def quota(self, infinite: bool) -> int:
        """Return the recipes with gates of minus infinity, or without, on which a property is asked."""
        of_infinite = max(1, self.asked // 4)
        return of_infinite if infinite else self.asked - of_infinite

    def words(self) -> str:
        """Say in one line what was applied."""
        return (
            f"the interpreter's budget: each property on at most {self.asked} recipes a dtype, T <= {self.tokens} "
            f"a sequence, H <= {max(HEADS)}, {self.units:,} units of work a dtype"
        )


HEADS = (1, 1, 1, 2)
"""What sizes B, H and HV / H are drawn from in the interpreter."""

INTERPRETED = {
    ("smoke", "chunk"): Budget(asked=2, tokens=17, units=200, shrinking=40),
    ("smoke", "recurrent"): Budget(asked=2, tokens=8, units=1_000, shrinking=200),
    ("quick", "chunk"): Budget(asked=3, tokens=33, units=500, shrinking=100),
    ("quick", "recurrent"): Budget(asked=3, tokens=12, units=4_000, shrinking=500),
    ("tune", "chunk"): Budget(asked=4, tokens=33, units=8_000, shrinking=100),
    ("tune", "recurrent"): Budget(asked=4, tokens=12, units=40_000, shrinking=100),
    ("ci", "chunk"): Budget(asked=12, tokens=65, units=4_000, shrinking=300),
    ("ci", "recurrent"): Budget(asked=12, tokens=17, units=20_000, shrinking=1_500),
    ("deep", "chunk"): Budget(asked=400, tokens=130, units=200_000, shrinking=1_000),
    ("deep", "recurrent"): Budget(asked=400, tokens=33, units=1_000_000, shrinking=5_000),
}
"""By profile and form."""

PROGRAMS = {"smoke": 4, "quick": 8, "tune": 64, "ci": 64, "deep": 256}
"""By profile, in place of what it demands elsewhere. Programs run one after the other there: none races another, and 64
of our chunk kernels take 1.1 s a call at K = V = 16 and 3.0 s at 128: 1,024 would take up to 48 s."""
LIVES = {"smoke": 2, "quick": 2, "tune": 4, "ci": 4, "deep": 4}
"""By profile, in place of what it demands elsewhere: four took a seventh of the time of `quick`."""


def demands_of(profile: str, interpreted: bool) -> Demands:
    """Return what a profile asks of one recipe, in the interpreter or on a device."""
    demands = PROFILES[profile].demands
    less = {"programs": PROGRAMS[profile], "tokens": Demands.tokens, "lives": LIVES[profile], "sequences": 0}
    return replace(demands, **less) if interpreted else demands


def demands_of_replay(interpreted: bool) -> Demands:
    """Return the most that is asked of one recipe, as its file names no profile; larger crowds only cost time."""
    return replace(demands_of("tune", interpreted), sequences=demands_of("deep", interpreted).sequences)


def cost(form: str, case: Case) -> int:
    """Count the work of one call: chunks, or tokens in the recurrent form, times value heads times value tiles."""
    lengths = [tokens.stop - tokens.start for _, tokens in case.sequences()]
    step = (case.chunk_size or CHUNK) if form == "chunk" else 1
    return sum(-(-n // step) for n in lengths) * case.HV * -(-case.V // TILE)
