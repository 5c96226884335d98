"""Optuna's own dashboard over a study's storage, in a real browser: values, pruned, failed and infeasible trials."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import fakes
import pytest
from browsing import click, picture, see
from driving import records_of, run
from fakes import fake_work, make_study
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from servers import free_port, running

from sweep.study.home import Home
from sweep.study.records import COMPLETE, DIVERGED, INFEASIBLE, PRUNED, Measurement, Unit

pytestmark = pytest.mark.browser
# On a trial's own page, which knows of no constraints.
SHOWN = {
    COMPLETE: "Complete",
    PRUNED: "Pruned",
    DIVERGED: "Fail",
    INFEASIBLE: "Complete",
}  # a trial's own page knows no more

# Names and lengths of the bars of importances: the timeline's bars lie too, but at numbers.
BARS = """
const traces = [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data || []);
const bars = traces.filter(trace => trace.type === 'bar' && typeof trace.y?.[0] === 'string');
return bars.flatMap(trace => [...trace.y].map((name, i) => [name, trace.x[i]]));
"""

# Numbers of the trials that the timeline shows as infeasible.
UNFIT = """
const traces = [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data || []);
return traces.filter(trace => trace.type === 'bar' && trace.name === 'Infeasible').flatMap(trace => [...trace.y]);
"""


def train(unit: Unit) -> tuple[Measurement, ...]:
    """One setting of rank 2 diverges; full fine-tuning does not fit."""
    if any(trial.arm.is_full for trial in unit.trials):
        raise MemoryError("no room")
    bad = [t.arm.name == "r2-ratio1" and t.learning_rate > 0.05 for t in unit.trials]
    return tuple(
        fakes.diverged(unit, trial) if is_bad else fakes.measure(unit, trial)
        for trial, is_bad in zip(unit.trials, bad, strict=True)
    )


def test_it_shows_the_values_the_pruned_and_the_failed_trials_and_importances(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    home, study, port = Home(tmp_path / "home"), make_study(), free_port()
    run(home, study, fake_work(train))
    trials = records_of(home, study).trials
    states = Counter(trial.state for trial in trials)
    assert set(states) == set(SHOWN)
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), home.optuna_url]
    command += ["--host", "127.0.0.1", "--port", str(port), "--server", "wsgiref"]
    root = f"http://127.0.0.1:{port}/dashboard"
    with running(command, os.environ, f"{root}/", tmp_path / "optuna-dashboard.log"):
        browser.get(f"{root}/")
        click(browser, f"//a[contains(., '{study.name}')]")
        see(browser, "Hyperparameter Importance", "Timeline", "Best Trial", "Intermediate values", study.question)
        best = min((t for t in trials if t.state == COMPLETE), key=lambda t: t.last.eval_loss if t.last else 1.0)
        assert best.last is not None
        see(browser, f"Best Trial (number={best.spec.number})", str(best.last.eval_loss), "eval_loss")
        picture(browser, "optuna-1-study")
        importances = WebDriverWait(browser, 20).until(lambda page: dict(page.execute_script(BARS)))
        unfit = WebDriverWait(browser, 20).until(lambda page: page.execute_script(UNFIT))
        assert {int(n) for n in unfit} == {t.spec.number for t in trials if t.state == INFEASIBLE}
        assert set(importances) == {"rank", "alpha_ratio", "learning_rate"}
        assert sum(importances.values()) == pytest.approx(1) and min(importances.values()) > 0

        browser.get(f"{root}/studies/1/trials")
        see(browser, f"{len(trials)} Trials")
        for trial in trials:
            look_at_trial(browser, root, trial.spec.number, SHOWN[str(trial.state)])
            said = browser.find_element(By.TAG_NAME, "body").text
            loss = trial.last.eval_loss if trial.last else None
            value = "inf" if trial.state == INFEASIBLE else str(loss).removesuffix(".0")  # JavaScript writes 2.0 as 2
            assert f"Value\n{value}\n" in said
            assert f"arm {trial.spec.arm.name}\n" in said and f"phase {trial.spec.phase}\n" in said
            assert f"learning_rate {trial.spec.learning_rate}" in said
            assert not trial.reason or f"reason {trial.reason}" in said
        picture(browser, "optuna-2-trial")
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []


def look_at_trial(browser: webdriver.Chrome, root: str, number: int, state: str) -> None:
    browser.get(f"{root}/studies/1/trials?numbers={number}")
    see(browser, f"Trial {number} (trial_id={number + 1})\n{state}\n", "User Attributes")
