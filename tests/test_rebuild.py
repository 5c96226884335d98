"""A damaged checkpoint costs its own trial the steps up to it, and nobody else anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import Threads, journal_view, optuna_view, records_of, run, trials_of, undisturbed
from fakes import diverged, fake_work, make_study, measure, train_rung

from sweep.execution.executor import InlineExecutor
from sweep.report.report import write_report
from sweep.study.home import Home
from sweep.study.records import FAILED, Measurement, Unit
from sweep.tracking.journal import read_events


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


def damaging(
    spoil: Callable[[Path], Any], at: int, trials: int = 1, times: int = 1, units: list[Unit] | None = None
) -> Callable[[Unit], tuple[Measurement, ...]]:
    """A trainer before whom checkpoints of that step are spoiled, those of a pack's first trials, so many times."""
    left, victims = times, list[int]()

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal left
        if units is not None:
            units.append(unit)
        victims[:] = victims or [trial.number for trial in unit.trials if unit.start == at][:trials]
        for trial, saved in zip(unit.trials, unit.checkpoints, strict=bool(unit.start)):
            if unit.start == at and left and trial.number in victims:
                left -= trial.number == victims[-1]
                spoil(Path(trial.folder, saved.name))
        return train_rung(unit)

    return train


def cut(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def without_warnings(view: Any) -> Any:
    return view[:-1]


@pytest.mark.parametrize("spoil", [cut, shutil.rmtree], ids=["cut short", "gone"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("trials", [1, 2])
def test_trials_whose_checkpoints_are_damaged_are_trained_anew_to_there_and_the_study_is_as_if_undisturbed(
    home: Home, done: Home, spoil: Callable[[Path], None], slots: int, trials: int
) -> None:
    study, units = make_study(), list[Unit]()
    with Threads(slots) as executor:
        run(home, study, fake_work(damaging(spoil, at=2, trials=trials, units=units)), executor)
    record = records_of(home, study)
    assert without_warnings(journal_view(record)) == without_warnings(journal_view(records_of(done, study)))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(done, study))
    rebuilt = [(u.trials[0].number, u.start, u.stop, len(u.trials), u.checkpoints) for u in units if u.stop == 2]
    again = [unit for unit in rebuilt if unit[1] == 0]
    assert again and all(unit == (unit[0], 0, 2, 1, ()) for unit in again)
    assert len(again) == trials or slots == 3, "several workers share what is ready: the pack may be of one"
    assert len(record.warnings) == len(again)
    for (number, *_), warning in zip(again, record.warnings, strict=True):
        assert warning.startswith(f"the checkpoint of trial {number} (") and " is damaged: /" in warning
        assert warning.endswith("; the trial was trained anew from step 0 to 2, with the same losses")
        journal = read_events(home.study("fake").trial(number) / "journal.jsonl")
        (event,) = [event for event in journal if event["event"] == "rebuilt"]
        assert event["step"] == 2 and event["checkpoint"].startswith("checkpoints/2-")


def test_the_report_tells_of_it(home: Home, tmp_path: Path) -> None:
    study = make_study()
    run(home, study, fake_work(damaging(cut, at=1)))
    write_report(study, records_of(home, study), tmp_path / "report")
    told = (tmp_path / "report" / "report.md").read_text()
    assert "was trained anew from step 0 to 1, with the same losses" in told and str(home.root) not in told


def test_a_rebuild_that_is_killed_is_made_once_more_and_nothing_is_lost(home: Home, done: Home) -> None:
    study = make_study()
    spoiled = damaging(cut, at=2)

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if (unit.start, unit.stop) == (0, 2):
            raise KeyboardInterrupt
        return spoiled(unit)

    with pytest.raises(KeyboardInterrupt):
        run(home, study, fake_work(train))
    run(home, study)
    record = records_of(home, study)
    assert without_warnings(journal_view(record)) == without_warnings(journal_view(records_of(done, study)))
    assert len(record.warnings) == 1


def test_losses_that_differ_from_the_journals_are_told(home: Home, done: Home) -> None:
    study = make_study()
    spoiled = damaging(cut, at=2)

    def train(unit: Unit) -> tuple[Measurement, ...]:
        found = spoiled(unit)
        if (unit.start, unit.stop) == (0, 2):
            found = tuple(replace(m, train_loss=(m.train_loss[0], m.train_loss[1] + 0.25)) for m in found)
        return found

    run(home, study, fake_work(train))
    record = records_of(home, study)
    (warning,) = record.warnings
    assert warning.endswith("from step 0 to 2, with losses that differ by up to 0.25 from the journal's")
    assert without_warnings(journal_view(record)) == without_warnings(journal_view(records_of(done, study)))


@pytest.mark.parametrize("times", [3, 4])
def test_a_trial_whose_checkpoint_is_damaged_each_time_fails_and_no_other_does(home: Home, times: int) -> None:
    study = make_study()
    run(home, study, fake_work(damaging(cut, at=2, times=times)))
    failed = [trial for trial in records_of(home, study).trials if trial.state == FAILED]
    assert len(failed) == (1 if times == 4 else 0)
    for trial in failed:
        assert trial.reason.startswith("its checkpoint was damaged again after it was made anew 3 times: ")


def test_a_trial_that_diverges_where_it_did_not_before_fails_with_both_reasons(home: Home) -> None:
    study = make_study()
    spoiled = damaging(cut, at=2)

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if (unit.start, unit.stop) == (0, 2):
            return tuple(diverged(unit, trial) for trial in unit.trials)
        return spoiled(unit)

    run(home, study, fake_work(train))
    (failed,) = [trial for trial in records_of(home, study).trials if trial.state == FAILED]
    assert "weights.safetensors is not what was written" in failed.reason
    assert failed.reason.endswith("; trained anew it diverged at step 1")


def test_want_of_memory_during_a_rebuild_ends_its_trial_alone(home: Home) -> None:
    study = make_study()
    spoiled = damaging(cut, at=2)

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if (unit.start, unit.stop) == (0, 2):
            raise MemoryError("no room")
        return spoiled(unit)

    run(home, study, fake_work(train), InlineExecutor())
    assert [t.state for t in records_of(home, study).trials].count("infeasible") == 1


def test_the_late_result_of_a_worker_believed_dead_is_not_taken_for_the_one_that_counts(home: Home, done: Home) -> None:
    """Every rung is written once more by somebody whom nobody listens to any more, before, and after it counts."""
    study = make_study()

    def train(unit: Unit) -> tuple[Measurement, ...]:
        for trial in unit.trials:
            measure(unit, trial)
        found = train_rung(unit)
        for trial in unit.trials:
            measure(replace(unit, stop=unit.stop + 1), trial)
        return found

    run(home, study, fake_work(train))
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))
    named = {t.last.checkpoint for t in records_of(home, study).trials if t.last}
    assert {f"checkpoints/{folder.name}" for folder in home.root.rglob("checkpoints/*")} <= named
