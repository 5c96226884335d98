"""A checkpoint appears whole or not at all."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch

from sweep.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def test_checkpoint_that_does_not_fit_is_an_os_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    """The file size limit stands in for a full disk: safetensors meets both in its Rust side, as no OSError."""
    old = Checkpoint(1, {"a": torch.ones(4)}, {"mean.a": torch.zeros(4)})
    save_checkpoint(tmp_path, old, {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(tmp_path, Checkpoint(2, {"a": torch.ones(100, 100)}, {}), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "checkpoints" / "2").exists()
    found = load_checkpoint(tmp_path, 1)
    assert torch.equal(found.weights["a"], old.weights["a"]) and found.step == 1


def test_rung_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, Checkpoint(3, {"a": torch.full((2,), value)}, {}), {})
    assert load_checkpoint(tmp_path, 3).weights["a"].tolist() == [2.0, 2.0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
