"""The page shows what the files say: all of it, escaped, with its origin, and what is missing as missing."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import example_results as examples
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from reports import counting, load, pages, style, timing, verification
from reports.__main__ import main
from reports.sections import SECTIONS, sections


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One page of everything, with Markdown and pictures."""
    folder = tmp_path_factory.mktemp("report")
    files = map(str, examples.everything(folder))
    assert main(["build", *files, "--out", str(folder / "out"), "--markdown", "--png", str(folder / "png")]) == 0
    return folder


class Tags(HTMLParser):
    """Collects the tags of a page, each with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_is_of_one_piece_and_runs_nothing(built):
    page = (built / "out" / "report.html").read_text()
    found = Tags(page).found
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in found}
    asked = [x for _, attributes in found for name, x in attributes.items() if name in ("src", "href", "xlink:href")]
    assert {x for x in asked if not x.startswith("#")} == {"data:,"}
    assert not re.search(r"url\((?!#)|@import|@font-face", page)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_every_figure_has_its_alternative_text_its_origin_and_its_table(built):
    page = (built / "out" / "report.html").read_text()
    figures = re.findall(r"<figure id.*?</figure>", page, flags=re.S)
    assert len(figures) >= 18
    for figure in figures:
        [alt] = re.findall(r'<svg role="img" aria-label="([^"]+)"', figure)
        [origin] = re.findall(r"<figcaption>(.*?)</figcaption>", figure)
        assert len(alt) > 40 and re.search(r" · .+ · 20\d\d-\d\d-\d\d .+ · .+\.jsonl?", origin), (alt, origin)
        assert len(re.findall(r"<tr>", figure)) >= 2 and "<summary>Table</summary>" in figure


def test_every_colour_of_a_picture_is_the_themes(built):
    page = (built / "out" / "report.html").read_text()
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert not set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{3,6})", pictures))
    assert style.LIGHT.keys() == style.DARK.keys()
    assert len(set(style.LIGHT.values())) == len(style.LIGHT)


def test_pictures_and_markdown_show_the_same_figures(built):
    page, text = (built / "out" / "report.html").read_text(), (built / "out" / "report.md").read_text()
    names = set(re.findall(r'<figure id="([^"]+)"', page))
    assert {path.stem for path in (built / "png").glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (built / "png").glob("*.png"))
    left_out = text.count("(The table is in report.html.)")
    assert text.count("<details>") == len(names) - left_out > left_out and "<script>" not in text


def test_a_slide_says_what_it_shows_and_where_that_comes_from(tmp_path):
    [figure] = counting.yardsticks(load.read([examples.document(tmp_path / "y.json", examples.yardstick())]))
    slides = {style.png(figure.drawing, title, origin) for title in ("a", "b") for origin in ("c", "d")}
    assert len(slides) == 4 and style.png(figure.drawing, "a", "c") in slides


def test_markdown_fits_a_comment_and_leaves_out_the_longest_tables_first(tmp_path):
    many = [examples.case("good", **{f"property_{i}": examples.outcome(0.5) for i in range(3000)})]
    paths = [examples.lines(tmp_path / "verify.jsonl", examples.records()[0], *many)]
    paths.append(examples.document(tmp_path / "model.json", examples.model()))
    results = load.read(paths)
    text = pages.summary(results, sections(results), examples.DATE)
    assert len(text) <= pages.COMMENT < 65_536 and "property\\_2999" not in text
    assert text.count("(The table is in report.html.)") == 1 and "| hybrid | 1,024 |" in text


def test_equal_results_give_equal_pages(tmp_path):
    files = [x for x in examples.everything(tmp_path) if x.stem in ("verify", "bench", "trials-chunk-torch-4096")]
    drawn = [[style.svg(f.drawing, f.name) for s in sections(load.read(files)) for f in s.figures] for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", [name for name, *_ in SECTIONS])
def test_what_is_missing_is_shown_as_missing(tmp_path, name):
    keep = examples.document(tmp_path / "model.json", examples.model())
    if name == "model":
        keep = examples.lines(tmp_path / "verify.jsonl", *examples.records())
    assert main(["build", str(keep), "--out", str(tmp_path / "out"), "--markdown"]) == 0
    page, text = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    section = re.search(rf'<h2 id="{name}">.*?</section>', page, flags=re.S)[0]
    command = next(command for x, _, _, command, _ in SECTIONS if x == name)
    assert "Missing:" in section and command in section and "<figure" not in section
    assert f"**Missing**: `{command}`" in text


def test_a_failure_is_seen(tmp_path):
    [result] = load.read([examples.lines(tmp_path / "verify.jsonl", *examples.records())])
    matrix = verification.matrix(result)
    rows = {row[0]: row[1:] for row in matrix.table.rows}
    assert rows["reference"] == ("0.4 (2)", "4 (1)")
    assert rows["causality"] == ("exact (1)", "inf (1)")
    assert rows["verdict"] == ("pass", "FAIL")
    assert "absent: not run" in rows
    assert f"{examples.NASTY}: causality, {examples.NASTY}: reference" in matrix.alt
    assert verification.colour(4.0) == style.LIGHT["bad"] != verification.colour(1.0)


def test_a_surviving_mutant_is_seen(tmp_path):
    [figure] = verification.mutants(load.read([examples.lines(tmp_path / "s.jsonl", examples.self_test())]))
    assert "1 of 2 found" in figure.title and "Survivors: survivor" in figure.alt
    assert figure.table.rows[1] == ("survivor", "SURVIVED")


def test_peers_and_the_floor_are_drawn_and_who_is_missing_is_named(tmp_path):
    results = load.read([examples.document(tmp_path / "bench.json", examples.bench())])
    found = {figure.name: figure for figure in timing.figures(results)}
    assert set(found) == {f"{x}-{mode}-1" for x in ("latency", "tokens", "roofline") for mode in ("launched", "graph")}
    latency = found["latency-launched-1"]
    assert "Not compared: flash_kda (not installed)" in latency.alt and examples.NASTY in latency.alt
    assert ("t1024", "floor, by bytes", "0.5", "1", "", "") in latency.table.rows
    assert ("t1024", examples.NASTY, "2 (1.5 to 2.5)", "4", "2 (1.5 to 2.5)", "measured") in latency.table.rows
    assert ("t8192", "lost", "-", "-", "", "failed: out of memory") in latency.table.rows
    assert ("all", "flash_kda", "", "", "", "not compared: not installed") in latency.table.rows
    assert "from 1,024 to 8,192 tokens" in found["tokens-launched-1"].alt
    assert ("ceiling", "products in bfloat16", "", "100,000") in found["roofline-graph-1"].table.rows
    # 2^30 FLOPs in 2 ms
    assert "537 GFLOP/s" in found["roofline-launched-1"].alt


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_text_and_marks_can_be_told_from_what_is_behind_them(theme):
    """Text at 4.5, marks at 3: the contrast that WCAG 2 asks for."""
    behind = [theme[name] for name in theme if name.startswith("level-")] + [theme["bad"], theme["warn"]]
    assert min(contrast(theme["ink"], x) for x in (*behind, theme["surface"])) >= 4.5
    assert contrast(theme["muted"], theme["surface"]) >= 4.5
    assert min(contrast(x, theme["surface"]) for name, x in theme.items() if name.startswith("series-")) >= 3


def test_pictures_are_drawn_in_the_dark_themes_colours_too(tmp_path, capsys):
    good, png = examples.document(tmp_path / "good.json", examples.model()), tmp_path / "png"
    assert main(["build", str(good), "--out", str(tmp_path), "--png", str(png), "--dark"]) == 0
    light, dark = (imread(png / name) for name in ("model-1.png", "model-1-dark.png"))
    assert light.shape == dark.shape
    for picture, theme, other in ((light, style.LIGHT, style.DARK), (dark, style.DARK, style.LIGHT)):
        there = {to_hex(colour) for colour in np.unique(picture.reshape(-1, picture.shape[2]), axis=0)}
        assert {theme[name] for name in ("surface", "ink", "grid", "series-1", "series-2")} <= there
        assert not {other[name] for name in ("surface", "series-1", "series-2")} & there
    assert main(["build", str(good), "--out", str(tmp_path), "--dark"]) == 2
    assert "--dark goes with --png" in capsys.readouterr().err


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path, capsys):
    good = examples.document(tmp_path / "good.json", examples.model())
    bad = examples.document(tmp_path / "bad.json", examples.model() | {"schema": 7})
    asked = ["build", str(good), str(bad), "--out", str(tmp_path / "out"), "--markdown", "--png", str(tmp_path / "png")]
    assert main(asked) == 2
    assert re.search(r"bad\.json: schema version 7", capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "png").exists()


def test_a_folder_that_cannot_be_written_is_a_plain_error(tmp_path, capsys):
    good = examples.document(tmp_path / "good.json", examples.model())
    assert main(["build", str(good), "--out", str(good / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_without_matplotlib_the_command_says_what_to_install(tmp_path):
    good = examples.document(tmp_path / "good.json", examples.model())
    program = "import sys; sys.modules['matplotlib'] = None; from reports.__main__ import main; sys.exit(main())"
    asked = [sys.executable, "-c", program, "build", str(good), "--out", str(tmp_path / "out")]
    run = subprocess.run(asked, cwd=examples.ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, "pip install -e '.[reports]'" in run.stderr) == (2, True), run.stderr


def few(**changes) -> list[dict]:
    """Return the records of a run with one case, of which some fields are others."""
    return [examples.records()[0], examples.case("ours", p=examples.outcome(0.5)) | changes]


ODD = {
    "nothing was judged": examples.records()[:1],
    "no limit and no term": few(gates={}, coverage={}),
    "not a number": few(results={"p": examples.outcome("nan")}),
    "huge": few(results={"p": examples.outcome(1e300)}, gates={"row": {"observed": 1e308, "what": "o"}}),
    "a formula for a name": few(target=r"$\frac{$ & <b>"),
    "a long name": few(target="package.of.somebody.with.a.long.path:" + "f" * 300),
    "a dozen": [examples.records()[0], *(examples.case(f"target_{i}", p=examples.outcome(0.1)) for i in range(12))],
    "no mutants": [examples.self_test() | {"matrix": {}}],
    "no model": [examples.model() | {"rows": []}],
    "no lengths": [examples.yardstick() | {"counted": [], "timed": []}],
    "no cases": [examples.bench() | {"cases": [], "ceilings": None}],
    "no ceilings": [examples.bench() | {"ceilings": None}],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_results_that_are_odd_make_a_page_too(tmp_path, name):
    path = examples.lines(tmp_path / "odd.jsonl", *ODD[name])
    assert main(["build", str(path), "--out", str(tmp_path), "--markdown", "--png", str(tmp_path)]) == 0
    assert "<b>" not in (tmp_path / "report.html").read_text()


def test_what_is_far_beyond_its_limit_is_drawn_at_the_end_and_said_to_be(tmp_path):
    [result] = load.read([examples.lines(tmp_path / "a.jsonl", *few(results={"p": examples.outcome("inf")}))])
    figure = verification.by_family(result)
    axes = figure.drawing.axes[0]
    assert "beyond 100 at the end" in axes.get_xlabel() and axes.get_xlim()[1] >= 100
    assert {tuple(line.get_xdata()) for line in axes.lines[:1]} == {(100.0,) * len(figure.table.rows)}
