"""What a report is made of: figures, each with its table, and sections of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports.load import Origin

if TYPE_CHECKING:  # words and tables do without it
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of cells in words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(columns: Sequence[str], rows) -> "Table":
        """Make a table; every row has a cell for each column."""
        made = tuple(tuple("" if x is None else str(x) for x in row) for row in rows)
        assert all(len(row) == len(columns) for row in made)
        return Table(tuple(columns), made)


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows in words, the same in figures, and where they come from."""

    name: str
    """As it stands in the name of a picture's file."""
    title: str
    alt: str
    table: Table
    origin: Origin
    drawing: "Drawing | None" = None
    """None where there is a table only."""
    wide: bool = False
    """Wider than a phone: it scrolls in its frame there."""


@dataclass(frozen=True)
class Section:
    """What one question is answered by; without figures it says what is missing."""

    name: str
    title: str
    lead: str
    command: str
    """The command that writes what it is made of."""
    figures: tuple[Figure, ...]


def number(x: float | str) -> float:
    """Return a number of a result, where infinities and NaN are strings."""
    return float(x)


def short(x: float) -> str:
    """Return a number in three digits, thousands apart."""
    if x != x or x in (float("inf"), float("-inf")):
        return str(x)
    return f"{x:.1e}" if abs(x) >= 1e7 else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def times(x: dict) -> str:
    """Return a spread: median and quartiles."""
    return f"{short(x['median'])} ({short(x['low'])} to {short(x['high'])})"


def plural(count: int, word: str) -> str:
    """Return a count with its word."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
