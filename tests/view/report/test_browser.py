"""The page in a real browser, Debian's Chromium: everything is drawn, nothing is asked of a network, no foreign text runs.

Without Chromium the tests are skipped. With HPO_TEST_BROWSER=required, as in CI, that is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpo.storage.connect import connect
from hpo.study import plain
from hpo.view.report import output
from tests.support import emptied
from tests.view.report.test_report import EVIL, evil_study, made

pytestmark = pytest.mark.browser
PHONE, DESK = 390, 1280
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
SECONDS = 120  # for which a page may draw; a machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing = "needs Debian's packages chromium and chromium-driver"
        if os.environ.get("HPO_TEST_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_page_load_timeout(SECONDS)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, template: Path) -> dict[str, Path]:
    """Two pages: a declared study with all sections beside another one, and one full of markup."""
    folder = tmp_path_factory.mktemp("pages")
    place = connect(emptied.sqlite_copy(template, folder))
    made(place, folder)
    evil_study(place, folder)
    large, evil = plain.open_any(place, "large"), plain.open_any(place, f"demo {EVIL}")
    found = {"large": folder / "large.html", "evil": folder / "evil.html"}
    output.write(found["large"], "html", [large], is_full=False)
    output.write(found["evil"], "html", [evil, large], is_full=False)
    place.close()
    return found


def see(browser: Any, file: Path, width: int, theme: str) -> None:
    """Open a page, and wait until all its figures are drawn."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())
    until = time.monotonic() + SECONDS
    while browser.execute_script("return document.documentElement.dataset.figures") != "drawn":
        assert time.monotonic() < until, browser.get_log("browser")
        time.sleep(0.05)


def requests(browser: Any) -> list[str]:
    """Return the addresses that a page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_page_is_drawn_without_error_or_request(browser: Any, pages: dict[str, Path], width: int, theme: str) -> None:
    see(browser, pages["large"], width, theme)
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith(("data:", "blob:"))] == [pages["large"].as_uri()]
    places = "[...document.querySelectorAll('[data-figure]')]"
    empty = f"return {places}.filter(one => !one.querySelector('.trace, .contour')).map(one => one.dataset.figure)"
    assert browser.execute_script(empty) == []
    assert browser.execute_script(f"return {places}.length") > 15
    assert browser.execute_script("const d = document.documentElement; return d.scrollWidth - d.clientWidth") == 0
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(247, 247, 245)", "dark": "rgb(18, 20, 23)"}[theme]


def test_foreign_text_neither_runs_nor_becomes_markup(browser: Any, pages: dict[str, Path]) -> None:
    see(browser, pages["evil"], DESK, "light")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return [typeof window.evil, document.images.length, document.scripts.length]") == [
        "undefined",
        0,
        3,
    ]
    ticks = "return [...document.querySelectorAll('.xtick text')].map(one => one.textContent)"
    assert EVIL[:8] in {tick[:8] for tick in browser.execute_script(ticks)}


def test_the_theme_can_be_switched_by_hand(browser: Any, pages: dict[str, Path]) -> None:
    see(browser, pages["large"], DESK, "light")
    color = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    before = browser.execute_script(color)
    browser.execute_script("document.getElementById('theme').click()")
    until = time.monotonic() + SECONDS
    while browser.execute_script(color) == before:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
