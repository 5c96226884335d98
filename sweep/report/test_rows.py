"""The losses of the test rows, one by one, that confirm trials keep with their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load_file

from sweep.tracking.journal import TrialRecord
from sweep.tracking.store import TEST_ROWS, opened


def read_test_rows(trials: Sequence[TrialRecord]) -> list[dict[str, np.ndarray]]:
    """`loss` (a sum) and `targets` of every row of each trial, float32 (R,); empty where one's are not there.

    Raises Damaged where they are not as they were written.
    """
    found = []
    for trial in trials:
        if trial.last is None or not trial.last.test_rows or trial.last.saved is None:
            return []
        with opened(trial.spec, trial.last.saved, (TEST_ROWS,)) as folder:
            found.append(load_file(folder / TEST_ROWS))
    return found
