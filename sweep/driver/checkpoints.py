"""Which checkpoints stay. A trial needs its last one only while it lives; an export needs the weights."""

from __future__ import annotations

from contextlib import suppress

from sweep.study.records import COMPLETE
from sweep.tracking.journal import TrialRecord
from sweep.tracking.store import OPTIMIZER, remove_others


def tidy_checkpoints(record: TrialRecord) -> None:
    """Remove what a trial that is not in training no longer needs, and what late or killed workers left of it."""
    without = (OPTIMIZER,) if record.state == COMPLETE else ()
    with suppress(OSError):  # what cannot be removed now is removed the next time
        remove_others(record.spec, record.kept, without)
