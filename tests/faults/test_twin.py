"""docker-compose.yml without containers: the quickstart over two Ray nodes, PostgreSQL and MLflow, one node killed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from commands import SWEEP
from compose_file import ROOT, SECRETS, resolved
from test_kill import SMALL
from tracked import view
from unboxed import Box, kill, processes_in, stop, unbox, up, with_command

from sweep.report.statistics import find
from sweep.study.file import read_study
from sweep.study.home import Home
from sweep.tracking.connection import Tracking
from sweep.tracking.journal import StudyRecord, read_study_record

QUICKSTART = "studies/quickstart.yaml"
EXACT = ("train.precision=float32",)  # bfloat16 rounds by how many trials share a pack


@pytest.fixture
def boxes() -> Iterator[dict[str, list[Box]]]:
    root = Path(tempfile.mkdtemp(prefix="twin", dir="/tmp"))  # a short name, open to PostgreSQL's user
    root.chmod(0o755)
    boxes = unbox(resolved(), root)
    try:
        yield boxes
    finally:
        for box in every(boxes):
            kill(box)
        shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [[w for s in SMALL for w in ("--set", s)], []], ids=["small", "whole"])
@pytest.mark.fault(
    case="a Ray node is killed while it trains, in the cluster of docker-compose.yml run without containers",
    happens="its unit is retried on the other node; the quickstart ends with the answer that one process finds",
    lost="nothing",
)
def test_the_cluster_of_the_compose_file_loses_a_node_and_finds_the_same_answer(
    boxes: dict[str, list[Box]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: Sequence[str]
) -> None:
    (driver,) = boxes["driver"]
    boxes["driver"] = [with_command(driver, *driver.words[len(driver.service["entrypoint"]) :], *sets)]
    first = up(boxes)
    (driver,), workers = boxes["driver"], boxes["ray-worker"]
    assert len(workers) == 2

    home = Home(Path(driver.env["SWEEP_HOME"]))
    lost = busy(workers, home, first["driver-1"])
    kill(lost)
    assert first["driver-1"].wait(900) == 0, driver.log.read_text()
    said = " ".join(driver.log.read_text().split())  # the console breaks its lines
    assert re.search(rf"was lost, and another tries again: [^:]*{re.escape(lost.address)}", said), said

    (left,) = [worker for worker in workers if worker is not lost]
    deadline = time.monotonic() + 30
    while titles(left, "ray::Actor"):
        assert time.monotonic() < deadline, f"the study is over, and {titles(left, 'ray::Actor')} still there"
        time.sleep(0.2)

    inline = tmp_path / "inline"
    subprocess.run([*SWEEP, "run", QUICKSTART, "--home", str(inline), *sets], cwd=ROOT, check=True)
    check_same_answer(home, Home(inline))
    monkeypatch.setenv("PGPASSWORD", driver.env["PGPASSWORD"])
    check_optuna(home, driver.env["SWEEP_STORAGE"])
    check_mlflow(home, driver.env["MLFLOW_TRACKING_URI"])
    check_no_secret_is_told(boxes)
    left_behind = {box.name: stop(box, first[box.name]) for box in reversed(every(boxes)) if box not in (driver, lost)}
    assert not any(left_behind.values()), left_behind


def every(boxes: Mapping[str, Sequence[Box]]) -> list[Box]:
    return [box for each in boxes.values() for box in each]


def busy(workers: Sequence[Box], home: Home, driver: subprocess.Popen[bytes]) -> Box:
    """A worker in the middle of a rung, once some rungs have ended and others are to come."""
    deadline = time.monotonic() + 300
    while True:
        ended = sum(len(trial.rungs) for trial in record_of(home).trials)
        if ended >= 4 and (training := [worker for worker in workers if titles(worker, "ray::Actor.run")]):
            return training[0]
        assert driver.poll() is None and time.monotonic() < deadline, "no worker was seen training"
        time.sleep(0.05)


def titles(box: Box, beginning: str) -> list[str]:
    """What the box's processes call themselves: Ray's say what they run."""
    found = []
    for process in processes_in(box):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith(beginning):
                found.append(title)
    return found


def record_of(home: Home) -> StudyRecord:
    return read_study_record(home.study("quickstart"))


def check_same_answer(found: Home, expected: Home) -> None:
    study = read_study(found.study("quickstart").study_file).study
    ours, theirs = record_of(found), record_of(expected)
    curves, undisturbed = curves_of(ours), curves_of(theirs)
    assert curves.keys() == undisturbed.keys() and len(curves) == len(ours.trials)
    for what, (state, curve) in undisturbed.items():
        assert curves[what][0] == state, what
        assert [step for step, _ in curves[what][1]] == [step for step, _ in curve], what
        assert [loss for _, loss in curves[what][1]] == pytest.approx([loss for _, loss in curve], rel=1e-3), what
    answers = [find(study, record) for record in (ours, theirs)]
    assert answers[0].recommended == answers[1].recommended is not None
    verdicts = [[(r.arm.name, r.learning_rate, r.verdict, r.full_verdict) for r in answer.arms] for answer in answers]
    assert verdicts[0] == verdicts[1] and len(verdicts[0]) == len(study.arms.rank) + 1


def curves_of(record: StudyRecord) -> dict[Any, tuple[str | None, list[tuple[int, float]]]]:
    """By what a trial is: numbers depend on which worker was free first."""
    return {
        (t.spec.phase, t.spec.arm.name, t.spec.learning_rate, t.spec.seed): (t.state, t.train_curve)
        for t in record.trials
    }


def check_optuna(home: Home, url: str) -> None:
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="quickstart", storage=storage).trials
    storage.engine.dispose()
    arms = {trial.spec.number: trial.spec.arm.name for trial in record_of(home).trials}
    assert {trial.number: trial.user_attrs["arm"] for trial in trials} == arms
    states = {trial.spec.number: str(trial.state).upper() for trial in record_of(home).trials}
    assert {trial.number: trial.state.name for trial in trials} == states


def check_mlflow(home: Home, uri: str) -> None:
    study = read_study(home.study("quickstart").study_file).study
    held = view(Tracking(uri, None), study)
    assert held.parent.info.status == "FINISHED" and {"report/report.html"} <= held.files
    record = record_of(home)
    assert held.children.keys() == {trial.spec.number for trial in record.trials}
    for trial in record.trials:
        losses = held.points(held.children[trial.spec.number])["train_loss"]
        assert losses == [(step, pytest.approx(loss)) for step, loss in trial.train_curve]


def check_no_secret_is_told(boxes: Mapping[str, Sequence[Box]]) -> None:
    """Not in a log, a report, a journal, a temporary file or a command line: in the environment alone."""
    root = boxes["driver"][0].folder.parent
    for secret in SECRETS.values():
        found = subprocess.run(["grep", "-rlF", "--", secret, root], capture_output=True, text=True, check=False)
        assert found.stdout == "" and found.returncode == 1, found
        lines = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
        assert not [line for line in lines if secret in " ".join(line or [])]
