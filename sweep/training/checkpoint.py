"""Checkpoints: all that a trial needs to go on, as tensors. `tracking.store` keeps their files and checks them."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep.study.errors import Damaged
from sweep.study.records import Saved, TrialSpec
from sweep.tracking.store import INFO, OPTIMIZER, TEST_ROWS, WEIGHTS, opened, save


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(
    trial: TrialSpec, checkpoint: Checkpoint, info: dict[str, Any], test_rows: dict[str, Tensor] | None = None
) -> Saved:
    """Write a checkpoint, and with it the trial's losses of the test rows, row by row.

    Raises OSError (disk full, read-only, a URL that cannot be reached).
    """

    def write(folder: Path) -> None:
        _save(checkpoint.weights, folder / WEIGHTS)
        _save(checkpoint.optimizer, folder / OPTIMIZER)
        if test_rows is not None:
            _save(test_rows, folder / TEST_ROWS)

    return save(trial, checkpoint.step, info, write)


def load_checkpoint(trial: TrialSpec, saved: Saved) -> Checkpoint:
    """Raises Damaged where it is not as it was written."""
    with opened(trial, saved, (WEIGHTS, OPTIMIZER)) as folder:
        step = json.loads((folder / INFO).read_bytes())["step"]
        return Checkpoint(step, _load(trial, folder / WEIGHTS), _load(trial, folder / OPTIMIZER))


def load_weights(trial: TrialSpec, saved: Saved) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint. Raises Damaged."""
    with opened(trial, saved, (WEIGHTS,)) as folder:
        return _load(trial, folder / WEIGHTS)


def load_some_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of an opened checkpoint's trained tensors that are named; the others are not read."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _load(trial: TrialSpec, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:  # with the right digest: so it was written
        raise Damaged(
            f"the checkpoint of trial {trial.number}: {path} holds no tensors ({error})", trial.number
        ) from None


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how its Rust side tells of a full disk
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
