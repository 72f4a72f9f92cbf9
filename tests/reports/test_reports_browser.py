"""The page in a real browser: no complaint, no request, readable on a phone, in the theme that is asked for."""

import example_results as examples
import pytest
from chromium import Browser, executable

from reports.__main__ import main

pytestmark = pytest.mark.skipif(executable() is None, reason="no chromium here (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    assert main(["build", *map(str, examples.everything(folder)), "--out", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


WINDOWS = [(1280, False), (1280, True), (375, False), (375, True)]


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_opens_without_complaint_or_request_and_fits(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert [x["request"]["url"] for x in browser.named("Network.requestWillBeSent")] == [page.as_uri()]
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for name in complaints for event in browser.named(name)] == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    pale = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(x => x > 127)")
    assert pale is not dark


def test_every_figure_is_a_picture_with_alternative_text_for_those_who_cannot_see_it(browser, page):
    browser.open(page, 1280)
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [x for x in tree if x.get("role", {}).get("value") == "image"]
    assert len(images) == browser.value("document.querySelectorAll('figure').length") >= 18
    assert all(len(x["name"]["value"]) > 40 for x in images)


def test_a_table_is_behind_every_figure(browser, page):
    browser.open(page, 375)
    browser.value("document.querySelectorAll('details').forEach(x => x.open = true)")
    heights = browser.value("[...document.querySelectorAll('figure table')].map(x => x.offsetHeight)")
    assert len(heights) >= 18 and min(heights) > 0
    assert browser.value("document.documentElement.scrollWidth") <= 375


def test_letters_of_figures_are_readable_on_a_phone(browser, page):
    """At least 7 pixels as shown: pictures are not scaled down to stamps."""
    browser.open(page, 375)
    shown = "parseFloat(getComputedStyle(x).fontSize) * Math.hypot(x.getScreenCTM().a, x.getScreenCTM().b)"
    least = browser.value(f"Math.min(...[...document.querySelectorAll('svg text')].map(x => {shown}))")
    assert least >= 7


def test_a_browser_that_asks_for_something_is_noticed(browser, tmp_path):
    page = tmp_path / "asking.html"
    page.write_text('<img src="missing.png"><script>console.error("x")</script>')
    browser.open(page, 800)
    assert len(browser.named("Network.requestWillBeSent")) == 2 and browser.named("Runtime.consoleAPICalled")
