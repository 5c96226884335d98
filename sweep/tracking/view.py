"""What MLflow holds of one study, and sending it what is new.

Runs are found again by their tags and metrics carry the journal's times, so that projecting twice, or after a crash
half way, doubles nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.study.file import dump_study
from sweep.study.home import StudyFolder
from sweep.study.records import FAILED
from sweep.study.schema import Study
from sweep.tracking import saved_view
from sweep.tracking.connection import Tracking, without_credentials
from sweep.tracking.entities import (
    COSTS,
    STATUS,
    cost_metrics,
    count_trials,
    data_input,
    experiment_note,
    headline,
    ms,
    outcome_note,
    run_name,
    study_params,
    trial_metrics,
    trial_params,
)
from sweep.tracking.journal import StudyRecord, TrialRecord, read_study_record
from sweep.tracking.models import log_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BATCH = 900  # metrics a call; MLflow refuses more than 1000 entities
# Ours: the parent is found by study and start, a child by its trial; the others say how far the projection got.
STUDY, STARTED, TRIAL, STATE, REASON = "sweep.study", "sweep.started", "sweep.trial", "sweep.state", "sweep.reason"
POINTS, PROJECTED, OUTCOME = "sweep.points", "sweep.projected", "sweep.outcome"
FIGURES = ("loss-by-rank", "pareto")  # of the report, that the parent run's description shows
PARENT, NOTE, SOURCE = "mlflow.parentRunId", "mlflow.note.content", "mlflow.source.name"


@dataclass(frozen=True)
class Outcome:
    report: Path | None = None
    adapter: Path | None = None
    recommendation: str = ""  # Markdown


@dataclass
class Child:
    """What MLflow holds of one trial."""

    run_id: str
    state: str | None = None
    status: str = "RUNNING"
    points: int = 0  # of the trial's metrics, in their order
    described: bool = False  # has its params
    costed: bool = False


@dataclass
class View:
    """What MLflow holds of one study; remembered between projections so that each sends only what is new."""

    client: MlflowClient
    experiment_id: str
    parent_id: str
    status: str
    params: set[str]
    tags: dict[str, str]
    has_data: bool
    projected: str  # fingerprint of the journal that MLflow agrees with
    children: dict[int, Child] | None = None  # None: not looked up yet
    moved: Callable[[], None] = lambda: None  # called when MLflow has taken a part of what is sent


def open_view(
    client: MlflowClient,
    study: Study,
    started: float,
    tracking: Tracking,
    moved: Callable[[], None] = lambda: None,
) -> View:
    """Find the study's experiment and parent run, or make them."""
    experiment = client.get_experiment_by_name(study.name)
    if experiment is None:
        artifacts = Path(tracking.artifacts, study.name).as_uri() if tracking.artifacts else None
        experiment_id = client.create_experiment(study.name, artifact_location=artifacts, tags={NOTE: headline(study)})
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment_id)
    if not experiment or saved_view.TAG not in experiment.tags:  # one that somebody changed by hand stays
        client.set_experiment_tag(experiment_id, saved_view.TAG, saved_view.saved_view(study, ms(started)))
    # The start tells apart studies of one name from different homes on one server.
    ours = f"tags.`{STUDY}` = '{study.name}' AND tags.`{STARTED}` = '{started!r}'"
    found = _search(client, experiment_id, ours)
    if found:
        run = found[0]
    else:
        tags = {STUDY: study.name, STARTED: repr(started), SOURCE: "sweep run", NOTE: headline(study)}
        run = client.create_run(experiment_id, ms(started), tags, f"{study.name} (study)")
    tags = dict(run.data.tags)
    has_data = bool(run.inputs and run.inputs.dataset_inputs)
    projected, params = tags.get(PROJECTED, ""), set(run.data.params)
    place = client, experiment_id, run.info.run_id
    return View(*place, run.info.status, params, tags, has_data, projected, moved=moved)


def update(view: View, study: Study, folder: StudyFolder, outcome: Outcome, seconds: float = math.inf) -> None:
    """Send what the journal and the outcome have and MLflow does not.

    seconds: of this thread's CPU time for sending trials; once they are over the rest is left for the next time.
    """
    journal = _journal_fingerprint(folder)  # before reading: what is written meanwhile is for the next time
    told = _outcome_fingerprint(outcome) if outcome != Outcome() else view.tags.get(OUTCOME)
    if view.projected == journal and view.tags.get(OUTCOME) == told:
        return
    if view.children is None:
        view.children = find_children(view)
    view.moved()
    record = read_study_record(folder)
    _describe_parent(view, study, record)
    sending = 0.0
    for trial in record.trials:
        began = time.thread_time()
        if _project_trial(view, view.children, trial, record):
            sending += time.thread_time() - began
        if sending > seconds:
            return
    if view.tags.get(OUTCOME) != told:
        _log_outcome(view, study, outcome, str(told))
    _end_parent(view, record, journal, outcome)
    view.projected = journal


def find_children(view: View) -> dict[int, Child]:
    """The trials' runs, by the trial's number."""
    children: dict[int, Child] = {}
    for run in _search(view.client, view.experiment_id, f"tags.`{PARENT}` = '{view.parent_id}'"):
        tags = run.data.tags
        if not tags.get(TRIAL, "").isdecimal():  # made by hand: none of ours
            continue
        number = int(tags[TRIAL])
        if number in children:  # a request that timed out was carried out all the same; into MLflow's trash
            view.client.delete_run(run.info.run_id)
            continue
        costed = COSTS[0] in run.data.metrics
        points = int(tags.get(POINTS, 0))
        children[number] = Child(
            run.info.run_id, tags.get(STATE), run.info.status, points, bool(run.data.params), costed
        )
    return children


def _search(client: MlflowClient, experiment_id: str, condition: str) -> list[Run]:
    """All runs, oldest first."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _describe_parent(view: View, study: Study, record: StudyRecord) -> None:
    from mlflow.entities import RunTag

    missing = [param for param in study_params(study) if param.key not in view.params]
    tags = {"sweep.trials": count_trials(record)}
    if record.prepared:  # a resumed study may find another machine, and a param can never change: tags
        tags |= {"sweep.device": record.prepared.device, "sweep.precision": record.prepared.precision}
    changed = {key: value for key, value in tags.items() if view.tags.get(key) != value}
    if missing:
        # Where Optuna's storage lies is no part of the question, and its URL may hold a password.
        asked = dump_study(study.model_copy(update={"storage": None}))
        view.client.log_text(view.parent_id, without_credentials(asked), "study.yaml")
    if missing or changed:
        view.client.log_batch(view.parent_id, params=missing, tags=[RunTag(k, v) for k, v in changed.items()])
        view.params |= {param.key for param in missing}
        view.tags |= changed
    if record.prepared and not view.has_data:
        view.client.log_inputs(view.parent_id, datasets=[data_input(study, record.prepared)])
        view.has_data = True


def _project_trial(view: View, children: dict[int, Child], trial: TrialRecord, record: StudyRecord) -> bool:
    """Send what is new of a trial; whether there was any."""
    from mlflow.entities import RunTag

    spec, client = trial.spec, view.client
    state, reason = trial.state or "running", trial.reason
    if trial.state is None and record.finished_at:
        state, reason = FAILED, "the study ended without it"
    child = children.get(spec.number)
    if child is None:
        tags = {PARENT: view.parent_id, TRIAL: str(spec.number), SOURCE: "sweep run"}
        run = client.create_run(view.experiment_id, ms(trial.asked_at), tags, run_name(spec))
        child = children[spec.number] = Child(run.info.run_id)
    fresh = trial_metrics(trial)[child.points :]
    cost = None if child.costed else record.costs.get(spec.arm.cost_key)
    status = STATUS.get(state, "RUNNING")
    if not fresh and not cost and child.described and (state, status) == (child.state, child.status):
        return False
    for start in range(0, max(1, len(fresh)), BATCH):
        batch = fresh[start : start + BATCH]
        sent = child.points + len(batch)
        tags = {POINTS: str(sent), STATE: state} | ({REASON: without_credentials(reason)} if reason else {})
        # MLflow writes the tags of a call last: the number of points acknowledges them.
        client.log_batch(
            child.run_id,
            metrics=batch + (cost_metrics(cost, trial) if cost and start == 0 else []),
            params=[] if child.described else trial_params(spec),
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        child.points, child.described = sent, True
        view.moved()
    child.state, child.costed = state, child.costed or cost is not None
    if status != child.status:
        _set_status(client, child.run_id, status, trial.ended_at or record.finished_at)
        child.status = status
    return True


def _log_outcome(view: View, study: Study, outcome: Outcome, told: str) -> None:
    for folder, name in ((outcome.report, "report"), (outcome.adapter, "adapter")):
        if folder:
            view.client.log_artifacts(view.parent_id, str(folder), name)
            view.moved()
    if outcome.adapter:
        log_model(view.client, view.experiment_id, view.parent_id, outcome.adapter)
        view.moved()
    if outcome.report:
        shown = [name for name in FIGURES if (outcome.report / "figures" / f"{name}.png").exists()]
        place = view.experiment_id, view.parent_id
        note = outcome_note(study, outcome.recommendation, *place, shown)
        view.client.set_tag(view.parent_id, NOTE, note)
        view.client.set_experiment_tag(view.experiment_id, NOTE, experiment_note(study, outcome.recommendation, *place))
    view.client.set_tag(view.parent_id, OUTCOME, told)
    view.tags[OUTCOME] = told


def _end_parent(view: View, record: StudyRecord, journal: str, outcome: Outcome) -> None:
    status = "FINISHED" if record.finished_at or outcome.report else "RUNNING"
    if status != view.status:
        last_event = record.sessions[-1][1] if record.sessions else None
        _set_status(view.client, view.parent_id, status, record.finished_at or last_event)
        view.status = status
    if record.finished_at:  # written last: it says that all the rest is there
        view.client.set_tag(view.parent_id, PROJECTED, journal)


def _set_status(client: MlflowClient, run_id: str, status: str, ended_at: float | None) -> None:
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status, ms(ended_at or time.time()))


def _journal_fingerprint(folder: StudyFolder) -> str:
    """Journals only grow: their sizes tell whether there is anything new."""
    journals = [folder.journal, *sorted(folder.trials.glob("*/journal.jsonl"))]
    return _digest([(str(path.relative_to(folder.path)), path.stat().st_size) for path in journals])


def _outcome_fingerprint(outcome: Outcome) -> str:
    files = []
    for folder in (outcome.report, outcome.adapter):
        for path in sorted(folder.rglob("*")) if folder else ():
            stat = path.stat()
            files.append((str(path), stat.st_size, stat.st_mtime_ns))
    return _digest([outcome.recommendation, files])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
