"""The journal's projection into MLflow: a view that can be rebuilt from the journal, and never in training's way.

One experiment a study, one parent run, one child run a trial.
"""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sweep.study.home import Home, StudyFolder
from sweep.study.schema import Study
from sweep.tracking import saved_view
from sweep.tracking.connection import Tracking, connect, find_tracking, is_database, locked, without_credentials
from sweep.tracking.entities import WORKFLOW
from sweep.tracking.journal import JournalError, read_events
from sweep.tracking.models import adapter_sha, create_version, log_model
from sweep.tracking.registered import forget_lost
from sweep.tracking.view import Outcome, View, find_children, open_view, update

__all__ = [
    "Projector",
    "Tracking",
    "dashboard_address",
    "dashboard_command",
    "dashboard_environment",
    "find_tracking",
    "is_tracked",
    "project",
    "register",
    "set_alias",
]

EVERY_S = 3.0
AT_ONCE_S = 1.0  # of CPU time, in training: a long backlog sent in one go would take a core from it for as long


def project(
    study: Study,
    folder: StudyFolder,
    tracking: Tracking,
    report: Path | None = None,
    adapter: Path | None = None,
    recommendation: str = "",
) -> None:
    """Bring MLflow up to date with the whole journal; a second time changes nothing.

    report, adapter: folders that become the parent run's artifacts `report/` and `adapter/`, the adapter its logged
    model too; a report ends that run. recommendation: Markdown, for its description.
    Raises whatever MLflow raises.
    """
    _project(None, study, folder, tracking, Outcome(report, adapter, recommendation))


def register(
    study: Study, folder: StudyFolder, tracking: Tracking, adapter: Path, trial: int | None, name: str, description: str
) -> str:
    """Put an exported adapter into MLflow's registry; returns the version, a new one unless it is there already.

    It becomes a logged model of its trial's run, or of the parent run where `trial` is None. Raises whatever MLflow
    raises, and JournalError where the study's journal is empty.
    """
    view = _project(None, study, folder, tracking, Outcome())
    if view is None:  # what was exported was prepared
        raise JournalError(f"{folder.journal} is empty: restore it from a backup")
    run_id = view.parent_id if trial is None else find_children(view)[trial].run_id
    model_id = log_model(view.client, view.experiment_id, run_id, adapter)
    return create_version(view.client, model_id, adapter_sha(adapter), name, description)


def set_alias(tracking: Tracking, name: str, alias: str, version: str) -> None:
    connect(tracking).set_registered_model_alias(name, alias, version)


class Projector:
    """Projects every few seconds, in a background thread, while the driver runs. Errors never leave it."""

    def __init__(self, study: Study, folder: StudyFolder, tracking: Tracking):
        self._study, self._folder, self._tracking = study, folder, tracking
        self._outcome = Outcome()
        self._training, self._finishing = True, False
        self._wake = threading.Event()
        self._moved = time.monotonic()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-projector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hasten(self) -> None:
        """Training is over: from now on send without sparing the cores."""
        self._training = False
        self._wake.set()

    def finish(
        self,
        patience_s: float,
        report: Path | None = None,
        adapter: Path | None = None,
        recommendation: str = "",
    ) -> str | None:
        """Project a last time and stop; a one-line warning where MLflow could not be brought up to date.

        It is waited for as long as it takes what is sent, and given up after patience_s without that.
        """
        self._outcome = Outcome(report, adapter, recommendation)
        self._moved = time.monotonic()
        self._end()
        while self._thread.is_alive() and (left := self._moved + patience_s - time.monotonic()) > 0:
            self._thread.join(left)
        if self._thread.is_alive():
            reason = f"it took nothing for {patience_s:g} s" + (f"; {_one_line(self._error)}" if self._error else "")
        elif self._error:
            reason = _one_line(self._error)
        else:
            return None
        # What SQLite calls an operational error passes: a lock, a full disk. Its other errors are a damaged file's.
        mend = "move that file away, and " if "(sqlite3.DatabaseError)" in reason else ""
        return (
            f"MLflow at {without_credentials(self._tracking.uri)} is not up to date ({reason}). "
            f"No result is lost: {mend}the same `sweep run` command brings it up to date later."
        )

    def lost_models(self) -> list[str]:
        """A line for each adapter of the study that was registered and that MLflow has lost, once."""
        try:
            return forget_lost(self._study.name, self._folder, self._tracking)
        except Exception:  # of a view: it is asked again by the next command
            return []

    def stop(self, seconds: float) -> None:
        """Project a last time, for at most so long: what is not sent by then is sent by the next command."""
        self._end()
        self._thread.join(seconds)

    def _end(self) -> None:
        self._training = False  # first: the last time is unthrottled
        self._finishing = True
        self._wake.set()

    def _run(self) -> None:
        view, pause = None, EVERY_S
        while True:
            self._wake.wait(pause)
            self._wake.clear()  # before looking: what is said from now on wakes it once more
            last = self._finishing
            began = time.monotonic()
            view = self._try(view, AT_ONCE_S if self._training else math.inf)
            if last:
                if self._error is not None and is_database(self._tracking.uri):
                    self._try(None, math.inf)  # a file that was removed since the last time is made anew
                return
            # In training at most a tenth of one core.
            pause = max(EVERY_S, 10 * (time.monotonic() - began)) if self._training else EVERY_S

    def _note_move(self) -> None:
        self._moved = time.monotonic()

    def _try(self, view: View | None, seconds: float) -> View | None:
        """Project; returns what MLflow holds by then. After an error training goes on, and the next time tries again.

        seconds: see `update`.
        """
        try:
            place = self._study, self._folder, self._tracking
            view = _project(view, *place, self._outcome, seconds, self._note_move)
            self._error = None
        except Exception as error:
            view, self._error = None, error
        return view


def dashboard_command(home: Home, port: int, host: str = "127.0.0.1", login: bool = False) -> list[str]:
    """The command that serves the MLflow UI over what was tracked; run it with `dashboard_environment`.

    login: whether it asks for a user and a password, see `sweep.tracking.served.authentication`.
    Raises ValueError where tracking goes to a server, which has a UI of its own: see `dashboard_address`.
    """
    tracking = find_tracking(home)
    if not is_database(tracking.uri):
        raise ValueError(f"MLflow runs at {without_credentials(tracking.uri)}: open that address")
    connect(tracking)  # a new database is initialised under our lock, not by a server beside a running study
    artifacts = str(home.mlflow_artifacts)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--app-name", "basic-auth"] if login else []
    return [*command, "--default-artifact-root", artifacts, "--artifacts-destination", artifacts]


def dashboard_environment(home: Home) -> dict[str, str]:
    """The environment for `dashboard_command`; the database's URI goes here because arguments are seen by everyone."""
    ours = {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_BACKEND_STORE_URI": find_tracking(home).uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # we run no jobs, and they take 1.5 GB
    }
    return {**os.environ, **ours}


def is_tracked(home: Home, study: str) -> bool:
    """Whether MLflow holds anything of the study."""
    return connect(find_tracking(home)).get_experiment_by_name(study) is not None


def dashboard_address(home: Home, root: str, study: str | None = None) -> str:
    """Where a browser finds the UI, the tracking server's own or ours at `root`; with a study that was tracked, its
    runs."""
    tracking = find_tracking(home)
    root = root if is_database(tracking.uri) else without_credentials(tracking.uri).rstrip("/")
    experiment = connect(tracking).get_experiment_by_name(study) if study else None
    if experiment is None:
        return f"{root}/#/experiments{WORKFLOW}"
    saved = f"&viewStateShareKey={saved_view.KEY}" if saved_view.TAG in experiment.tags else ""
    return f"{root}/#/experiments/{experiment.experiment_id}/runs{WORKFLOW}{saved}"


def _project(
    view: View | None,
    study: Study,
    folder: StudyFolder,
    tracking: Tracking,
    outcome: Outcome,
    seconds: float = math.inf,
    moved: Callable[[], None] = lambda: None,
) -> View | None:
    events = read_events(folder.journal)
    if not events or not any(event["event"] == "prepared" for event in [*events, *read_events(folder.second_journal)]):
        return None  # the question may still be refused and mended, and a param can never change
    with locked(folder.path / "mlflow.lock"):
        view = view or open_view(connect(tracking), study, events[0]["time"], tracking, moved)
        update(view, study, folder, outcome, seconds)
        return view


def _one_line(error: Exception | None) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    # Of a server that is away: around it urllib3 tells of its objects.
    refused = re.search(r"HTTPS?ConnectionPool.*\[Errno -?\d+\] ([\w ]+)", line)
    return refused[1] if refused else without_credentials(line)[:200]
