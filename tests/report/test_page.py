"""The report in a real browser: it renders, says nothing on the console, and can be used by all.

Opt-in by what is installed: Chromium (Debian's package) and the packages playwright and
axe-playwright-python; ``make test-browser`` brings the packages. Without them, nothing here runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from tests.conftest import CHROMIUM
from tests.report.conftest import search_family

pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of one search, and of it with its branch."""
    runs = tmp_path_factory.mktemp("runs")
    search_family(runs)
    where = ["--runs-dir", str(runs)]
    one, two = runs / "one.html", runs / "two.html"
    assert run_app(["report", "first", "--to", str(one), *where]) == 0
    assert run_app(["report", "first", "second", "--to", str(two), *where]) == 0
    return {"one": one, "two": two}


@pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
def opened(browser: Any, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page of both searches without a network, with what the console said."""
    context = browser.new_context(viewport=request.param, offline=True)
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda asked: page.said.append(asked.url) if "http" in asked.url else None)
    page.goto(pages["two"].as_uri())
    page.wait_for_selector("#run1-grid .plot-container")
    yield page
    context.close()


def test_every_chart_is_drawn_and_the_console_is_clean(opened: Any) -> None:
    charts = opened.locator(".chart")
    assert charts.count() == 1 + 2 * 6
    drawn = opened.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg').length)"
    )
    assert all(drawn), drawn
    assert opened.said == []


def test_it_fits_the_screen(opened: Any) -> None:
    wide = opened.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "the page scrolls sideways"
    sizes = opened.evaluate(
        "[...document.querySelectorAll('p, td, th, dd')].map(e => parseFloat(getComputedStyle(e)"
        ".fontSize))"
    )
    assert min(sizes) >= 13


def test_accessible_by_axe(opened: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for details in opened.locator("details").all():
        details.evaluate("element => element.open = true")
    found = Axe().run(opened).response["violations"]
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []


def test_choosing_a_candidate_shows_its_recipe(opened: Any) -> None:
    pick = opened.locator("#run0-pick")
    cells = "document.getElementById('run0-grid').data[0].z"
    first = opened.evaluate(cells)
    parent = next(
        option.get_attribute("value")
        for option in pick.locator("option").all()
        if "parent" in (option.text_content() or "")
    )
    pick.select_option(parent)
    assert opened.evaluate(cells) != first
    note = opened.locator("#run0-grid-note").text_content()
    assert "parent" in note
    marked = "document.getElementById('run0-progress').data[0].selectedpoints"
    assert len(opened.evaluate(marked)) == 1


def test_a_click_on_a_point_chooses_it(opened: Any) -> None:
    chart = opened.locator("#run0-progress")
    chart.scroll_into_view_if_needed()
    before = opened.locator("#run0-pick").input_value()
    points = chart.locator(".scatterlayer .trace").first.locator("path.point")
    for index in range(min(points.count(), 12)):
        points.nth(index).click(force=True)
        if opened.locator("#run0-pick").input_value() != before:
            return
    pytest.fail("no click on a point changed the chosen candidate")


def test_the_keyboard_reaches_and_works_everything(opened: Any) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(80):
        opened.keyboard.press("Tab")
        seen.add(opened.evaluate("document.activeElement.tagName"))
    assert {"SELECT", "INPUT", "SUMMARY"} <= seen
    axis = opened.locator("input[name='run0-progress-axis'][value='cost']")
    opened.locator("input[name='run0-progress-axis'][value='evaluations']").focus()
    opened.keyboard.press("ArrowRight")
    assert axis.is_checked()
    title = "document.getElementById('run0-progress').layout.xaxis.title.text"
    assert "worker time" in opened.evaluate(title)


def test_screenshots_for_people(opened: Any, tmp_path: Path) -> None:
    """Kept where AGENTMERGE_SCREENSHOTS says, to be looked at."""
    folder = Path(os.environ.get("AGENTMERGE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    width = opened.viewport_size["width"]
    picture = folder / f"report-{width}.png"
    opened.screenshot(path=str(picture), full_page=True)
    assert picture.stat().st_size > 50_000
