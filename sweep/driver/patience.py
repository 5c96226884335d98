"""Calling a storage that may be away for a while, and saying in one line why it cannot serve.

A server that restarts is waited for. What waiting does not mend (a wrong password, a full disk, a damaged file) is told
at once.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import IntegrityError

from sweep.driver.interrupts import sleep
from sweep.study.credentials import without_credentials
from sweep.study.errors import in_one_line
from sweep.tracking.connection import database_url

T = TypeVar("T")

PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
SAVED = "the state is saved, and the same command goes on"
# SQLSTATEs of PostgreSQL that time mends: lost or no free connections, a server that starts or stops, deadlocks.
PASSING_STATES = ("08", "57P01", "57P02", "57P03", "57P05", "53300", "40001", "40P01")
# While it connects, the driver knows no SQLSTATE. A server that answers says FATAL, or asks for what we lack.
ANSWERED = ("FATAL", "no password supplied", "denied")
PASSING_ANSWERS = ("starting up", "shutting down", "recovery", "too many", "connection slots", "not yet accepting")
MADE_BY_ANOTHER = ("42P07", "23505", "42710")  # a table, row or type that another driver made a moment before


# What Optuna raises where no SQL fails, but a byte of a value has changed.
UNREADABLE = (LookupError, TypeError, ValueError, AssertionError)


class StorageError(RuntimeError):
    """Optuna's storage cannot serve this study; the message is one line and holds no password."""


class Trouble(Exception):
    """An error of the database, as its driver raised it."""

    def __init__(self, orig: BaseException):
        self.orig = orig
        super().__init__(str(orig))


@dataclass(frozen=True)
class Patience:
    """Where a storage is and how long a call waits for it.

    say: told when a wait begins and when it is over.
    """

    url: str
    seconds: float = PATIENCE_S
    say: Callable[[str], None] = lambda message: None

    @property
    def shown(self) -> str:
        """The storage as messages show it."""
        return f"the Optuna storage {shown_url(self.url)}"


def patiently(patience: Patience, call: Callable[[bool], T], reads: bool = False) -> T:
    """What `call` returns; called again, after growing pauses, while the storage does not answer.

    call: takes whether it was called before: an attempt whose answer was lost may have been carried out.
    reads: the call reads what the storage holds of a study, so that an error without SQL tells of damage.
    Raises StorageError where waiting does not help, or has not helped for `patience.seconds`; an interrupt between two
    attempts is raised at once.
    """
    deadline, pause, waited = time.monotonic() + patience.seconds, FIRST_PAUSE_S, False
    while True:
        try:
            answer = call(waited)
        except (StorageError, DuplicatedStudyError, UpdateFinishedTrialError):
            raise
        except Exception as error:
            found = find_cause(error)
            if found is None and reads and isinstance(error, UNREADABLE):
                raise damaged(patience, in_one_line(error)) from error
            if found is None:
                raise
            if not _passes(found):
                raise StorageError(_why(patience, found)) from None
            if time.monotonic() + pause > deadline:
                raise StorageError(
                    f"{patience.shown} does not answer ({_one_line(found, patience.url)}; tried for "
                    f"{patience.seconds:g} s): {SAVED} once it does"
                ) from None
            if not waited:
                waiting = f"is tried again for {patience.seconds:g} s"
                patience.say(f"{patience.shown} does not answer and {waiting}: {_one_line(found, patience.url)}")
            waited = True
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        else:
            if waited:
                patience.say(f"{patience.shown} answers again")
            return answer


def raise_at_once(engine: Engine) -> None:
    """Let the database's errors reach `patiently` as they are.

    Optuna would create a trial up to five times before it tells of an error, also where only the answer was lost.
    """

    @event.listens_for(engine, "handle_error")
    def unwrap(context: ExceptionContext) -> Trouble | None:
        wrapped = context.sqlalchemy_exception
        # A lost race for a row is Optuna's to settle; a dead connection of the pool is replaced by SQLAlchemy.
        if wrapped is None or isinstance(wrapped, IntegrityError) or context.is_pre_ping:
            return None
        return Trouble(context.original_exception)


def find_cause(error: BaseException) -> BaseException | None:
    """The database driver's own error behind what SQLAlchemy and Optuna made of it; None where there is none."""
    at: BaseException | None = error
    while at is not None:
        orig = getattr(at, "orig", None)
        if isinstance(orig, BaseException):
            return orig
        at = at.__cause__
    return None


def shown_url(url: str) -> str:
    """The URL as messages may show it."""
    try:
        return database_url(url).set(query={}).render_as_string(hide_password=True)
    except ValueError:
        return "(not a URL)"


def lost_the_race(error: BaseException) -> bool:
    """Whether another driver made the same table or row at the same moment."""
    found = find_cause(error)
    told = "already exists", "UNIQUE constraint failed"
    return getattr(found, "sqlstate", None) in MADE_BY_ANOTHER or any(words in str(found) for words in told)


def damaged(patience: Patience, cause: str) -> StorageError:
    """For a storage that does not hold what was written into it."""
    if patience.url.startswith("sqlite"):
        mend = "move the file away"
    else:
        mend = "remove the study there (optuna delete-study)"
    return StorageError(
        f"{patience.shown} is damaged ({cause}): {mend}, and the same command makes the study anew from its journals"
    )


def without_password(text: str, url: str) -> str:
    """The first line of a text that may show the URL, its password struck out, and anybody else's."""
    line = next(iter(text.splitlines()), "")
    try:
        password: Any = database_url(url).password
    except ValueError:
        return line.replace(url, "(not a URL)")
    return without_credentials(line.replace(str(password), "***") if password else line)


def _passes(error: BaseException) -> bool:
    """Whether an error may be over after a while, without anybody's doing."""
    if isinstance(error, sqlite3.Error):
        return False  # SQLite has itself waited for a lock
    state = getattr(error, "sqlstate", None)
    if state:
        return str(state).startswith(PASSING_STATES)
    if type(error).__name__ not in ("OperationalError", "InterfaceError"):
        return False
    text = str(error)
    answered = any(word in text for word in ANSWERED)
    return not answered or any(word in text for word in PASSING_ANSWERS)


def _why(patience: Patience, error: BaseException) -> str:
    """What is wrong with the storage and what to do, in one line."""
    line = _one_line(error, patience.url)
    if isinstance(error, sqlite3.Error):
        file = database_url(patience.url).database
        if file and not Path(file).exists():
            return f"{patience.shown} was removed while the study ran: the same command makes it anew from the journals"
        if "locked" in line:
            return f"{patience.shown} is locked by another program ({line}): end that one; {SAVED}"
        if "full" in line or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_WRITE:
            return f"{patience.shown} has no room ({line}): make room on its disk; {SAVED}"
        if not isinstance(error, sqlite3.OperationalError) or line.startswith("Could not decode"):
            return str(damaged(patience, line.partition(" with text")[0]))
        return f"{patience.shown} cannot be used ({line}): look at the file and its folder; {SAVED}"
    return f"{patience.shown} cannot be used: {line}"


def _one_line(error: BaseException, url: str) -> str:
    return without_password(str(error), url) or type(error).__name__
