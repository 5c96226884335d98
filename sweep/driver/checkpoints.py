"""Which checkpoints stay on disk. A trial needs its last one only while it lives; an export needs the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from sweep.study.records import COMPLETE, SEARCH
from sweep.tracking.journal import TrialRecord

OPTIMIZER = "optimizer.safetensors"


def tidy_checkpoints(record: TrialRecord) -> None:
    """Remove what this trial no longer needs; call it again at any time."""
    folder = Path(record.spec.folder)
    keep = record.rungs[-1:] if record.state in (None, COMPLETE) else ()
    if record.state == COMPLETE and record.spec.phase == SEARCH and record.spec.arm.is_full:
        keep = ()  # a whole model, and never exported
    kept = {rung.measurement.checkpoint for rung in keep}
    for rung in record.rungs:
        name = rung.measurement.checkpoint
        if name and name not in kept:
            shutil.rmtree(folder / name, ignore_errors=True)
        elif name and record.state == COMPLETE:
            (folder / name / OPTIMIZER).unlink(missing_ok=True)


def remove_half_written(folder: Path) -> None:
    """Remove what a killed worker left in the folder of a trial."""
    for half in folder.glob("**/.tmp-*"):
        shutil.rmtree(half, ignore_errors=True)
