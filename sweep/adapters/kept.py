"""The weights that a trial kept, read for everything that is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from sweep.study.errors import Damaged
from sweep.tracking.journal import TrialRecord
from sweep.tracking.store import WEIGHTS, opened
from sweep.training.checkpoint import load_weights


def read_kept(trial: TrialRecord) -> dict[str, Tensor]:
    """The trained tensors of a trial that kept some. Raises Damaged, which says what to do."""
    assert trial.kept is not None
    with _advising(trial):
        return load_weights(trial.spec, trial.kept)


@contextmanager
def open_kept(trial: TrialRecord) -> Iterator[Path]:
    """The folder that holds them, for `load_some_weights`. Raises Damaged, which says what to do."""
    assert trial.kept is not None
    with _advising(trial), opened(trial.spec, trial.kept, (WEIGHTS,)) as folder:
        yield folder


@contextmanager
def _advising(trial: TrialRecord) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        anew = f"remove the folder {trial.spec.folder} and `sweep run` the study again: this trial is trained anew"
        raise Damaged(f"{error}; {anew}", error.trial) from None
