"""Which checkpoints stay. A trial needs its last one only while it lives; an export needs the weights."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from sweep.study.records import COMPLETE
from sweep.tracking.journal import TrialRecord
from sweep.tracking.remote import is_url
from sweep.tracking.store import OPTIMIZER, remove_all_but, remove_others


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
