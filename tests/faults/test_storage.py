"""Optuna's storage on a server that goes away, or is not what the study file says: the journals lose nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_sweep
import optuna
import psycopg
import pytest
from driving import Threads, journal_view, optuna_view, records_of, undisturbed
from fake_sweep import Options
from fakes import fake_work, make_study, train_rung
from postgres import PASSWORD, Postgres
from postgres import database as database
from postgres import postgres as postgres
from proxy import LOSE_ANSWER, LOSE_QUESTION, PASS, wire

from sweep.driver.driver import StorageError, run_study
from sweep.driver.opening import open_storage
from sweep.driver.patience import PATIENCE_S, Patience
from sweep.execution.executor import InlineExecutor
from sweep.study.file import dump_study
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit

STUDY = make_study()
NOTHING = "nothing"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


def run(home: Home, url: str, work: Any = None, executor: Any = None, patience: float = 60) -> list[str]:
    """Run the study; returns what was said."""
    said: list[str] = []
    run_study(
        STUDY,
        home.study("fake"),
        executor or InlineExecutor(),
        url,
        home.cache,
        work or fake_work(),
        lambda progress: said.append(progress.message),
        patience,
    )
    return said


def at_unit(nth: int, act: Callable[[], Any]) -> Any:
    """Work whose nth unit does something first."""
    units = iter(range(10**6))

    def train(unit: Unit) -> tuple[Measurement, ...]:
        if next(units) == nth:
            act()
        return train_rung(unit)

    return fake_work(train)


def check_undisturbed(home: Home, url: str, done: Home) -> None:
    assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))
    assert optuna_view(trials_in(url)) == optuna_view(trials_in(done.optuna_url))


def trials_in(url: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(url)
    try:
        return optuna.load_study(study_name="fake", storage=storage).trials
    finally:
        storage.engine.dispose()


def check_one_line(error: BaseException | str, *says: str) -> None:
    text = str(error)
    assert all(words in text for words in says), text
    assert "\n" not in text and PASSWORD not in text and "Traceback" not in text


def test_a_study_on_postgresql_is_the_one_on_sqlite(home: Home, done: Home, database: str) -> None:
    run(home, database)
    check_undisturbed(home, database, done)


class TestPostgresAway:
    @pytest.mark.fault(
        case="PostgreSQL restarted while a study runs, in turn in order and at once",
        happens="calls to it are tried again; the study goes on where it was",
        lost=NOTHING,
    )
    def test_restarts_while_the_study_runs_change_nothing(
        self, home: Home, done: Home, database: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
    ) -> None:
        over, trained, restarts, delay = threading.Event(), threading.Event(), [], random.Random(0)

        def restart_often() -> None:
            for number in (signal.SIGINT, signal.SIGQUIT) * 3:
                trained.clear()
                while not trained.wait(0.1):  # it is in use again
                    if over.is_set():
                        return
                if over.wait(delay.uniform(0, 0.1)):
                    return
                postgres.restart(number)
                restarts.append(number)

        def slowly(unit: Unit) -> tuple[Measurement, ...]:
            trained.set()
            time.sleep(0.03)
            return train_rung(unit)

        thread = threading.Thread(target=restart_often)
        thread.start()
        try:
            said = run(home, database, fake_work(slowly))
        finally:
            over.set()
            thread.join()
        assert len(restarts) >= 3 and not caplog.records, "no library prints over the live table"
        assert any("is tried again" in line for line in said) and any("answers again" in line for line in said)
        check_undisturbed(home, database, done)

    @pytest.mark.fault(
        case="the connection to PostgreSQL is lost at a COMMIT: before it arrives, or before its answer does",
        happens="the call is made again; a trial that was created all the same is found, and not created twice",
        lost=NOTHING,
    )
    @pytest.mark.parametrize("fates", [(LOSE_ANSWER,), (LOSE_QUESTION, PASS, LOSE_ANSWER)])
    def test_a_lost_answer_creates_no_second_trial(
        self, home: Home, done: Home, database: str, postgres: Postgres, fates: tuple[str, ...]
    ) -> None:
        cut, chance = [], random.Random(0)

        def judge(commit: int) -> str:
            if chance.random() > 0.12:
                return PASS
            cut.append(commit)
            return fates[len(cut) % len(fates)]

        with wire(postgres.port, judge) as port:
            run(home, database.replace(f":{postgres.port}/", f":{port}/"))
        assert len(cut) > 10
        check_undisturbed(home, database, done)

    @pytest.mark.fault(
        case="PostgreSQL stopped for longer than a call waits (a minute)",
        happens="packs in training end and reach the journal, then one line, exit 1; once the server is back the same "
        "command goes on",
        lost=NOTHING,
    )
    @pytest.mark.parametrize("slots", [1, 3])
    def test_what_is_in_training_when_it_goes_away_reaches_the_journal(
        self, home: Home, done: Home, database: str, postgres: Postgres, slots: int
    ) -> None:
        trained: list[tuple[int, int]] = []

        def train(unit: Unit) -> tuple[Measurement, ...]:
            if unit.stop == 2 and postgres.process is not None and postgres.process.poll() is None:
                postgres.stop()
            found = train_rung(unit)
            trained.extend((trial.number, unit.stop) for trial in unit.trials)
            return found

        try:
            with Threads(slots) as executor, pytest.raises(StorageError) as caught:
                run(home, database, fake_work(train), executor, patience=0.5)
        finally:
            postgres.start()
        check_one_line(caught.value, "does not answer", "the same command goes on")
        assert PATIENCE_S == 60, "the minute of the row, which is not waited for here"
        kept = [(t.spec.number, r.measurement.stop) for t in records_of(home, STUDY).trials for r in t.rungs]
        assert sorted(kept) == sorted(trained)
        run(home, database)
        check_undisturbed(home, database, done)

    def test_the_command_says_so_in_one_line_and_goes_on_later(
        self, tmp_path: Path, home: Home, done: Home, database: str, postgres: Postgres
    ) -> None:
        words = command(tmp_path, home, database)
        process = fake_sweep.start({"seconds": 0.1, "patience": 1}, *words, cwd=tmp_path)
        try:
            wait_for_rungs(home, 6, process)
            postgres.stop()
            code, output = fake_sweep.finish(process)
        finally:
            if postgres.process is not None and postgres.process.poll() is not None:
                postgres.start()
        assert code == 1, output
        check_one_line(output.splitlines()[-1], "does not answer", "the same command goes on")
        assert PASSWORD not in output and "Traceback" not in output
        code, output = fake_sweep.run({}, *words, cwd=tmp_path)
        assert code == 0 and PASSWORD not in output, output
        check_undisturbed(home, database, done)

    def test_ctrl_c_ends_the_wait_at_once(self, tmp_path: Path, home: Home, database: str, postgres: Postgres) -> None:
        slowly: Options = {"seconds": 0.1, "patience": 7200, "pause": 3600}
        process = fake_sweep.start(slowly, *command(tmp_path, home, database), cwd=tmp_path)
        try:
            wait_for_rungs(home, 3, process)
            postgres.stop()
            assert process.stdout is not None
            while "is tried again" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            code, output = fake_sweep.finish(process, timeout_s=30)
        finally:
            postgres.start()
        assert code == 130 and "Traceback" not in output, output


def command(folder: Path, home: Home, url: str) -> list[str]:
    (folder / "fake.yaml").write_text(dump_study(STUDY))
    return ["run", "fake.yaml", "--home", str(home.root), "--set", f"storage={url}"]


def wait_for_rungs(home: Home, rungs: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while sum(len(trial.rungs) for trial in records_of(home, STUDY).trials) < rungs:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


class TestWrongSettings:
    @pytest.mark.parametrize(
        ("password", "name", "says"),
        [("wr0ng-secret", "optuna0", "password authentication failed"), (PASSWORD, "nowhere", "does not exist")],
    )
    def test_what_waiting_does_not_mend_is_told_at_once(
        self, postgres: Postgres, database: str, password: str, name: str, says: str
    ) -> None:
        said: list[str] = []
        with pytest.raises(StorageError) as caught:
            open_storage(Patience(postgres.url(name, password), 600, said.append))
        check_one_line(caught.value, says)
        assert password not in str(caught.value) and not said

    @pytest.mark.fault(
        case="PostgreSQL has no free connection",
        happens="the study waits for one, for a minute; then one line, exit 1",
        lost=NOTHING,
    )
    def test_a_free_connection_is_waited_for(self, postgres: Postgres, database: str, home: Home, done: Home) -> None:
        def take_all() -> Iterator[psycopg.Connection[Any]]:
            while True:
                try:
                    yield psycopg.connect(database)
                except psycopg.OperationalError:
                    return

        taken = list(take_all())
        try:
            with pytest.raises(StorageError) as caught:
                run(home, database, patience=0.5)
            check_one_line(caught.value, "too many clients")
            assert PATIENCE_S == 60, "the minute of the row, which is not waited for here"

            threading.Timer(1.0, lambda: [connection.close() for connection in taken]).start()
            said = run(home, database)
        finally:
            for connection in taken:
                connection.close()
        assert any("too many clients" in line for line in said)
        check_undisturbed(home, database, done)

    def test_a_missing_package_is_named(self, tmp_path: Path, home: Home) -> None:
        words = command(tmp_path, home, f"postgresql://me:{PASSWORD}@127.0.0.1/x")
        code, output = fake_sweep.run({"without": "psycopg"}, *words, cwd=tmp_path)
        assert code == 1
        check_one_line(output.splitlines()[-1], "pip install 'lora-sweep[postgres]'")
