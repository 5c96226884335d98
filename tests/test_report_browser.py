"""Reports in a real browser: as they are read on a screen, on a phone, on paper, by keyboard and by ear."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import picture
from pages import KINDS, write_pages
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium_axe_python import Axe

pytestmark = pytest.mark.browser
DESKTOP, PHONE, NARROWEST = 1280, 390, 360
PAPER_WIDTH, PAPER_HEIGHT = 688, 1000  # CSS pixels that A4 leaves within the margins of the style sheet
EACH = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    write_pages(folder)
    return folder


def show(browser: webdriver.Chrome, report: Path, width: int, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < DESKTOP}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((report / "report.html").as_uri())


def in_page(browser: webdriver.Chrome, script: str) -> Any:
    return browser.execute_script(f"return {script}")


@EACH
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_that_hinders(browser: webdriver.Chrome, reports: Path, name: str, dark: bool) -> None:
    for width in (DESKTOP, PHONE):
        show(browser, reports / name, width, dark)
        picture(browser, f"report-{name}-{width}-{'dark' if dark else 'light'}")
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        axe = Axe(browser)
        axe.inject()
        # A figure's inside is hidden from readers, and thousands of letters; what names it stands around it.
        assert in_page(browser, "document.querySelectorAll('svg:not([aria-hidden=true])').length") == 0
        found = axe.run({"exclude": [["svg"]]})
        problems = [(v["impact"], v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found["violations"]]
        assert problems == [] and len(found["passes"]) > 20
        background = in_page(browser, "getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


@EACH
def test_the_page_asks_for_nothing_and_says_no_error(browser: webdriver.Chrome, reports: Path, name: str) -> None:
    show(browser, reports / name, DESKTOP)
    time.sleep(0.5)
    page = (reports / name / "report.html").as_uri()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in sent if request["documentURL"] == page]  # not the browser's own
    assert page in asked and [url for url in asked if url != page and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []


@EACH
def test_nothing_is_wider_than_a_phone_and_words_in_figures_are_large_enough(
    browser: webdriver.Chrome, reports: Path, name: str
) -> None:
    show(browser, reports / name, NARROWEST)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert in_page(browser, "document.documentElement.scrollWidth") == NARROWEST
    plots = in_page(
        browser,
        "[...document.querySelectorAll('.plot')].map((plot) => [...plot.children].map((svg) =>"
        " svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))",
    )
    assert plots
    for wide, narrow in plots:
        assert wide == 0 and 8.5 * narrow >= 10  # the smallest words are of 8.5 points


def test_a_column_is_sorted_by_keyboard_and_comes_back(browser: webdriver.Chrome, reports: Path) -> None:
    assert "<button" not in (reports / "finished" / "report.html").read_text(), (
        "without a script there is none to press"
    )
    show(browser, reports / "finished", DESKTOP)
    table = browser.find_element(By.TAG_NAME, "table")
    heads = [head.text.rstrip("\N{NO-BREAK SPACE}↕") for head in table.find_elements(By.CSS_SELECTOR, "thead th")]

    def column(head: str) -> list[str]:
        place = heads.index(head) + 1
        return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({place}) .main")]

    def sorted_by(head: str) -> str | None:
        cell = table.find_elements(By.CSS_SELECTOR, "thead th")[heads.index(head)]
        return cell.get_dom_attribute("aria-sort")

    before = column("Arm")
    button = table.find_elements(By.CSS_SELECTOR, "thead button")[heads.index("Test loss")]
    browser.execute_script("arguments[0].closest('.scroll').focus()", button)
    for _ in range(heads.index("Test loss") + 1):
        ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element == button
    for key, order in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
        ActionChains(browser).send_keys(key).perform()
        losses = [float(text) for text in column("Test loss")]
        assert losses == sorted(losses, reverse=order == "descending") and len(set(losses)) == 5
        assert sorted_by("Test loss") == order
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert column("Arm") == before and sorted_by("Test loss") is None

    sizes = table.find_elements(By.CSS_SELECTOR, "thead button")[heads.index("Adapter size")]
    sizes.send_keys(Keys.ENTER + Keys.ENTER)
    assert column("Adapter size") == ["86.6 MiB", "2.26 MiB", "296 KiB", "152 KiB", "80.4 KiB"], "not by their digits"
    verdicts = table.find_elements(By.CSS_SELECTOR, "thead button")[heads.index("Against full fine-tuning")]
    verdicts.send_keys(Keys.ENTER)
    assert column("Against full fine-tuning")[-1] == "–", "what is not known comes last"
    verdicts.send_keys(Keys.ENTER)
    assert column("Against full fine-tuning")[-1] == "–" and sorted_by("Adapter size") is None


def test_the_skip_link_is_first_and_leads_to_the_results(browser: webdriver.Chrome, reports: Path) -> None:
    show(browser, reports / "finished", DESKTOP)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to the results"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.switch_to.active_element.get_dom_attribute("id") == "main"
    for link in browser.find_elements(By.CSS_SELECTOR, "nav a"):
        assert browser.find_element(By.ID, str(link.get_dom_attribute("href"))[1:]).text == link.text


def test_numbers_of_a_figure_are_saved_as_they_lie_beside_it(
    browser: webdriver.Chrome, reports: Path, tmp_path: Path
) -> None:
    show(browser, reports / "finished", DESKTOP)
    where = {"behavior": "allow", "downloadPath": str(tmp_path / "saved")}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    links = browser.find_elements(By.PARTIAL_LINK_TEXT, "Numbers (CSV)")
    names = [str(link.get_dom_attribute("download")) for link in links]
    assert len(set(names)) == 9
    links[names.index("loss-by-rank.csv")].send_keys(Keys.ENTER)
    saved = tmp_path / "saved" / "loss-by-rank.csv"
    deadline = time.monotonic() + 20
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert saved.read_bytes() == (reports / "finished" / "figures" / "loss-by-rank.csv").read_bytes()


@EACH
def test_on_paper_it_is_light_whole_and_no_figure_is_cut(
    browser: webdriver.Chrome, reports: Path, tmp_path: Path, name: str
) -> None:
    show(browser, reports / name, DESKTOP, dark=True)
    made = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})
    pages = len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(made["data"])))
    assert 2 <= pages <= 16

    show(browser, reports / name, PAPER_WIDTH, dark=True)
    figures = len(browser.find_elements(By.TAG_NAME, "figure"))
    dark = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert in_page(browser, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert in_page(browser, "document.documentElement.scrollWidth") <= PAPER_WIDTH
    inside = "[...document.querySelectorAll('main details > :not(summary)')].map((x) => x.offsetHeight)"
    assert min(in_page(browser, inside)) > 0
    heights = in_page(
        browser,
        "[...document.querySelectorAll('figure')].filter((f) => f.querySelector('.wide').getBoundingClientRect().height"
        " > 80).map((f) => f.getBoundingClientRect().height)",
    )
    assert len(heights) == figures > 0 and max(heights) < PAPER_HEIGHT
    assert in_page(browser, "getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
