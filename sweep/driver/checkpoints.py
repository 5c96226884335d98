"""Which checkpoints stay. A trial needs its last one only while it lives; an export needs the weights."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from sweep.study.records import COMPLETE, Measurement, TrialSpec
from sweep.tracking.journal import TrialRecord
from sweep.tracking.remote import PlaceError, is_url
from sweep.tracking.store import INFO, OPTIMIZER, remove_all_but, remove_others

SECONDS_TO_APPEAR = 3.0  # of what another machine wrote to a share


def refuse_absent(found: Iterable[tuple[TrialSpec, Measurement]]) -> None:
    """Raise PlaceError where a worker wrote a checkpoint that this machine does not have: on a disk of its own.

    What is at a URL is the same for all, and is not looked for.
    """
    for trial, measurement in found:
        place = trial.place or trial.folder
        folder = Path(place, measurement.checkpoint)
        if measurement.checkpoint and not is_url(place) and not _appears(folder / INFO):
            raise PlaceError(
                f"checkpoints: a worker wrote {folder}, which is not there for this command: "
                "use a share that all machines see, or a URL"
            )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with suppress(OSError):  # a file system on a network looks anew when a folder is opened
            os.listdir(file.parents[2])
    return True


def tidy_checkpoints(record: TrialRecord) -> None:
    """Remove what a trial that is not in training no longer needs, and what late or killed workers left of it."""
    with suppress(OSError):  # what cannot be removed now is removed the next time
        remove_others(record.spec, record.kept, _without(record))


def tidy_all(records: Collection[TrialRecord], place: str) -> None:
    """The same for all trials, while none is in training. place: of the study's checkpoints, "" for the home."""
    if not is_url(place):
        for record in records:
            tidy_checkpoints(record)
        return
    with suppress(OSError):  # at a URL a look takes long: one for all
        remove_all_but(place, {record.spec.number: (record.kept, _without(record)) for record in records})


def _without(record: TrialRecord) -> tuple[str, ...]:
    return (OPTIMIZER,) if record.state == COMPLETE else ()
