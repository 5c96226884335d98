"""The ten-thousandth trial costs what the first did."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from fakes import fake_work, make_study

from sweep.driver.driver import Progress, run_study
from sweep.execution.executor import InlineExecutor
from sweep.study.home import Home
from sweep.study.schema import Study


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def many(n: int) -> Study:
    """n search trials over 20 arms, two rungs, no full fine-tuning."""
    return make_study(
        arms={"rank": list(range(1, 11)), "alpha_ratio": [1.0, 2.0], "full_finetuning": False},
        tune={"learning_rate": [round(1e-4 * 1.001**i, 9) for i in range(n // 20)]},
        train={"steps": 2, "batch_size": 1},
        search={"rungs": [1, 2], "keep": 0.5, "seed": 0},
        confirm={"seeds": [1], "reference": 8, "epsilon": 0.05},
    )


@dataclass
class Load:
    """What a run asked of Optuna's storage, by fifths of the first rung: for each trial."""

    statements: list[float]
    milliseconds: list[float]  # of CPU time, which a busy machine does not change
    trials_read: int  # trials that Optuna put together from their rows, in the whole run


def measure_load(home: Home, n: int, monkeypatch: pytest.MonkeyPatch) -> Load:
    statements = trials_read = 0
    marks: list[tuple[int, int, float]] = []
    build = optuna.storages.RDBStorage._build_frozen_trial_from_trial_model

    def count_read(*args: Any) -> Any:
        nonlocal trials_read
        trials_read += 1
        return build(*args)

    def count_statement(*args: Any) -> None:
        nonlocal statements
        statements += 1

    def listen(progress: Progress) -> None:
        if progress.phase == "search" and "reached step 1" in progress.message:
            marks.append((progress.steps_done, statements, time.process_time()))

    monkeypatch.setattr(optuna.storages.RDBStorage, "_build_frozen_trial_from_trial_model", count_read)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count_statement)
    try:
        study = many(n)
        run_study(study, home.study("fake"), InlineExecutor(), home.optuna_url, home.cache, fake_work(), listen)
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", count_statement)
    at = [marks[(len(marks) - 1) * i // 5] for i in range(6)]
    return Load(
        [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(at)],
        [(b[2] - a[2]) / (b[0] - a[0]) * 1e3 for a, b in pairwise(at)],
        trials_read,
    )


def test_no_trial_is_read_back_and_the_last_costs_as_many_statements_as_the_first(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = measure_load(home, 200, monkeypatch)
    assert load.trials_read == 0
    assert max(load.statements) < 1.5 * min(load.statements)  # a rank is judged, and pruned, in one fifth


@pytest.mark.slow
def test_ten_thousand_trials_pass_without_growth_of_time_per_trial(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    load = measure_load(home, 10_000, monkeypatch)
    print(load)
    assert load.trials_read == 0
    assert load.milliseconds[-1] < 3 * load.milliseconds[0]
