"""Temporary folders of processes that were killed go at the next one's start; nothing else does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import environment

from sweep.study.arms import full_arm
from sweep.study.lifeline import HELD, INSIDE, temporary_folder
from sweep.study.records import SEARCH, TrialSpec
from sweep.tracking.store import save

HOLD = """
import sys
from sweep.study.lifeline import temporary_folder
with temporary_folder("sweep-x-", sys.argv[1]) as folder:
    (folder / "file").write_text("kept")
    print(folder, flush=True)
    sys.stdin.read()
"""
SAVE = """
import sys
from test_lifeline import trial_at
from sweep.tracking.store import save
def write(folder):
    (folder / "weights.safetensors").write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
save(trial_at(sys.argv[1]), 1, {}, write)
"""


def trial_at(url: str) -> TrialSpec:
    return TrialSpec(0, full_arm(), 1e-3, 0, SEARCH, "", place=url)


@contextmanager
def running(script: str, *words: str, **more: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A process that has told of its folder, and what kills it; at the end it leaves by itself."""
    command = [sys.executable, "-c", script, *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(**more), text=True, **pipes) as process:  # type: ignore[call-overload]

        def kill() -> None:
            process.kill()
            process.wait()

        yield Path(process.stdout.readline().strip()), kill


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_those_in_use_and_of_others_stay(
    tmp_path: Path,
) -> None:
    others = [tmp_path / "sweep-x-nobodys", tmp_path / "sweep-x-elsewhere", tmp_path / "sweep-y-prefix"]
    for folder, name in zip(others, ("other", f"{HELD}-not", HELD), strict=True):
        (folder / INSIDE).mkdir(parents=True)
        (folder / name).touch()
    link = tmp_path / "sweep-x-link"
    link.symlink_to(others[2])
    with running(HOLD, str(tmp_path)) as (killed, kill), running(HOLD, str(tmp_path)) as (alive, _):
        kill()
        assert (killed / "file").exists()
        with temporary_folder("sweep-x-", str(tmp_path)) as mine:
            assert not list(mine.iterdir()) and not killed.parent.exists()
            assert (alive / "file").read_text() == "kept"
        assert not mine.parent.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*others, link])
    assert all((folder / INSIDE).exists() for folder in others)


def test_what_a_worker_killed_in_a_checkpoint_to_a_url_left_goes_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, url = tmp_path / "tmp", f"file://{tmp_path}/there"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with running(SAVE, url, TMPDIR=str(temporary)) as (half, kill):
        kill()
        assert (half / "weights.safetensors").exists() and temporary in half.parents
        saved = save(trial_at(url), 2, {}, lambda folder: None)
    assert not list(temporary.iterdir())
    assert [path.name for path in (tmp_path / "there").rglob("*") if path.is_file()] == ["checkpoint.json"]
    assert (tmp_path / "there" / saved.name).is_dir()
