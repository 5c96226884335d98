"""One asker, one question, and progress that is right at every moment."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from driving import records_of, run, undisturbed
from fakes import fake_work, make_study, train_rung

from sweep.driver.driver import Busy, Progress, QuestionChanged, StorageError, run_study
from sweep.driver.opening import open_storage
from sweep.driver.patience import Patience
from sweep.execution.executor import InlineExecutor
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


class TestOneAskerOneQuestion:
    def test_a_second_driver_is_refused_and_told_who_holds_the_study(self, home: Home) -> None:
        study, errors = make_study(), []

        def train(unit: Unit) -> tuple[Measurement, ...]:
            try:
                run(home, study)
            except Busy as error:
                errors.append(str(error))
            return train_rung(unit)

        run(home, study, fake_work(train))
        assert errors and all(f"process {os.getpid()}" in error for error in errors)
        assert records_of(home, study).finished_at

    def test_another_question_under_a_name_that_has_run_is_refused_and_nothing_is_touched(self, home: Home) -> None:
        run(home, make_study())
        before = contents(home)
        with pytest.raises(QuestionChanged) as caught:
            run(home, make_study(train={"steps": 4, "batch_size": 2}))
        assert any("batch_size" in line for line in caught.value.diff)
        assert contents(home) == before

    def test_the_storage_may_move_without_changing_the_question(self, home: Home) -> None:
        run(home, make_study())
        run(home, make_study(storage="sqlite:///elsewhere.db"))

    def test_a_finished_study_stays_as_it_is_to_the_byte(self, done: Home) -> None:
        study = make_study()
        before = contents(done)
        heard = run(done, study)
        assert contents(done) == before
        assert [(p.phase, p.done, p.total) for p in heard] == [("done", 21, 21)]

    def test_a_storage_with_another_question_of_this_name_is_refused(self, home: Home, tmp_path: Path) -> None:
        run(home, make_study())
        elsewhere = Home(tmp_path / "elsewhere")
        with pytest.raises(QuestionChanged):
            run(elsewhere, make_study(train={"steps": 4, "batch_size": 2}), url=home.optuna_url)
        with pytest.raises(StorageError, match="another home began"):
            run(elsewhere, make_study(), url=home.optuna_url)

    def test_somebody_elses_optuna_study_of_this_name_is_refused(self, home: Home) -> None:
        home.root.mkdir()
        optuna.create_study(study_name="fake", storage=home.optuna_url).optimize(lambda t: 0.0, n_trials=1)
        with pytest.raises(QuestionChanged):
            run(home, make_study())

    def test_a_home_that_cannot_be_written_is_named_in_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"file.*cannot be written") as caught:
            run(Home(tmp_path / "file"), make_study())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("url", ["postgresql://me:s3cret@127.0.0.1:1/x", "nonsense://me:s3cret@host/x", "s3cret"])
    def test_a_storage_that_cannot_be_opened_is_told_without_its_password(self, url: str) -> None:
        with pytest.raises(StorageError) as caught:
            open_storage(Patience(url, 0))
        assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def contents(home: Home) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(home.root.rglob("*")) if p.is_file()}


class TestProgress:
    def check(self, heard: list[Progress]) -> None:
        for p in heard:
            assert p.pruned + p.diverged + p.failed <= p.done <= p.total
            assert p.done + p.running <= p.total
            assert 0 <= p.steps_done <= p.steps_total
        assert [p.done for p in heard] == sorted(p.done for p in heard)
        assert heard[-1].phase == "done" and heard[-1].running == 0
        assert heard[-1].steps_done == heard[-1].steps_total
        assert heard[-1].done == heard[-1].total

    def test_it_is_right_from_the_start_when_nothing_goes_wrong(self, home: Home) -> None:
        heard = run(home, make_study())
        self.check(heard)
        # Search: 2 ranks × (6 + 3 + 2·2), full 3 + 2 + 1·2; confirm: 3 finalists × 2 seeds × 4.
        assert {p.steps_total for p in heard} == {2 * 13 + 7 + 24}
        assert {p.total for p in heard} == {21}
        assert (heard[-1].best_arm, heard[-1].best_rate, heard[-1].best_loss) == ("full", 1e-4, 0.25)
        assert heard[-1].seconds_left == 0

    def test_it_is_right_after_the_study_was_taken_up(self, home: Home) -> None:
        study, trained = make_study(), 0

        def train(unit: Unit) -> tuple[Measurement, ...]:
            nonlocal trained
            trained += 1
            if trained > 9:
                raise KeyboardInterrupt
            return train_rung(unit)

        before: list[Progress] = []
        with pytest.raises(KeyboardInterrupt):
            run_study(
                study,
                home.study("fake"),
                InlineExecutor(),
                home.optuna_url,
                home.cache,
                fake_work(train),
                before.append,
            )
        after = run(home, study)
        self.check(after)
        assert before[-1].steps_done == after[0].steps_done
        assert before[-1].steps_total == after[0].steps_total
        assert (before[-1].done, before[-1].pruned, before[-1].best_loss) == (
            after[0].done,
            after[0].pruned,
            after[0].best_loss,
        )
