"""What the tests of the driver share: running it with a fake trainer, and views of what it left behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from fakes import fake_work, make_study

from sweep.driver.driver import Progress, run_study
from sweep.execution.executor import InlineExecutor
from sweep.execution.worker import Work
from sweep.study.home import Home
from sweep.study.records import Measurement
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord, read_study_record


class Killed(BaseException):
    """Stands for SIGKILL: nothing but the interpreter sees it."""


def run(
    home: Home, study: Study, work: Work | None = None, executor: Any = None, url: str = "", checkpoints: str = ""
) -> list[Progress]:
    heard: list[Progress] = []
    run_study(
        study,
        home.study(study.name),
        executor or InlineExecutor(),
        url or home.optuna_url,
        home.cache,
        work or fake_work(),
        heard.append,
        checkpoints=checkpoints,
    )
    return heard


def records_of(home: Home, study: Study) -> StudyRecord:
    return read_study_record(home.study(study.name))


def trials_of(home: Home, study: Study) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=study.name, storage=home.optuna_url).trials


def journal_view(record: StudyRecord) -> Any:
    """All that must not depend on interruptions: everything but times, names of checkpoints' folders, and packs.

    Checkpoints' digests stay: a checkpoint holds the same, whoever wrote it.
    """

    def measured(found: Measurement) -> Measurement:
        return replace(found, pack_size=0, checkpoint=found.checkpoint[:-8], test_rows="")

    def trial(r: TrialRecord) -> Any:
        return replace(r.spec, folder="", place=""), [measured(g.measurement) for g in r.rungs], r.state, r.reason

    return [trial(r) for r in record.trials], record.prepared, record.costs, record.finalists, record.warnings


def optuna_view(trials: list[optuna.trial.FrozenTrial]) -> Any:
    return [(t.number, t.state, t.value, t.params, t.user_attrs, t.intermediate_values) for t in trials]


class Threads:
    """Several units at once, in threads."""

    def __init__(self, slots: int):
        self.slots, self.pool = slots, ThreadPoolExecutor(slots)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown()

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        return self.pool.submit(fn, *args)

    def shutdown(self, wait: bool = True) -> None: ...


def undisturbed(folder: Path) -> Home:
    """The home of one undisturbed run of make_study(), to be read only."""
    home = Home(folder)
    run(home, make_study())
    return home
