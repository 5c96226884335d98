"""Homes and servers that MLflow tracks in, and what it holds of a study, read back through its own client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import LoggedModel, Run
from servers import free_port, running

from sweep.study.home import Home
from sweep.study.schema import Study
from sweep.tracking.connection import Tracking
from sweep.tracking.mlflow import dashboard_command


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(tmp_path_factory.mktemp("new"))
        dashboard_command(home, 5000)  # makes the database where there is none
    return home.root / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, new_database: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose MLflow database is a copy of a new one: to make one takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path / "home")
    home.root.mkdir()
    (home.root / "mlflow.db").write_bytes(new_database.read_bytes())
    return home


@pytest.fixture
def server(tmp_path: Path, home: Home, new_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server that tracking goes to."""
    port = free_port()
    (tmp_path / "server.db").write_bytes(new_database.read_bytes())
    with serving(tmp_path, port):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run an MLflow server over `server.db` in the folder. It leads a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "server-artifacts")]
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, env, f"http://127.0.0.1:{port}/health", folder / "server.log") as server:
        yield server


@dataclass(frozen=True)
class Held:
    """One study: its parent run, a child run a trial, and the parent's files."""

    client: mlflow.MlflowClient
    parent: Run
    children: dict[int, Run]
    files: set[str]

    def points(self, run: Run) -> dict[str, list[tuple[int, float]]]:
        """Every metric's whole history, doubles and all: (step, value)."""
        history = {key: self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        return {key: sorted((point.step, point.value) for point in points) for key, points in history.items()}

    def _without_ids(self, text: str) -> str:
        return text.replace(self.parent.info.run_id, "RUN")

    def everything(self) -> list[Any]:
        """All of it but MLflow's own ids."""
        told = []
        for run in (self.parent, *(self.children[number] for number in sorted(self.children))):
            info, own = run.info, ("mlflow.parentRunId",)
            tags = {key: self._without_ids(value) for key, value in run.data.tags.items() if key not in own}
            data = [(each.dataset.to_dictionary(), str(each.tags)) for each in run.inputs.dataset_inputs]
            told.append([info.run_name, info.status, info.start_time, info.end_time, run.data.params, tags, data])
            told.append(self.points(run))
            told.append(len(run.outputs.model_outputs) if run.outputs else 0)
        experiment = self.client.get_experiment(self.parent.info.experiment_id)
        models = [(model.name, model.status, model.tags, model.params) for model in self.models()]
        return [*told, sorted(self.files), models, self._without_ids(str(experiment.tags))]

    def models(self) -> list[LoggedModel]:
        return list(self.client.search_logged_models([self.parent.info.experiment_id]))


def view(tracking: Tracking, study: Study) -> Held:
    client = mlflow.MlflowClient(tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name(study.name).experiment_id], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    children = {int(run.data.tags["sweep.trial"]): run for run in below}
    assert len(children) == len(runs) - 1
    return Held(client, parent, children, set(_files(client, parent.info.run_id, None)))


def _files(client: mlflow.MlflowClient, run_id: str, folder: str | None) -> Iterator[str]:
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _files(client, run_id, entry.path)
        else:
            yield entry.path
