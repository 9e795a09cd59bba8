"""Makes the pictures of docs/report.md anew: `python docs/make_report_pictures.py docs/assets` searches the digits,
confirms the result, and reports.

It needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpo.analysis import confirmation
from hpo.cli.app import quiet_optuna
from hpo.launch.launcher import run_workers
from hpo.launch.local import Fleet
from hpo.storage.connect import connect
from hpo.study import resolve
from hpo.study import study as studies
from hpo.view.live import LiveView
from hpo.view.report import output

DEMO = Path(__file__).parent.parent / "examples" / "digits.toml"
WIDTH, HEIGHT = 1100, 1040
SECONDS = 60  # for which a page may draw
#: picture -> its theme, and the section at its top
PICTURES = {"report.png": ("light", None), "report-parameters.png": ("dark", "s0-importance")}


def photograph(page: Path, target: Path, theme: str, section: str | None) -> None:
    """Write what Chromium shows of a page, from a section on, as PNG."""
    from PIL import Image
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    browser: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        until = time.monotonic() + SECONDS
        while browser.execute_script("return document.documentElement.dataset.figures") != "drawn":
            assert time.monotonic() < until, "the page was not drawn"
            time.sleep(0.1)
        if section is not None:
            browser.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
        shown = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    finally:
        browser.quit()
    target.write_bytes(base64.b64decode(shown["data"]))
    with Image.open(target) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the size
    few.save(target, optimize=True)


def main(folder: Path) -> None:
    quiet_optuna()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "digits.toml"
        file.write_text(f"{DEMO.read_text()}\n[watch]\nnorms = true\nresources = true\n")
        found = resolve.read(file)
        place = connect(f"sqlite:///{scratch}/studies.db", create=True)
        study = studies.create_or_join(place, found.spec, code_folder=found.code_folder, code_digest=found.code_digest)
        run_workers(study, Fleet(study, 2, code_folder=found.code_folder), LiveView(is_quiet=True), timeout=None)
        request = confirmation.ask(study, top=None, runs=None, delta=None)
        sister = confirmation.enlist(request, found.code_folder, found.code_digest)
        run_workers(sister, Fleet(sister, 2, code_folder=found.code_folder), LiveView(is_quiet=True), timeout=None)
        page = Path(scratch) / "digits.html"
        output.write(page, "html", [study], is_full=False)
        for name, (theme, section) in PICTURES.items():
            photograph(page, folder / name, theme, section)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
