"""Who may ask, and what was asked: the lock on a study's folder, and the study file kept in it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from sweep.study.asked import keep_study, kept_dump
from sweep.study.file import dump_question, dump_study, what_changed
from sweep.study.home import StudyFolder
from sweep.study.schema import Study


class Busy(RuntimeError):
    """Another driver holds the study."""


class QuestionChanged(RuntimeError):
    """The name has run with another question. `diff` holds the lines that differ."""

    def __init__(self, message: str, diff: Sequence[str]):
        self.diff = list(diff)
        super().__init__(message)


@contextmanager
def hold_lock(folder: StudyFolder) -> Iterator[TextIO]:
    """Hold the study's lock; the kernel releases it when the driver dies.

    Raises Busy, or OSError where the home cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = open(folder.lock, "a+", encoding="ascii")  # noqa: SIM115 (held below, for as long as the lock)
    except OSError as error:
        raise OSError(
            f"{folder.path} cannot be written ({error.strerror}): choose another home with --home or $SWEEP_HOME"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            raise Busy(
                f"another `sweep run` works on {folder.path}{f' (process {pid})' if pid else ''}: "
                "wait for it, or end it and run the command again"
            ) from None
        yield file


def name_holder(lock: TextIO) -> None:
    """Write this process's id into the lock, for the message of whoever finds it taken."""
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def refuse_other_question(study: Study, folder: StudyFolder) -> None:
    """Raise QuestionChanged where the folder's study file asks something else."""
    ran = kept_dump(folder.study_file)
    if ran is None:  # or damaged: it is put there again, and Optuna's storage knows the question too
        return
    diff = what_changed(ran, dump_study(study))
    if diff:
        raise QuestionChanged(
            f"study {study.name!r} has run with another question: give this one another name",
            diff,
        )


def write_question(study: Study, folder: StudyFolder) -> None:
    """Put the study file into the folder, whole or not at all, without passwords."""
    keep_study(folder.study_file, study)


def question_hash(study: Study) -> str:
    """The same for two studies that ask the same."""
    return hashlib.sha256(dump_question(study).encode()).hexdigest()
