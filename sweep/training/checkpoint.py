"""Checkpoints: all that a trial needs to go on. Safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, OPTIMIZER, INFO = "weights.safetensors", "optimizer.safetensors", "checkpoint.json"
TEST_ROWS = "test-rows.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoint_name(step: int) -> str:
    """Its folder, relative to the trial's."""
    return f"checkpoints/{step}"


def save_checkpoint(trial_folder: Path, checkpoint: Checkpoint, info: dict[str, Any]) -> str:
    """Write a checkpoint and return its folder relative to the trial's. Raises OSError (disk full, read-only)."""
    name = checkpoint_name(checkpoint.step)
    folder = trial_folder / name
    half = folder.parent / f".tmp-{checkpoint.step}-{os.getpid()}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    _save(checkpoint.weights, half / WEIGHTS)
    _save(checkpoint.optimizer, half / OPTIMIZER)
    (half / INFO).write_text(json.dumps({"step": checkpoint.step, **info}, indent=1))
    for file in half.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if folder.exists():  # from a rung whose measurement never reached the journal
        shutil.rmtree(folder)
    os.replace(half, folder)
    _sync_folder(folder.parent)
    return name


def save_test_rows(trial_folder: Path, rows: dict[str, Tensor]) -> str:
    """Write a trial's losses row by row, beside its journal; returns the file's name there. Raises OSError."""
    half = trial_folder / f".tmp-{TEST_ROWS}"
    _save(rows, half)
    os.replace(half, trial_folder / TEST_ROWS)
    return TEST_ROWS


def load_checkpoint(trial_folder: Path, step: int) -> Checkpoint:
    folder = trial_folder / checkpoint_name(step)
    return Checkpoint(step, load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint folder."""
    return load_file(folder / WEIGHTS)


def load_some_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of a checkpoint folder's trained tensors that are named; the others are not read."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how its Rust side tells of a full disk
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, " ".join(str(error).split()), str(path)) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
