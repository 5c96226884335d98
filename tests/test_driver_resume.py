"""The driver may be killed anywhere: the same command takes the study up, and nothing is lost or doubled."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fakes
import optuna
import pytest
from driving import Killed, journal_view, optuna_view, records_of, run, trials_of, undisturbed
from fakes import fake_work, make_study, train_rung
from optuna.trial import TrialState

from sweep.driver import beginning
from sweep.driver.driver import StorageError
from sweep.study.home import Home, StudyFolder
from sweep.study.records import COMPLETE, PRUNED, Measurement, Unit
from sweep.study.schema import Study
from sweep.tracking import lines


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


SMALL = {
    "arms": {"rank": [2, 8], "alpha_ratio": [1.0], "full_finetuning": True},
    "tune": {"learning_rate": [1e-2, 3e-2], "full_finetuning": {"learning_rate": [1e-4, 3e-4]}},
    "train": {"steps": 2, "batch_size": 1},
    "search": {"rungs": [1, 2], "keep": 0.5, "seed": 0},
    "confirm": {"seeds": [1], "reference": 8, "epsilon": 0.05},
}


class Switch:
    """Counts the points at which a kill would tell, and kills at one of them."""

    def __init__(self, kill_at: int | None = None):
        self.kill_at, self.points = kill_at, 0

    def reached(self) -> bool:
        self.points += 1
        return self.points - 1 == self.kill_at


def run_with_kill(
    monkeypatch: pytest.MonkeyPatch, home: Home, study: Study, storage: Any, switch: Switch, torn: bool
) -> None:
    """A run that is killed before a journal's append, an Optuna write, a rung or a removal; or inside an append."""
    with monkeypatch.context() as patch:

        def guard(owner: Any, name: str) -> None:
            inner = getattr(owner, name)

            def guarded(*args: Any, **values: Any) -> Any:
                if switch.reached():
                    raise Killed
                return inner(*args, **values)

            patch.setattr(owner, name, guarded)

        def append(path: Path, line: bytes) -> None:
            if switch.reached():
                if torn:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "ab") as file:
                        file.write(line[:40])
                raise Killed
            real_append(path, line)

        real_append = lines._append
        patch.setattr(lines, "_append", append)
        if not torn:
            for name in (
                "create_new_trial",
                "set_study_user_attr",
                "set_trial_intermediate_value",
                "set_trial_user_attr",
                "set_trial_state_values",
            ):
                guard(storage, name)
            guard(sys.modules["sweep.driver.checkpoints"], "remove_others")
            work = fake_work()
            guard(fakes, "train_rung")
            work = fake_work(fakes.train_rung)
        else:
            work = fake_work()
        patch.setattr(beginning, "open_storage", lambda patience: storage)
        run(home, study, work)


@pytest.mark.parametrize(
    "torn",
    [pytest.param(False, marks=pytest.mark.slow, id="between writes"), pytest.param(True, id="inside an append")],
)
def test_a_kill_anywhere_loses_doubles_and_leaves_running_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    study = make_study(**SMALL)

    def view(home: Home, storage: Any) -> Any:
        trials = optuna.load_study(study_name="fake", storage=storage).trials
        return journal_view(records_of(home, study)), optuna_view(trials), sorted(files_of(home))

    undisturbed, storage, counter = Home(tmp_path / "undisturbed"), optuna.storages.InMemoryStorage(), Switch()
    run_with_kill(monkeypatch, undisturbed, study, storage, counter, torn)
    expected = view(undisturbed, storage)
    assert counter.points > 30
    for point in range(counter.points):
        home, storage = Home(tmp_path / str(point)), optuna.storages.InMemoryStorage()
        with pytest.raises(Killed):
            run_with_kill(monkeypatch, home, study, storage, Switch(point), torn)
        run_with_kill(monkeypatch, home, study, storage, Switch(), torn=False)
        assert view(home, storage) == expected, f"killed at point {point}"


def files_of(home: Home) -> list[str]:
    """Paths, a checkpoint's folder without the part of its name that is another each time."""
    paths = [str(p.relative_to(home.root)) for p in home.root.rglob("*") if p.is_file()]
    return [re.sub(r"(/checkpoints/\d+)-[0-9a-f]{8}/", r"\1/", path) for path in paths]


def test_a_kill_in_the_first_session_and_again_in_the_second_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(**SMALL)
    undisturbed, storage = Home(tmp_path / "undisturbed"), optuna.storages.InMemoryStorage()
    run_with_kill(monkeypatch, undisturbed, study, storage, Switch(), torn=False)
    home, storage = Home(tmp_path / "home"), optuna.storages.InMemoryStorage()
    sessions = 0
    while not records_of(home, study).finished_at:
        sessions += 1
        try:  # every session is killed a little later than the one before
            run_with_kill(monkeypatch, home, study, storage, Switch(3 + sessions), torn=False)
        except Killed:
            continue
    assert sessions > 5
    assert journal_view(records_of(home, study)) == journal_view(records_of(undisturbed, study))


DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from fakes import fake_work, make_study, train_rung
from sweep.driver.driver import run_study
from sweep.execution.executor import InlineExecutor
from sweep.study.home import Home
def train(unit):
    time.sleep(0.03)
    return train_rung(unit)
home = Home(Path({home!r}))
run_study(make_study(), home.study("fake"), InlineExecutor(), home.optuna_url, home.cache, fake_work(train))
"""


def test_kill_9_of_the_driver_and_the_same_command_again_complete_the_study(home: Home, done: Home) -> None:
    study = make_study()
    code = DRIVER.format(tests=str(Path(__file__).parent), home=str(home.root))
    folder = home.study("fake")
    for rungs in (3, 15, 25):
        driver = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 60
        while rungs_on_disk(folder) < rungs and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert driver.poll() is None, "the driver should still be at work"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    run(home, study)
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(done, study))
    assert len(records_of(home, study).sessions) == 4


def rungs_on_disk(folder: StudyFolder) -> int:
    return sum(p.read_bytes().count(b'"event": "rung"') for p in folder.trials.glob("*/journal.jsonl"))


class TestLostParts:
    def interrupted(self, home: Home, study: Study, rungs: int = 12) -> None:
        trained = 0

        def train(unit: Unit) -> tuple[Measurement, ...]:
            nonlocal trained
            trained += 1
            if trained > rungs:
                raise Killed
            return train_rung(unit)

        with pytest.raises(Killed):
            run(home, study, fake_work(train))

    def test_a_lost_optuna_database_is_rebuilt_from_the_journals(self, home: Home, done: Home) -> None:
        study = make_study()
        self.interrupted(home, study)
        (home.root / "optuna.db").unlink()
        run(home, study)
        assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))
        assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(done, study))

    def test_a_database_of_other_trials_is_refused_in_one_line(self, home: Home) -> None:
        study = make_study()
        self.interrupted(home, study)
        (home.study("fake").trial(0) / "journal.jsonl").unlink()
        (home.root / "optuna.db").unlink()
        with pytest.raises(StorageError, match="different trials") as caught:
            run(home, study)
        assert "\n" not in str(caught.value)

    def test_a_trial_whose_folder_was_removed_is_trained_again(self, home: Home) -> None:
        study = make_study()
        self.interrupted(home, study)
        ended = next(t for t in records_of(home, study).trials if t.state == PRUNED)
        (Path(ended.spec.folder) / "journal.jsonl").unlink()
        run(home, study)
        record = records_of(home, study)
        assert record.finished_at
        assert any(f"trial {ended.spec.number} has no journal" in warning for warning in record.warnings)
        search = Counter(t.spec.arm.name for t in record.trials if t.spec.phase == "search")
        assert search == {a.name: 3 for a in study.list_arms()}

    def test_a_trial_that_somebody_ended_in_optuna_goes_on(self, home: Home) -> None:
        study = make_study()
        self.interrupted(home, study)
        live = next(t for t in records_of(home, study).trials if t.state is None)
        optuna.load_study(study_name="fake", storage=home.optuna_url).tell(live.spec.number, state=TrialState.FAIL)
        run(home, study)
        assert all(t.state in (COMPLETE, PRUNED) for t in records_of(home, study).trials)
