"""One row for every benchmark of a run, the stored baseline of the same machine, and what counts as a regression.

What is compared: with a peer in both runs the ratio to it, taken within common rounds, for neighbours and clocks slow
both; else the median. A REGRESSION is worse by more than 15%, with quartiles apart: the better one now is worse than
the worse one then. Worse by as much with quartiles that overlap is "within noise"; fewer than three samples are not
compared.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from autotune.timing import Samples, Spread, ratio
from impls.devices import slug

KIND, SCHEMA = "benchmarks", 1
LIMIT = 0.15
"""Share by which a figure may be worse than the baseline's."""
FEW = 3
"""Samples below which nothing is compared."""
NEW, FEWER, SAME, NOISE, REGRESSION = "new", "too few samples", "", "within noise", "REGRESSION"


@dataclass(frozen=True)
class Peer:
    """What was timed beside a benchmark; `ratio` is how many times quicker ours is, within common rounds."""

    name: str
    theirs: Spread
    ratio: Spread


@dataclass(frozen=True)
class Row:
    """One benchmark: what it measures in which unit, beside whom; of rates more is better, of the others less."""

    name: str
    unit: str
    ours: Spread
    peers: tuple[Peer, ...] = ()
    """The first one decides."""
    rate: bool = False

    def to_json(self) -> dict:
        """Return a dictionary of JSON values."""
        return asdict(self) | {"peers": [asdict(peer) for peer in self.peers]}

    @staticmethod
    def from_json(data: dict) -> "Row":
        """Read a row back."""
        peers = tuple(Peer(x["name"], Spread(**x["theirs"]), Spread(**x["ratio"])) for x in data["peers"])
        return Row(data["name"], data["unit"], Spread(**data["ours"]), peers, data["rate"])


def row(name: str, unit: str, ours: Samples, peers: dict[str, Samples] | None = None, rate: bool = False) -> Row:
    """Make a row of samples by round; ratios to peers are taken within rounds."""
    beside = {x: y for x, y in (peers or {}).items() if ours.keys() & y.keys()}
    over = {x: ratio(ours, y) if rate else ratio(y, ours) for x, y in beside.items()}
    made = (Peer(x, Spread.of(list(y.values())), over[x]) for x, y in beside.items())
    return Row(name, unit, Spread.of(list(ours.values())), tuple(made), rate)


@dataclass(frozen=True)
class Change:
    """A benchmark beside its baseline."""

    row: Row
    before: Row | None
    slower: float = 0.0
    """Share by which it is worse than the baseline; negative where it is better."""
    verdict: str = NEW
    by: str = "median"
    """What was compared: the median, or the ratio to a peer."""


def change(now: Row, before: Row | None) -> Change:
    """Compare a row with its baseline, None where there is none."""
    if before is None:
        return Change(now, None)
    figures, more, by = _figures(now, before)
    if min(x.count for x in figures) < FEW:
        return Change(now, before, 0.0, FEWER, by)
    new, old = figures
    slower = (old.median / new.median if more else new.median / old.median) - 1
    apart = new.high < old.low if more else new.low > old.high
    verdict = SAME if slower <= LIMIT else REGRESSION if apart else NOISE
    return Change(now, before, slower, verdict, by)


def _figures(now: Row, before: Row) -> tuple[tuple[Spread, Spread], bool, str]:
    """Return the two figures that are compared, whether more is better, and what they are."""
    if now.peers and before.peers and now.peers[0].name == before.peers[0].name:
        return (now.peers[0].ratio, before.peers[0].ratio), True, f"ratio to {now.peers[0].name}"
    return (now.ours, before.ours), now.rate, "median"


@dataclass
class Baseline:
    """The figures that a machine is held to: a file per device, kind of vectors and number of threads.

    Virtual machines call processors with and without AVX-512 the same.
    """

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)
    about: dict = field(default_factory=dict)

    @staticmethod
    def of(folder: Path, device: dict) -> "Baseline":
        """Read the baseline of a device from a folder; an empty one where there is none."""
        name = slug(f"{device['name']} {device.get('capability', '')}")
        path = folder / f"baseline-{name}-{device['units']}-cores-{device['threads']}-threads.json"
        data = json.loads(path.read_text()) if path.exists() else {"rows": []}
        return Baseline(path, {x["name"]: Row.from_json(x) for x in data["rows"]}, data)

    def changes(self, rows: Iterable[Row]) -> list[Change]:
        """Compare rows with it."""
        return [change(now, self.rows.get(now.name)) for now in rows]

    def take(self, rows: Sequence[Row], about: dict, anew: bool) -> list[str]:
        """Keep rows that it does not know, or all of them; write it where that is any, and return their names."""
        taken = [x for x in rows if anew or x.name not in self.rows]
        if taken:
            self.rows |= {x.name: x for x in taken}
            write(self.path, list(self.rows.values()), about)
        return [x.name for x in taken]


def write(path: Path, rows: Sequence[Row], about: dict) -> Path:
    """Write rows with where they come from, and return the file."""
    data = {"schema": SCHEMA, "kind": KIND} | about | {"rows": [x.to_json() for x in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def joined(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Return rows with those beside them that the file of the same day and sources holds."""
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    both = {x["name"]: Row.from_json(x) for x in before} | {x.name: x for x in rows}
    return list(both.values())
