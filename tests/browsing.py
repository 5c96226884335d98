"""A real browser for tests: headless Chromium, and how to wait for what a page shows.

`SWEEP_SCREENSHOTS=DIR pytest -m browser` keeps a picture of every page, to look at.
With SWEEP_NEEDS_BROWSER=1, as `.ci/run` sets it, a test without a browser fails; else it is skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

NEEDED = "SWEEP_NEEDS_BROWSER"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1100",
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        why = "needs chromium and chromedriver (Debian: apt-get install chromium-driver)"
        pytest.fail(why) if os.environ.get(NEEDED) else pytest.skip(why)
    options = Options()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(120)  # an audit of a long page, while other tests run beside it
    yield browser
    browser.quit()


def see(browser: webdriver.Chrome, *texts: str) -> None:
    """Wait until the page shows all texts."""

    def missing(page: webdriver.Chrome) -> list[str]:
        shown = page.find_element(By.TAG_NAME, "body").text
        return [text for text in texts if text not in shown]

    try:
        WebDriverWait(browser, 30, ignored_exceptions=[Exception]).until(lambda page: not missing(page))
    except Exception:
        picture(browser, "failed")
        raise AssertionError(f"not on {browser.current_url}: {missing(browser)}") from None


def click(browser: webdriver.Chrome, path: str) -> None:
    def try_it(page: webdriver.Chrome) -> bool:
        page.find_element(By.XPATH, path).click()
        return True

    WebDriverWait(browser, 20, ignored_exceptions=[Exception]).until(try_it, f"{path} on {browser.current_url}")


def picture(browser: webdriver.Chrome, name: str) -> None:
    folder = os.environ.get("SWEEP_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
