"""The live pages in a real browser; opt-in as ``tests/report/test_page.py`` is."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmerge.ledger.folder import LEDGER
from tests.conftest import CHROMIUM
from tests.report.conftest import search_family
from tests.ui.test_served import SLOW, began, served

pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = "</script><img src=x onerror=document.title='got'>"
PAGES = {
    "searches": "/", "search": "/run/first", "candidates": "/run/first/candidates",
    "candidate": "/run/first/candidate/2.1", "compare": "/compare?name=first&name=second",
    "lineage": "/lineage", "report": "/run/first/report", "fault": "/run/nobody",
}  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over two searches whose candidates, failures and words hold markup."""
    runs = tmp_path_factory.mktemp("runs")
    search_family(runs)
    with sqlite3.connect(runs / LEDGER) as db:
        db.execute("UPDATE candidates SET failure = failure || ? WHERE failure <> ''", (HOSTILE,))
        db.execute("UPDATE candidates SET label = label || ?", (HOSTILE,))
        db.execute("UPDATE runs SET stop_reason = stop_reason || ?", (HOSTILE,))
    db.close()
    with served(runs) as (found, _):
        yield found


@pytest.fixture(
    params=[(PHONE, "light"), (DESK, "light"), (DESK, "dark")], ids=["phone", "desk", "dark"]
)
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    viewport, colours = request.param
    context = browser.new_context(viewport=viewport, color_scheme=colours)
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    context.close()


def until(tab: Any, expression: str, within_s: float = 30.0) -> None:
    """Wait until it holds. The page's policy allows no eval, which playwright would wait with."""
    end = time.monotonic() + within_s
    while not tab.evaluate(expression):
        assert time.monotonic() < end, f"not within {within_s:g} s: {expression}"
        tab.wait_for_timeout(50)


def shown(tab: Any, address: str, path: str) -> None:
    """Go there, and wait for what comes later."""
    tab.goto(address + path)
    if path == "/run/first":
        tab.wait_for_selector("#run0-progress .plot-container")
        tab.wait_for_selector("[data-part=events]")
    if path == PAGES["compare"]:
        tab.wait_for_selector("#overview .plot-container")
    if path == "/run/first/report":
        tab.wait_for_selector("#run0-grid .plot-container")
    if path == "/":
        until(tab, "document.querySelector('td.spark').textContent.length > 0")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_fits_and_is_accessible(tab: Any, address: str, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    shown(tab, address, PAGES[name])
    assert [s for s in tab.said if "404" not in s or name != "fault"] == []
    assert tab.title() != "got"
    assert tab.locator("img").count() == 0
    wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "the page scrolls sideways"
    for details in tab.locator("details").all():
        details.evaluate("element => element.open = true")
    found = Axe().run(tab).response["violations"]
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []
    if folder := os.environ.get("AGENTMERGE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        dark = "-dark" * tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        picture = f"ui-{name}-{tab.viewport_size['width']}{dark}.png"
        tab.screenshot(path=str(Path(folder) / picture), full_page=True)


def test_the_charts_are_the_reports(tab: Any, address: str) -> None:
    shown(tab, address, "/run/first")
    drawn = tab.evaluate(
        "[...document.querySelectorAll('.drawn:not([hidden]) .chart')]"
        ".map(c => c.querySelectorAll('svg').length)"
    )
    assert len(drawn) == 6
    assert all(drawn)
    ink = tab.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert ink == ("rgb(230, 233, 238)" if dark else "rgb(31, 41, 51)")


def test_the_keyboard_filters_and_sorts(tab: Any, address: str) -> None:
    shown(tab, address, "/run/first/candidates")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.locator("#state").focus()
    tab.keyboard.type("failed")
    tab.locator("#containing").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**state=failed**")
    rows = tab.locator("tbody tr")
    assert rows.count() > 0
    assert all("failed" in (row.text_content() or "") for row in rows.all())
    tab.locator("th a", has_text="score").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**sort=score**")
    assert "state=failed" in tab.url
    assert tab.locator("th[aria-sort=descending]").count() == 1


def test_a_recipe_is_copied(browser: Any, address: str) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address + PAGES["candidate"])
    page.get_by_role("button", name="Copy the recipe").click()
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#recipe").text_content()
    assert "merge_method: ties" in copied
    context.close()


def test_a_page_follows_a_search_to_its_end(browser: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(SLOW)
    search = began(tmp_path / "runs", config, "a")
    with served(tmp_path / "runs") as (address, server):
        page = browser.new_page()
        page.goto(f"{address}/run/a")
        until(page, "document.querySelector('.verdict').textContent.includes('Running')")
        page.wait_for_selector("#run0-progress .plot-container")
        before = page.evaluate("document.getElementById('run0-progress').data[0].x.length")
        assert search.wait() == 0
        until(page, "document.querySelector('.verdict').textContent.includes('Done')")
        points = "document.getElementById('run0-progress').data[0].x.length"
        until(page, f"{points} > {before}")
        server.kill()
        page.wait_for_selector("#trouble:not([hidden])")
        assert "does not answer" in page.locator("#trouble").text_content()
        page.close()


def test_an_action_shows_its_command_and_asks_for_the_token_once(
    browser: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    search_family(runs)
    with served(runs, "--allow-actions") as (told, _):
        address, _, token = told.partition("/#token=")
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/run/first")
        page.wait_for_selector("form.act")
        branch = page.locator("form.act", has_text="Branch")
        branch.get_by_label("as", exact=True).fill("x y")
        command = branch.locator(".command").text_content()
        assert command.endswith(f"--runs-dir {runs} --at 5 --as 'x y'"), command
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.name") == "token"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        branch.get_by_role("button").click()
        page.wait_for_selector("text=the token is missing or another server's")
        page.locator("#token input").fill(token)
        page.keyboard.press("Enter")
        branch.get_by_role("button").click()
        page.wait_for_selector("text=as cannot be 'x y'")
        branch.get_by_label("as", exact=True).fill("new")
        branch.locator("summary").click()
        branch.get_by_label("max-evaluations").fill("44")
        page.wait_for_timeout(2500)  # the page is told anew meanwhile
        assert branch.get_by_label("max-evaluations").input_value() == "44"
        shown = branch.locator(".command").text_content()
        branch.get_by_role("button").click()
        page.wait_for_selector("text=/drives new|it is over/", timeout=120_000)
        assert f"$ {shown}" in (runs / "new" / "console.log").read_text()
        # The address with the token keeps it, and shows it no longer; it is in no request.
        other = browser.new_context().new_page()
        other.goto(f"{address}/run/second#token={token}")
        until(other, "location.hash === ''")
        assert other.evaluate("sessionStorage.getItem('token')") == token
        assert not [url for url in asked if token in url]
        other.context.close()
        page.close()


def test_a_hidden_tab_asks_for_nothing(browser: Any, address: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/")
    until(page, "document.querySelector('td.spark').textContent.length > 0")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    streams = lambda: sum(url.endswith("/live") for url in asked)  # noqa: E731
    assert streams() == 1
    page.evaluate(hide % "true")
    page.evaluate(hide % "false")
    until(page, "document.querySelector('td.spark').textContent.length > 0")
    assert streams() == 2
    page.close()
