"""A checkpoint appears whole or not at all, is overwritten by nobody, and is read only as it was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sweep.driver.checkpoints import tidy_checkpoints
from sweep.study.arms import full_arm
from sweep.study.errors import Damaged
from sweep.study.records import CONFIRM, Measurement, Saved, TrialSpec
from sweep.tracking.journal import Rung, TrialRecord
from sweep.training.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint


@pytest.fixture
def trial(tmp_path: Path) -> TrialSpec:
    return TrialSpec(7, full_arm(), 1e-3, 0, CONFIRM, str(tmp_path))


def at(step: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint(step, {"a": torch.full((4,), value)}, {"mean.a": torch.zeros(4)})


def test_a_checkpoint_is_read_back_as_it_was_written_with_the_digest_of_every_file(trial: TrialSpec) -> None:
    saved = save_checkpoint(trial, at(3, 2.5), {"arm": "full"}, {"loss": torch.ones(2)})
    found = load_checkpoint(trial, saved)
    assert (
        found.step == 3 and found.weights["a"].tolist() == [2.5] * 4 and found.optimizer["mean.a"].tolist() == [0] * 4
    )
    folder = Path(trial.folder, saved.name)
    told = json.loads((folder / "checkpoint.json").read_bytes())
    names = ["optimizer.safetensors", "test-rows.safetensors", "weights.safetensors"]
    assert told == {
        "step": 3,
        "arm": "full",
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }
    assert saved.sha256 == hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()
    assert load_file(folder / "test-rows.safetensors")["loss"].tolist() == [1.0, 1.0]


def test_checkpoint_that_does_not_fit_is_an_os_error_and_leaves_the_old_one_and_no_rest(trial: TrialSpec) -> None:
    """The file size limit stands in for a full disk: safetensors meets both in its Rust side, as no OSError."""
    old = save_checkpoint(trial, at(1), {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(trial, Checkpoint(2, {"a": torch.ones(100, 100)}, {}), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in Path(trial.folder, "checkpoints").iterdir()] == [
        old.name.removeprefix("checkpoints/")
    ]
    assert load_checkpoint(trial, old).weights["a"].tolist() == [1.0] * 4


def test_a_late_attempt_of_a_rung_changes_nothing_of_the_one_that_counts(trial: TrialSpec) -> None:
    counts, late = save_checkpoint(trial, at(3, 1.0), {}), save_checkpoint(trial, at(3, 2.0), {})
    assert counts.name != late.name
    assert load_checkpoint(trial, counts).weights["a"].tolist() == [1.0] * 4
    measurement = Measurement(7, 0, 3, (), 1.0, {}, {}, counts.name, None, 1, 0.0, 0, checkpoint_sha256=counts.sha256)
    (Path(trial.folder) / "checkpoints/.tmp-killed").mkdir()
    tidy_checkpoints(TrialRecord(trial, 0.0, (Rung(0.0, measurement),)))
    assert [f"checkpoints/{path.name}" for path in Path(trial.folder, "checkpoints").iterdir()] == [counts.name]
    assert load_checkpoint(trial, counts).weights["a"].tolist() == [1.0] * 4


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def put_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(path.parent.parent / "executed")))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "is not what was written"),
        (lambda path: path.write_bytes(b""), "is not what was written"),
        (flip, "is not what was written"),
        (Path.unlink, "is missing"),
        (link, "is a symbolic link"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is missing"),  # which would be read for ever
        (put_pickle, "is not what was written"),
    ],
    ids=["truncated", "empty", "flipped bit", "missing", "link", "pipe", "pickle"],
)
def test_what_is_not_as_it_was_written_is_never_read_and_told_in_a_line(
    trial: TrialSpec, file: str, spoil: Callable[[Path], None], what: str
) -> None:
    saved = save_checkpoint(trial, at(3), {})
    folder = Path(trial.folder, saved.name)
    spoil(folder / file)
    with pytest.raises(Damaged) as caught:
        load_checkpoint(trial, saved)
    assert str(caught.value).startswith(f"the checkpoint of trial 7 (full) is damaged: {folder}/{file} {what}")
    assert "\n" not in str(caught.value) and caught.value.trial == 7
    assert not (folder.parent / "executed").exists()


def test_a_pickle_executes_where_it_is_unpickled_so_that_the_test_above_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    put_pickle(tmp_path / "a" / "evil")
    with open(tmp_path / "a" / "evil", "rb") as file:
        pickle.load(file)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/weights.safetensors", "..", ".x.safetensors", "w.pkl"]
)
def test_a_checkpoint_that_names_files_outside_its_folder_is_refused_though_its_digest_is_right(
    trial: TrialSpec, name: str
) -> None:
    saved = save_checkpoint(trial, at(3), {})
    info = Path(trial.folder, saved.name, "checkpoint.json")
    told = json.loads(info.read_bytes())
    info.write_text(json.dumps({**told, "files": {**told["files"], name: "0" * 64}}))
    with pytest.raises(Damaged, match="which is no file of a checkpoint"):
        load_weights(trial, Saved(saved.name, hashlib.sha256(info.read_bytes()).hexdigest()))


@pytest.mark.parametrize("name", ["../7/checkpoints/3-0123abcd", "/etc", "checkpoints/../3-0123abcd", "checkpoints/3"])
def test_a_name_that_no_worker_gives_is_no_checkpoint(trial: TrialSpec, name: str) -> None:
    with pytest.raises(Damaged, match="is not a checkpoint's name"):
        load_weights(trial, Saved(name, "0" * 64))


def test_a_right_digest_does_not_make_tensors_of_other_bytes(trial: TrialSpec) -> None:
    saved = save_checkpoint(trial, at(3), {})
    folder = Path(trial.folder, saved.name)
    put_pickle(folder / "weights.safetensors")
    told = json.loads((folder / "checkpoint.json").read_bytes())
    told["files"]["weights.safetensors"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(told))
    digest = hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()
    with pytest.raises(Damaged, match="holds no tensors"):
        load_weights(trial, Saved(saved.name, digest))
    assert not (folder.parent / "executed").exists()
