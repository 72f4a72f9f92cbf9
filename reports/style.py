"""Colours and type of every figure: drawn in the light colours, shown in those of the reader's theme.

A figure is drawn once. In its SVG each colour of the light theme becomes a CSS variable, so that the page, which
defines the variables for light and dark, decides; a PNG is of one theme.
"""

import io
import math
import pickle
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import matplotlib
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure as Drawing
from matplotlib.image import imread
from PIL import Image

INK, MUTED, GRID, SURFACE = "ink", "muted", "grid", "surface"
LIGHT = {
    INK: "#1c2430",
    MUTED: "#5b6676",
    GRID: "#d9dee7",
    SURFACE: "#fffffe",
    "series-1": "#2f6fb2",
    "series-2": "#c9640a",
    "series-3": "#2a8459",
    "series-4": "#8355bf",
    "series-5": "#c23a66",
    "series-6": "#157f91",
    "series-7": "#87662f",
    "level-0": "#eef3fb",
    "level-1": "#d8e5f6",
    "level-2": "#b9d2ee",
    "level-3": "#94bbe4",
    "bad": "#f1a79f",
    "warn": "#f3d38a",
}
"""Every colour is another one: that is how it is told in an SVG."""
DARK = {
    INK: "#e6eaf1",
    MUTED: "#a3adbd",
    GRID: "#343d4b",
    SURFACE: "#171c24",
    "series-1": "#74aeea",
    "series-2": "#f0a04d",
    "series-3": "#5fc793",
    "series-4": "#b99bee",
    "series-5": "#f0829f",
    "series-6": "#57c6d6",
    "series-7": "#ccab78",
    "level-0": "#1f2937",
    "level-1": "#233852",
    "level-2": "#28496f",
    "level-3": "#305d90",
    "bad": "#93332b",
    "warn": "#6d5413",
}
SERIES = tuple(LIGHT[name] for name in LIGHT if name.startswith("series-"))
LEVELS = tuple(LIGHT[name] for name in LIGHT if name.startswith("level-"))
WIDTH = 4.1
"""Inches: as wide as a phone's screen, where 9 points stay 9 points."""
DPI = 200
DECADES, LABELLED = 30, (2, 3, 6)
"""Up to what ratio of its ends an axis has labels between powers of ten, and which."""
LONG, LONGEST = 20, 32
"""Characters of a name of which two do not fit beside each other, and of one that is shown whole."""
ROOM = 44
"""Characters of a name that stands in a legend by itself."""
LINE = 0.17
"""Inches of a line of a legend."""

_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "text.color": LIGHT[INK],
    "axes.labelcolor": LIGHT[INK],
    "axes.titlecolor": LIGHT[INK],
    "axes.titlesize": 9,
    "axes.edgecolor": LIGHT[MUTED],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "grid.color": LIGHT[GRID],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT[MUTED],
    "ytick.color": LIGHT[MUTED],
    "xtick.labelcolor": LIGHT[INK],
    "ytick.labelcolor": LIGHT[INK],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the page's type and colours, without a display."""
    with matplotlib.rc_context(_RC):
        yield


def new(height: float, width: float = WIDTH, **subplots):
    """Return a drawing and its axes, so many inches wide and high."""
    page = Drawing(figsize=(width, height), layout="constrained")
    return page, page.subplots(**subplots)


def logarithmic(axes, x: bool = True, y: bool = False) -> None:
    """Make axes logarithmic, with numbers that are written out, those between powers of ten where there are few."""
    for name, axis, wanted in (("x", axes.xaxis, x), ("y", axes.yaxis, y)):
        if wanted:
            axes.set(**{f"{name}scale": "log"})
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(partial(_between, axis))


def _between(axis, value: float, _: int) -> str:
    """Return the label of a minor tick."""
    low, high = sorted(axis.get_view_interval())
    digit = round(value / 10.0 ** math.floor(math.log10(value)))
    return f"{value:,g}" if high < DECADES * low and digit in LABELLED else ""


def legend(page: Drawing, axes, columns: int = 2) -> None:
    """Name what was drawn below it, in room of its own; long names stand below each other."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if any(len(label) > LONG for label in labels) else columns
    width, height = page.get_size_inches()
    page.set_size_inches(width, height + LINE * -(-len(labels) // columns))
    names = [brief(label, ROOM) for label in labels]
    page.legend(handles, names, loc="outside lower center", ncols=columns)


def name_rows(axes, names: Sequence[str]) -> None:
    """Name rows from above."""
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), map(brief, names))


def brief(name: str, room: int = LONGEST) -> str:
    """Return what there is room for of a name: of package.module:function the end tells most."""
    return name if len(name) <= room else "…" + name[1 - room :]


def svg(page: Drawing, name: str) -> str:
    """Return a drawing as an SVG element whose colours are the page's; equal drawings give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        page.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    names = {colour: name for name, colour in LIGHT.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda x: f"var(--{names[x[0]]})" if x[0] in names else x[0], text)


def png(page: Drawing, title: str, origin: str, theme: dict[str, str] = LIGHT) -> bytes:
    """Return a drawing as a PNG in the colours of a theme, which says by itself what it shows and where from."""
    with matplotlib.rc_context(_RC):
        picture = imread(io.BytesIO(_printed(recoloured(page, theme), theme)))
        width, height = picture.shape[1] / DPI, picture.shape[0] / DPI
        above, below = (textwrap.fill(text, int(letters * width)) for text, letters in ((title, 11), (origin, 17)))
        top, bottom = (0.12 + size * (text.count("\n") + 1) for text, size in ((above, 0.19), (below, 0.12)))
        slide = Drawing(figsize=(width, top + height + bottom))
        slide.figimage(picture, 0, round(bottom * DPI))
        place = {"ha": "center", "va": "center"}
        whole = top + height + bottom
        slide.text(0.5, 1 - top / 2 / whole, above, fontsize=10, fontweight="bold", color=theme[INK], **place)
        slide.text(0.5, bottom / 2 / whole, below, fontsize=6, color=theme[MUTED], **place)
        return _small(_printed(slide, theme))


def recoloured(page: Drawing, theme: dict[str, str]) -> Drawing:
    """Return a copy of a drawing in the colours of another theme; what is in none of the light ones stays."""
    if theme is LIGHT:
        return page
    copy, named = pickle.loads(pickle.dumps(page)), {colour: theme[name] for name, colour in LIGHT.items()}
    for artist in copy.findobj():
        for of in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get, put = (getattr(artist, f"{verb}_{of}", None) for verb in ("get", "set"))
            if get and put and len(rows := to_rgba_array(get())):
                now = [to_hex(row) for row in rows]
                if any(colour in named for colour in now):
                    new = [(*to_rgba_array(named.get(x, x))[0, :3], row[3]) for x, row in zip(now, rows, strict=True)]
                    put(new if len(new) > 1 else new[0])
    return copy


def _printed(page: Drawing, theme: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    page.savefig(buffer, format="png", dpi=DPI, facecolor=theme[SURFACE], metadata={"Software": None})
    return buffer.getvalue()


def _small(picture: bytes) -> bytes:
    """Return a PNG with a palette: few colours and their shades, a third of the bytes."""
    small = io.BytesIO()
    whole = Image.open(io.BytesIO(picture)).convert("RGB")
    whole.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def variables(theme: dict[str, str]) -> str:
    """Return the CSS that defines a theme's colours."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())
