"""The thread that projects into MLflow: sparing while training runs, then as fast as MLflow takes it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import journals
import mlflow
import pytest
from servers import free_port
from tracked import home as home
from tracked import new_database as new_database
from tracked import view

from sweep.study.home import Home
from sweep.study.records import SEARCH
from sweep.study.schema import Study
from sweep.tracking.journal import append, read_study_record
from sweep.tracking.mlflow import Projector, Tracking, find_tracking, project


@pytest.fixture
def study() -> Study:
    return journals.sample_study()


def test_the_thread_projects_while_the_study_runs_and_at_its_end(
    home: Home, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.tracking.mlflow.EVERY_S", 0.05)
    folder = journals.start_journal(home, study)
    journals.write_search(folder, study)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    client, deadline = mlflow.MlflowClient(home.mlflow_url), time.monotonic() + 30
    while not _count_runs(client, study) > 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert view(find_tracking(home), study).parent.info.status == "RUNNING"
    journals.write_confirm(folder, study)
    append(folder.journal, "finished")
    assert projector.finish(60, **journals.write_results(tmp_path)) is None
    held = view(find_tracking(home), study)
    assert len(held.children) == len(read_study_record(folder).trials)
    assert held.parent.info.status == "FINISHED"
    assert "report/report.html" in held.files


def test_a_study_whose_journal_lost_the_line_on_model_and_data_is_projected(home: Home, study: Study) -> None:
    folder = journals.whole_study(home, study)
    lines = folder.journal.read_text().splitlines(keepends=True)
    (line,) = [line for line in lines if '"event": "prepared"' in line]
    folder.second_journal.write_text(line)
    folder.journal.write_text("".join(lines).replace(line, ""))
    project(study, folder, find_tracking(home))
    assert len(view(find_tracking(home), study).children) == len(read_study_record(folder).trials)


def test_of_a_study_whose_journal_is_empty_nothing_is_projected(home: Home, study: Study) -> None:
    folder = journals.whole_study(home, study)
    folder.second_journal.write_text(folder.journal.read_text())
    folder.journal.write_text("")
    project(study, folder, find_tracking(home))
    assert mlflow.MlflowClient(find_tracking(home).uri).get_experiment_by_name(study.name) is None


def _count_runs(client: mlflow.MlflowClient, study: Study) -> int:
    experiment = client.get_experiment_by_name(study.name)
    return len(client.search_runs([experiment.experiment_id])) if experiment else 0


def test_a_server_that_is_down_gives_a_warning_in_time(home: Home, study: Study) -> None:
    folder = journals.whole_study(home, study)
    projector = Projector(study, folder, Tracking(f"http://someone:hunter2@127.0.0.1:{free_port()}", None))
    projector.start()
    began = time.monotonic()
    warning = projector.finish(10)
    assert time.monotonic() - began < 11
    assert warning is not None and "hunter2" not in warning and "\n" not in warning
    assert "http://127.0.0.1:" in warning and "the same `sweep run` command" in warning
    assert "(Connection refused)" in warning


def test_a_server_that_never_answers_gives_a_warning_in_time(home: Home, study: Study) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        folder = journals.whole_study(home, study)
        projector = Projector(study, folder, Tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", None))
        projector.start()
        began = time.monotonic()
        warning = projector.finish(1)
        assert time.monotonic() - began < 2
        assert warning is not None and "it took nothing for 1 s" in warning


def test_once_training_is_over_the_rest_is_sent_in_one_go(
    home: Home, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.tracking.mlflow.EVERY_S", 0.05)
    monkeypatch.setattr("sweep.tracking.mlflow.AT_ONCE_S", 0.0)  # one trial a time, and then a pause
    folder = journals.whole_study(home, study)
    sent, real = threading.Event(), mlflow.MlflowClient.log_batch

    def slow(self: Any, *args: Any, **values: Any) -> None:
        real(self, *args, **values)
        time.sleep(0.2)
        sent.set()

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", slow)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    assert sent.wait(60)
    monkeypatch.setattr("sweep.tracking.mlflow.EVERY_S", 3600.0)  # the first go after `hasten` must be the only one
    projector.hasten()
    deadline = time.monotonic() + 60
    while view(find_tracking(home), study).parent.info.status != "FINISHED" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(view(find_tracking(home), study).children) == len(read_study_record(folder).trials)
    projector.stop(30)


def test_what_is_sent_slowly_is_waited_for_longer_than_what_stands_still(
    home: Home, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, patience = journals.whole_study(home, study), 3.0
    trials = len(read_study_record(folder).trials)
    real, goes_on = mlflow.MlflowClient.log_batch, threading.Event()

    def slow(self: Any, *args: Any, **values: Any) -> None:
        time.sleep(2 * patience / trials)
        real(self, *args, **values)

    def stuck(self: Any, *args: Any, **values: Any) -> None:
        goes_on.wait(60)
        real(self, *args, **values)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", slow)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    began = time.monotonic()
    assert projector.finish(patience) is None
    assert time.monotonic() - began > patience
    assert len(view(find_tracking(home), study).children) == trials

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", stuck)
    journals.ask(folder, study.list_arms()[0], 0.02, 7, SEARCH)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    began = time.monotonic()
    warning = projector.finish(patience)
    assert patience < time.monotonic() - began < 3 * patience
    assert warning is not None and "it took nothing for 3 s" in warning
    goes_on.set()
    projector.stop(60)


def test_an_interrupt_waits_no_longer_than_it_says_for_what_is_still_sent(
    home: Home, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = journals.whole_study(home, study), mlflow.MlflowClient.log_batch

    def slow(self: Any, *args: Any, **values: Any) -> None:
        real(self, *args, **values)
        time.sleep(0.3)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", slow)
    projector = Projector(study, folder, find_tracking(home))
    projector.start()
    began = time.monotonic()
    projector.stop(1)
    assert time.monotonic() - began < 2
    projector.stop(60)
