"""What `scale` measures, each once."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from concurrent.futures import wait
from functools import partial
from itertools import pairwise
from pathlib import Path

from fakes import fake_work, make_study
from synthetic import quickstart, write_study

from sweep.driver.driver import Progress, run_study
from sweep.execution.executor import Executor, InlineExecutor
from sweep.execution.local import LocalExecutor
from sweep.execution.worker import Work
from sweep.publishing import SECONDS_TO_TRACK
from sweep.report.report import write_report
from sweep.study.home import Home
from sweep.study.records import SEARCH
from sweep.study.schema import Study
from sweep.tracking.connection import Tracking
from sweep.tracking.journal import read_study_record
from sweep.tracking.mlflow import Projector

from .scale_records import Driven, Reported, Tracked
from .scale_units import multiply, train_asleep, train_busy

WORKERS, PACK, ARMS = 16, 5, 20
POINTS = 100  # a trial, in MLflow
PRODUCTS = 10  # a pack: some tenths of a second


def grid(trials: int, steps: int) -> Study:
    """A search of so many trials over 20 arms, without pruning: each trial is asked, trained once and ended."""
    return make_study(
        arms={"rank": list(range(1, 11)), "alpha_ratio": [1.0, 2.0], "full_finetuning": False},
        tune={"learning_rate": [round(1e-4 * 1.001**i, 9) for i in range(trials // ARMS)]},
        train={"steps": steps, "batch_size": 1},
        search={"rungs": [steps], "keep": 1.0, "seed": 0},
        confirm={"seeds": [1], "reference": 8, "epsilon": 0.05},
    )


def drive(trials: int, seconds: float, repetition: int) -> Driven:
    """One search over workers that live already."""
    marks: list[tuple[float, float, int]] = []  # wall clock, CPU of this process, trials ended

    def listen(progress: Progress) -> None:
        if progress.phase == SEARCH:
            marks.append((time.perf_counter(), time.process_time(), progress.done))

    executor = LocalExecutor([{}] * WORKERS)
    try:
        wait([executor.submit(time.sleep, 2.0) for _ in range(WORKERS)])  # at once: each starts its process
        with tempfile.TemporaryDirectory() as folder:
            run(Home(Path(folder)), grid(trials, 2), executor, fake_work(partial(train_asleep, seconds)), listen)
    finally:
        executor.shutdown()
    ended = marks[-1][2]
    at = [next(mark for mark in marks if mark[2] >= ended * fifth / 5) for fifth in range(6)]
    cpu = [(b[1] - a[1]) / (b[2] - a[2]) * 1e3 for a, b in pairwise(at)]
    return Driven(repetition, ended, WORKERS, PACK, seconds, marks[-1][0] - marks[0][0], tuple(cpu))


def track(trials: int, tracked: bool, repetition: int) -> Tracked:
    """One study in this process. What MLflow must hold at the end is counted in MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        home, study = Home(Path(folder)), grid(trials, POINTS)
        tracking = Tracking(home.mlflow_url, str(home.mlflow_artifacts))
        projector = Projector(study, home.study(study.name), tracking)
        multiply(1)  # torch's start, which only the first of them would pay
        if tracked:
            projector.start()
        began = time.perf_counter()
        run(home, study, InlineExecutor(), fake_work(partial(train_busy, PRODUCTS)))
        training_s = time.perf_counter() - began
        if not tracked:
            return Tracked(repetition, tracked, training_s)
        projector.hasten()
        warning = projector.finish(SECONDS_TO_TRACK)
        if warning is not None:
            raise RuntimeError(warning)
        after_s = time.perf_counter() - began - training_s
        return Tracked(repetition, tracked, training_s, after_s, count_points(home))


def count_points(home: Home) -> int:
    with sqlite3.connect(home.root / "mlflow.db") as database:
        return int(database.execute("select count(*) from metrics where key = 'train_loss'").fetchone()[0])


def report(trials: int, repetition: int) -> Reported:
    """A report of the quickstart with so many learning rates that it has so many trials."""
    with tempfile.TemporaryDirectory() as folder:
        rates = f"{{low: 3.0e-4, high: 3.0e-2, values: {trials // len(quickstart().list_arms())}}}"
        overrides = [f"tune.learning_rate={rates}", f"tune.full_finetuning.learning_rate={rates}"]
        study = quickstart(*overrides)
        where = write_study(Path(folder, "study"), study).folder
        began = time.perf_counter()
        record = read_study_record(where)
        read_s = time.perf_counter() - began
        write_report(study, record, Path(folder, "out"))
        write_s = time.perf_counter() - began - read_s
        return Reported(repetition, len(record.trials), read_s, write_s, Path(folder, "out/report.html").stat().st_size)


def run(home: Home, study: Study, executor: Executor, work: Work, listen=lambda progress: None) -> None:
    run_study(study, home.study(study.name), executor, home.optuna_url, home.cache, work, listen)
