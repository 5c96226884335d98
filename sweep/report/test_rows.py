"""The losses of the test rows, one by one, that confirm trials left beside their journals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sweep.tracking.journal import TrialRecord


def read_test_rows(trials: Sequence[TrialRecord]) -> list[dict[str, np.ndarray]]:
    """`loss` (a sum) and `targets` of every row of each trial, float32 (R,); empty where a file is not there whole."""
    found = []
    for trial in trials:
        if trial.last is None or not trial.last.test_rows:
            return []
        try:
            found.append(load_file(Path(trial.spec.folder) / trial.last.test_rows))
        except (OSError, SafetensorError):
            return []
    return found
