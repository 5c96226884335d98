"""`kill -9` in the middle of a rung, then the same command: nothing lost, doubled or left running; same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from sweep.study.home import Home
from sweep.tracking.journal import StudyRecord, read_study_record
from sweep.tracking.mlflow import find_tracking

# A small study of the quickstart's kind: 3 arms × 2 rates, then 2 seeds of each finalist.
SMALL = [
    "arms.rank=[2,64]",
    "arms.alpha_ratio=[1]",
    "tune.learning_rate=[3.0e-3,1.0e-2]",
    "tune.full_finetuning.learning_rate=[2.0e-4,5.0e-4]",
    "data.max_length=16",
    "data.validation=0.03",
    "data.test=0.03",
    "train.steps=12",
    "train.batch_size=4",
    "train.precision=float32",
    "search.rungs=[6,12]",
    "confirm.seeds=[1,2]",
]


def command(home: Path) -> list[str]:
    sets = [word for override in SMALL for word in ("--set", override)]
    sweep = str(Path(sys.executable).with_name("sweep"))
    return [sweep, "run", str(Path("studies/quickstart.yaml").absolute()), "--home", str(home), *sets]


def environment() -> dict[str, str]:
    """Without what would move any of a study's state out of its home."""
    moves = ("MLFLOW_TRACKING_URI", "SWEEP_CHECKPOINTS", "SWEEP_HOME", "SWEEP_STORAGE")
    return {name: value for name, value in os.environ.items() if name not in moves}


def run(home: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(home), capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())


def kill_in_a_rung(home: Path, tmp_path: Path, rungs: int) -> None:
    """Start the command and kill it -9 while it trains the rung after the `rungs`-th measured one."""
    driver = subprocess.Popen(
        command(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, env=environment()
    )
    deadline = time.monotonic() + 300
    while sum(len(trial.rungs) for trial in record_of(home).trials) < rungs:
        assert driver.poll() is None, "the study ended before it was killed"
        assert time.monotonic() < deadline, "no rung was measured in time"
        time.sleep(0.02)
    time.sleep(0.15)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def record_of(home: Path) -> StudyRecord:
    return read_study_record(Home(home).study("quickstart"))


def rungs_of(home: Path) -> int:
    return sum(len(trial.rungs) for trial in record_of(home).trials)


def curves(record: StudyRecord) -> dict[int, tuple[str, float, int, str, str | None, list[tuple[int, float]]]]:
    return {
        t.spec.number: (t.spec.arm.name, t.spec.learning_rate, t.spec.seed, t.spec.phase, t.state, t.train_curve)
        for t in record.trials
    }


@pytest.mark.slow
def test_killed_study_completes_with_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    undisturbed = run(calm, tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    kill_in_a_rung(shaken, tmp_path, rungs=3)  # in the search
    kill_in_a_rung(shaken, tmp_path, rungs=11)  # in the confirm phase
    resumed = run(shaken, tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    expected, found = curves(record_of(calm)), curves(record_of(shaken))
    assert expected.keys() == found.keys()
    for number, (*what, curve) in expected.items():
        assert list(found[number][:-1]) == what
        assert [step for step, _ in found[number][-1]] == [step for step, _ in curve]
        assert [loss for _, loss in found[number][-1]] == pytest.approx([loss for _, loss in curve], abs=1e-5)

    study = optuna.load_study(study_name="quickstart", storage=Home(shaken).optuna_url)
    assert [t.number for t in study.trials] == sorted(expected)
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "PRUNED"}
    for trial in study.trials:
        assert trial.user_attrs["arm"] == expected[trial.number][0]

    client = MlflowClient(find_tracking(Home(shaken)).uri)
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(runs) == len(children) + 1 and len(children) == len(expected)
    assert {r.info.status for r in runs} <= {"FINISHED", "KILLED"}
    for child in children:
        losses = client.get_metric_history(child.info.run_id, "train_loss")
        steps = [metric.step for metric in losses]
        assert len(steps) == len(set(steps)), "a step is logged twice"


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_the_state_and_exit_130(tmp_path: Path) -> None:
    words = command(tmp_path / "home")
    for rungs, number in ((1, signal.SIGINT), (3, signal.SIGTERM)):
        wanted = rungs_of(tmp_path / "home") + rungs  # of this driver: one that has only begun to start has no handler
        driver = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment()
        )
        deadline = time.monotonic() + 300
        while rungs_of(tmp_path / "home") < wanted:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 130, output.decode()
        assert "Traceback" not in output.decode()
    before = rungs_of(tmp_path / "home")
    assert before >= 4
