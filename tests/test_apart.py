"""Workers whose machine is not the driver's: disks of their own, workers that vanish. The trainer is fake."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import Threads, journal_view, records_of, run, undisturbed
from fakes import fake_work, make_study, prepare, train_rung

from sweep.driver import checkpoints, phase
from sweep.driver.patience import StorageError
from sweep.study.home import Home
from sweep.study.records import INFEASIBLE, Measurement, Unit
from sweep.tracking.remote import PlaceError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.mark.parametrize("sees_first", [True, False])
def test_a_checkpoint_on_a_disk_that_only_its_worker_sees_is_not_acknowledged(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, sees_first: bool
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS_TO_APPEAR", 0.2)
    study, count = make_study(), itertools.count()

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if next(count) % 2 == sees_first:
            unit = replace(unit, trials=tuple(replace(t, folder=f"{tmp_path}/node{t.folder}") for t in unit.trials))
        return train_rung(unit)

    with pytest.raises(PlaceError, match=r"^checkpoints: a worker wrote \S+, which is not there for this command: use"):
        run(home, study, fake_work(train))
    trials = records_of(home, study).trials
    assert bool([t for t in trials if t.rungs]) == sees_first
    for trial in trials:
        assert trial.state is None
        assert all((Path(trial.spec.folder) / rung.measurement.checkpoint).is_dir() for rung in trial.rungs[-1:])
    run(home, study)
    assert journal_view(records_of(home, study)) == journal_view(records_of(undisturbed(tmp_path / "calm"), study))


def test_a_checkpoint_that_a_share_shows_late_is_waited_for(tmp_path: Path, home: Home) -> None:
    study, late = make_study(), []

    def train(unit: Unit) -> tuple[Measurement, ...]:
        found = train_rung(unit)
        if not late:
            folder = Path(unit.trials[0].folder) / found[0].checkpoint
            folder.rename(tmp_path / "hidden")
            late.append(threading.Timer(0.4, (tmp_path / "hidden").rename, [folder]))
            late[0].start()
        return found

    run(home, study, fake_work(train))
    assert records_of(home, study).finished_at


class Shrinking:
    """Two workers, as Ray has them: a machine out of memory takes one away before its unit ends in MemoryError."""

    def __init__(self) -> None:
        self.slots, self.pool, self.lost = 2, ThreadPoolExecutor(2), False

    def submit(self, fn: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if fn is train_slowly and not self.lost:
                self.lost = True
                time.sleep(0.1)
                self.slots = 1
                future.set_exception(MemoryError("Ray ended it"))
                return
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)

        self.pool.submit(work)
        return future

    def end(self, future: Future[Any], reason: str) -> None: ...

    def shutdown(self) -> None:
        self.pool.shutdown()


def train_slowly(unit: Unit) -> tuple[Measurement, ...]:
    time.sleep(0.05)
    return train_rung(unit)


def test_a_trial_without_memory_beside_one_whose_worker_is_gone_is_tried_alone(home: Home) -> None:
    study, executor = make_study(), Shrinking()
    single = replace(fake_work(train_slowly), prepare=lambda s, a: replace(prepare(s, a), pack_size=1))
    heard = run(home, study, single, executor)
    executor.shutdown()
    assert executor.lost and any("found no memory beside others" in progress.message for progress in heard)
    assert not any(trial.state == INFEASIBLE for trial in records_of(home, study).trials)


def test_a_storage_that_goes_away_between_packs_costs_no_result_of_those_in_training(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, trained = make_study(), []

    def away(phase: Any, slot: Any) -> None:
        if phase.running:
            raise StorageError("the Optuna storage does not answer")

    def train(unit: Unit) -> tuple[Measurement, ...]:
        time.sleep(0.3)
        trained.extend(trial.number for trial in unit.trials)
        return train_rung(unit)

    monkeypatch.setattr(phase, "_no_room", away)  # a trial that is known not to fit is asked in there
    with Threads(2) as executor, pytest.raises(StorageError):
        run(home, study, fake_work(train), executor)
    assert trained and trained == [t.spec.number for t in records_of(home, study).trials if t.rungs]
