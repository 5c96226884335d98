"""Opening Optuna's storage, and the study in it: found, made or refused."""

from __future__ import annotations

import sqlite3
import time
from itertools import count
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError

from sweep.driver.interrupts import sleep, uninterrupted
from sweep.driver.patience import (
    UNREADABLE,
    Patience,
    StorageError,
    Trouble,
    find_cause,
    lost_the_race,
    patiently,
    raise_at_once,
    without_password,
)
from sweep.driver.question import QuestionChanged, question_hash
from sweep.driver.storage import Ledger, distributions
from sweep.study.credentials import CUT
from sweep.study.schema import Study
from sweep.tracking.connection import database_url

HASH, OWNER = "question_sha256", "started"  # the study's own attributes in Optuna
SECONDS_TO_CLAIM = 5.0  # in which whoever made a study says that it is theirs
# So that a cable that is pulled is an error, and no silence. Seconds, and milliseconds for the last.
LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


@uninterrupted()
def open_storage(patience: Patience) -> BaseStorage:
    """Open a storage by its Optuna URL. Raises StorageError."""
    url = patience.url
    if CUT in url:  # as the home keeps it
        raise StorageError(
            f"{patience.shown} wants its password, which the home does not keep: run the study by its file, "
            "or set SWEEP_STORAGE"
        )
    try:
        options: dict[str, Any] = {"connect_args": connect_args(database_url(url), patience.seconds)}
    except ValueError as error:
        raise _cannot_open(patience, error) from None
    # A server may have restarted since the last trial.
    options["pool_pre_ping"] = not url.startswith("sqlite")

    def opened(again: bool) -> BaseStorage:
        try:
            backend = _open_backend(url, options)
        except Exception as error:
            if find_cause(error) is None and not isinstance(error, UNREADABLE):
                raise _cannot_open(patience, error) from None
            raise
        raise_at_once(backend.engine)
        return optuna.storages.get_storage(backend)

    return patiently(patience, opened, reads=True)


def _open_backend(url: str, options: dict[str, Any]) -> RDBStorage:
    """Optuna's storage; of several drivers that make its tables at once, each finds them in the end."""
    for attempts_left in reversed(range(10)):
        try:
            backend = RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            if not attempts_left or not lost_the_race(error):
                raise
            sleep(0.2)
    if backend.engine.name == "sqlite":  # a tenth of a second for 10,000 trials
        with backend.engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise Trouble(sqlite3.DatabaseError(f"quick_check: {found}"))
    return backend


def connect_args(url: URL, seconds: float) -> dict[str, Any]:
    """For SQLAlchemy, so that no call waits for ever; what the URL itself says stands."""
    if url.drivername.startswith("sqlite"):
        return {"timeout": seconds}  # a dashboard may be reading the file, or another study write to it
    if not url.drivername.startswith("postgresql"):
        return {}
    return {name: value for name, value in LIBPQ.items() if name not in url.query}


def _cannot_open(patience: Patience, error: Exception) -> StorageError:
    reason = without_password(str(error), patience.url) or type(error).__name__
    if isinstance(error, ImportError | NoSuchModuleError):
        driver = database_url(patience.url).drivername
        ours = driver in ("postgresql", "postgresql+psycopg")
        reason = "a package is missing: " + (
            "pip install 'lora-sweep[postgres]'" if ours else f"SQLAlchemy's for {driver}"
        )
    return StorageError(f"{patience.shown} cannot be opened: {reason}")


@uninterrupted()
def open_ledger(study: Study, storage: BaseStorage, started: float, patience: Patience) -> Ledger:
    """Open the study in Optuna's storage, or make it.

    started: when this home first started the study; it tells the home from others that share the storage.
    Raises QuestionChanged where the storage holds another question, StorageError where it is another home's study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return patiently(patience, lambda again: _open_ledger(study, storage, started, patience), reads=True)


def _open_ledger(study: Study, storage: BaseStorage, started: float, patience: Patience) -> Ledger:
    found, made = _find_or_make(study, storage)
    study_id = storage.get_study_id_from_name(study.name)
    trials = storage.get_n_trials(study_id)
    theirs, ours = found.user_attrs.get(HASH), question_hash(study)
    if trials and theirs != ours:
        raise QuestionChanged(
            f"Optuna's storage holds a study {study.name!r} that asks another question: give this one another name",
            [f"-{HASH}: {theirs}", f"+{HASH}: {ours}"],
        )
    owner = None if made else _await_owner(storage, study_id, trials)
    if owner not in (None, started):
        raise StorageError(
            f"Optuna's storage holds a study {study.name!r} that another home began: run it in that home, give this "
            f"one another name, or remove that one: optuna delete-study --study-name {study.name} --storage URL"
        )
    if owner is None:
        found.set_user_attr(OWNER, started)
    if theirs != ours:
        found.set_user_attr(HASH, ours)
        found.set_user_attr("question", study.question)
        # As Study.set_metric_names does, without its warning: dashboards name the values by it.
        storage.set_study_system_attr(study_id, "study:metric_names", ["eval_loss"])
    return Ledger(found, storage, study_id, distributions(study), count(trials), patience)


def _find_or_make(study: Study, storage: BaseStorage) -> tuple[optuna.Study, bool]:
    """The study, and whether we made it: of several that try at once the storage lets one."""
    given: dict[str, Any] = {
        "study_name": study.name,
        "storage": storage,
        "sampler": optuna.samplers.RandomSampler(),  # never asked: grid and draws come with every parameter fixed
        "pruner": optuna.pruners.NopPruner(),  # never asked: it would compare ranks
    }
    try:
        return optuna.create_study(**given, direction="minimize"), True
    except DuplicatedStudyError:
        return optuna.load_study(**given), False


def _await_owner(storage: BaseStorage, study_id: int, trials: int) -> float | None:
    """When the home that made the study started it; None where it was made by hand, or its maker was killed at that."""
    deadline = time.monotonic() + SECONDS_TO_CLAIM
    while True:
        owner = storage.get_study_user_attrs(study_id).get(OWNER)
        if owner is not None or trials or time.monotonic() > deadline:
            return owner
        sleep(0.05)
