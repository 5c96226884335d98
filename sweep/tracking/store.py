"""Where checkpoints lie: folders that appear whole, are never overwritten, and are read only as they were written.

Each attempt of a rung writes a folder of its own, `checkpoints/<step>-<8 hex>`, so that a worker believed dead can
spoil nothing. Its checkpoint.json holds the sha256 of every file; the journal holds that of checkpoint.json.
A trial's checkpoints lie in its folder, in another folder (a mounted share), or at a URL (see `remote`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sweep.study.errors import Damaged
from sweep.study.files import file_sha256
from sweep.study.lifeline import temporary_folder
from sweep.study.records import Saved, TrialSpec
from sweep.tracking import remote

FOLDER, INFO = "checkpoints", "checkpoint.json"
WEIGHTS, OPTIMIZER, TEST_ROWS = "weights.safetensors", "optimizer.safetensors", "test-rows.safetensors"
TEMPORARY = "sweep-checkpoint-"  # beginning of the folders of what goes to a URL, or comes from one
_NAME = re.compile(rf"{FOLDER}/\d+-[0-9a-f]{{8}}")
_FILE = re.compile(r"\w[\w-]*\.safetensors")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # of a disk that cannot read it any more too


def save(trial: TrialSpec, step: int, info: dict[str, Any], write: Callable[[Path], None]) -> Saved:
    """Make a checkpoint of the files that `write` puts into a folder.

    Raises OSError (disk full, read-only, the URL cannot be reached); then nothing is left of it.
    """
    name, place = f"{FOLDER}/{step}-{uuid4().hex[:8]}", trial.place or trial.folder
    with ExitStack() as stack:
        if remote.is_url(place):
            half = stack.enter_context(temporary_folder(TEMPORARY))
        else:
            is_first = not Path(place, FOLDER).exists()
            half = Path(place, FOLDER, f".tmp-{uuid4().hex}")  # no process id: those of two machines may be the same
            half.mkdir(parents=True)
            stack.callback(shutil.rmtree, half, ignore_errors=True)
        write(half)
        files = {file.name: file_sha256(file) for file in sorted(half.iterdir())}
        told = json.dumps({"step": step, **info, "files": files}, indent=1).encode()
        (half / INFO).write_bytes(told)
        if remote.is_url(place):
            remote.upload(half, [*files, INFO], f"{place}/{name}")
        else:
            for file in (*half.iterdir(), half):
                _sync(file)
            os.replace(half, Path(place, name))
            for folder in (half.parent, half.parent.parent) if is_first else (half.parent,):
                _sync(folder)
    return Saved(name, hashlib.sha256(told).hexdigest())


@contextmanager
def opened(trial: TrialSpec, saved: Saved, names: Sequence[str]) -> Iterator[Path]:
    """A folder with these files of a checkpoint, as they were written; what is at a URL is fetched for as long.

    Raises Damaged where one is missing or differs, OSError where they cannot be reached.
    """
    place = trial.place or trial.folder
    if not _NAME.fullmatch(saved.name):
        raise _damaged(trial, f"{saved.name!r} is not a checkpoint's name")
    with ExitStack() as stack:
        folder = Path(place, saved.name)
        if remote.is_url(place):
            folder = stack.enter_context(temporary_folder(TEMPORARY))
            remote.download(f"{place}/{saved.name}", [INFO, *names], folder)
        _verify(trial, saved, names, folder)
        yield folder


def try_place(trial: TrialSpec) -> None:
    """Write to the URL that the trial's checkpoints go to, once a process, before anything is trained for it.

    Raises PlaceError where that cannot be done.
    """
    if remote.is_url(trial.place):
        remote.try_writing(trial.place.rpartition("/")[0])


def remove_others(trial: TrialSpec, keep: Saved | None, without: Sequence[str] = ()) -> None:
    """Remove all attempts but one, half-written ones too, and of that one the files named in `without`.

    Call it only while nobody who still counts trains the trial. What cannot be removed now stays for the next time.
    """
    place = trial.place or trial.folder
    if remote.is_url(place):
        remote.remove(place, lambda path: _is_kept(path, keep, without))
        return
    folder = Path(place, FOLDER)
    for attempt in list(folder.iterdir()) if folder.is_dir() else ():
        if keep is None or f"{FOLDER}/{attempt.name}" != keep.name:
            shutil.rmtree(attempt, ignore_errors=True)
    if keep is not None:
        for name in without:
            Path(place, keep.name, name).unlink(missing_ok=True)


def remove_all_but(url: str, kept: Mapping[int, tuple[Saved | None, Sequence[str]]]) -> None:
    """The same for all trials of a study at once. kept: by trial, what `remove_others` is given; nothing of others."""

    def is_kept(path: str) -> bool:
        number, _, rest = path.partition("/")
        return number.isdigit() and int(number) in kept and _is_kept(rest, *kept[int(number)])

    remote.remove(url, is_kept)


def _is_kept(path: str, keep: Saved | None, without: Sequence[str]) -> bool:
    folder, _, file = path.rpartition("/")
    return keep is not None and folder == keep.name and file not in without


def _verify(trial: TrialSpec, saved: Saved, names: Sequence[str], folder: Path) -> None:
    """Raise Damaged where checkpoint.json is not the journal's, or a file not checkpoint.json's."""
    where = f"{trial.place or trial.folder}/{saved.name}"
    if folder.is_symlink():
        raise _damaged(trial, f"{where} is a symbolic link")
    for name in (INFO, *names):
        if (folder / name).is_symlink():
            raise _damaged(trial, f"{where}/{name} is a symbolic link")
        if not (folder / name).is_file():
            raise _damaged(trial, f"{where}/{name} is missing")
    try:
        told = (folder / INFO).read_bytes()
        if hashlib.sha256(told).hexdigest() != saved.sha256:
            raise _damaged(trial, f"{where}/{INFO} is not what was written (its sha256 differs from the journal's)")
        files = json.loads(told)["files"]
        for name in files:
            if not _FILE.fullmatch(name):
                raise _damaged(trial, f"{where}/{INFO} names {name!r}, which is no file of a checkpoint")
        for name in names:
            if name not in files or file_sha256(folder / name) != files[name]:
                raise _damaged(trial, f"{where}/{name} is not what was written (its sha256 differs)")
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise _damaged(trial, f"{where} cannot be read ({error.strerror})") from None


def _damaged(trial: TrialSpec, what: str) -> Damaged:
    return Damaged(f"the checkpoint of trial {trial.number} ({trial.arm.name}) is damaged: {what}", trial.number)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
