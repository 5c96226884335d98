"""Where MLflow keeps its view, and how we reach it without noise, long waits or two hands on a new database."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.study.credentials import without_credentials as without_credentials  # who shows a URI needs it
from sweep.study.home import Home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy import URL

# Set before mlflow is imported, and only where the user has not: a server that is down must not hold us for minutes
# (the projector tries again by itself), and nothing is printed over the live table.
ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Tracking:
    """Where MLflow keeps its view."""

    uri: str
    artifacts: str | None  # folder for artifacts where we write to a database ourselves; None: the server decides


def find_tracking(home: Home) -> Tracking:
    """`$MLFLOW_TRACKING_URI`, else SQLite in the home."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or home.mlflow_url
    return Tracking(uri, str(home.mlflow_artifacts) if is_database(uri) else None)


def connect(tracking: Tracking) -> MlflowClient:
    """A client; a new SQLite database is made first."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    if not is_database(tracking.uri):
        return MlflowClient(tracking_uri=tracking.uri)
    url = database_url(tracking.uri)
    if not url.drivername.startswith("sqlite") or url.database in (None, "", ":memory:") or "uri" in url.query:
        return MlflowClient(tracking_uri=tracking.uri)
    file = Path(str(url.database))
    with locked(Path(f"{file}.lock")):  # two processes that make or migrate one database at once break it
        if not file.exists():
            _make_database(url, tracking.artifacts)
        return MlflowClient(tracking_uri=tracking.uri)


def _make_database(url: URL, artifacts: str | None) -> None:
    """Make a new SQLite database with MLflow's tables beside its place, and move it there when whole.

    MLflow makes them in some fifty steps: a process killed between two of them would leave a database that no later
    one can open or mend.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = Path(str(url.database))
    new = path.with_name(path.name + ".new")
    for leftover in path.parent.glob(new.name + "*"):
        leftover.unlink()
    SqlAlchemyStore(str(url.set(database=str(new))), artifacts or str(path.parent)).engine.dispose()
    os.replace(new, path)


def database_url(uri: str) -> URL:
    """The parts of a database's URL. Raises ValueError in our own words: SQLAlchemy's may quote a password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri)
    except ArgumentError:
        raise ValueError("not a URL") from None
    except ValueError:
        raise ValueError("not a URL; user and password are written percent-encoded") from None


@contextmanager
def locked(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on a file; it is free again when its holder dies. waits: called where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_database(uri: str) -> bool:
    return uri.startswith(("sqlite:", "postgresql", "mysql", "mssql"))
