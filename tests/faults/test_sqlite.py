"""Optuna's storage in a file that is full, locked, read-only, removed or damaged: the journals lose nothing."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import fake_sweep
import pytest
from disks import fill
from disks import small_disk as small_disk
from driving import journal_view, records_of
from test_storage import NOTHING, STUDY, at_unit, check_one_line, check_undisturbed, command, run, wait_for_rungs
from test_storage import done as done
from test_storage import home as home

from sweep.driver.driver import StorageError
from sweep.driver.patience import PATIENCE_S
from sweep.study.home import Home


class TestSqlite:
    @pytest.mark.fault(
        case="optuna.db locked by another program",
        happens="the study waits for a minute; then one line, exit 1; the same command goes on",
        lost=NOTHING,
    )
    def test_a_locked_file(self, home: Home, done: Home) -> None:
        locks: list[sqlite3.Connection] = []

        def lock() -> None:
            locks.append(sqlite3.connect(home.root / "optuna.db", isolation_level=None))
            locks[0].execute("BEGIN EXCLUSIVE")

        with pytest.raises(StorageError) as caught:
            run(home, home.optuna_url, at_unit(8, lock), patience=0.5)
        check_one_line(caught.value, "locked by another program")
        assert PATIENCE_S == 60, "the minute of the row, which is not waited for here"
        locks[0].close()
        run(home, home.optuna_url)
        check_undisturbed(home, home.optuna_url, done)

    @pytest.mark.fault(
        case="disk full while the study database is written",
        happens="one line, exit 1; once there is room the same command goes on",
        lost=NOTHING,
    )
    def test_a_full_disk(self, tmp_path: Path, home: Home, done: Home, small_disk: Path) -> None:
        url = f"sqlite:///{small_disk / 'optuna.db'}"
        words = command(tmp_path, home, url)
        process = fake_sweep.start({"seconds": 0.1}, *words, cwd=tmp_path)
        wait_for_rungs(home, 6, process)
        ballast = fill(small_disk)
        code, output = fake_sweep.finish(process)
        assert code == 1 and "Traceback" not in output, output
        check_one_line(output.splitlines()[-1], "has no room", "the same command goes on")
        ballast.unlink()
        assert fake_sweep.run({}, *words, cwd=tmp_path)[0] == 0
        check_undisturbed(home, url, done)

    @pytest.mark.fault(
        case="the study database becomes read-only",
        happens="one line, exit 1; once it can be written the same command goes on",
        lost=NOTHING,
    )
    def test_a_read_only_disk(self, tmp_path: Path, home: Home, done: Home, small_disk: Path) -> None:
        url = f"sqlite:///{small_disk / 'optuna.db'}"
        words = command(tmp_path, home, url)
        assert (
            fake_sweep.run({"kill": ["sweep.driver.session", "append_rung", "after", 9]}, *words, cwd=tmp_path)[0] == -9
        )
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        code, output = fake_sweep.run({}, *words, cwd=tmp_path)
        assert code == 1 and "Traceback" not in output, output
        check_one_line(output.splitlines()[-1], "cannot be used", "readonly")
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert fake_sweep.run({}, *words, cwd=tmp_path)[0] == 0
        check_undisturbed(home, url, done)

    @pytest.mark.fault(
        case="optuna.db removed while a study runs",
        happens="one line, exit 1; the same command makes it anew from the journals",
        lost="nothing measured; of other studies in the file, those that are complete are no longer in Optuna",
    )
    def test_a_removed_file(self, home: Home, done: Home) -> None:
        with pytest.raises(StorageError) as caught:
            run(home, home.optuna_url, at_unit(12, (home.root / "optuna.db").unlink))
        check_one_line(caught.value, "was removed while the study ran", "makes it anew from the journals")
        run(home, home.optuna_url)
        check_undisturbed(home, home.optuna_url, done)

    @pytest.mark.fault(
        case="optuna.db truncated, or bytes of it flipped",
        happens="one line that says to move the file away, exit 1; the same command makes it anew from the journals",
        lost="nothing measured; of other studies in the file, those that are complete are no longer in Optuna",
    )
    @pytest.mark.parametrize("damage", ["truncated", "no header", "flipped 0", "flipped 1", "flipped 2"])
    def test_a_damaged_file_is_made_anew_from_the_journals(self, home: Home, done: Home, damage: str) -> None:
        run_until(home, home.optuna_url, 12)
        file = home.root / "optuna.db"
        file.write_bytes(damaged(file.read_bytes(), damage))
        with pytest.raises(StorageError) as caught:
            run(home, home.optuna_url)
        check_one_line(caught.value, "move the file away")
        file.rename(home.root / "damaged.db")
        run(home, home.optuna_url)
        check_undisturbed(home, home.optuna_url, done)

    @pytest.mark.slow
    def test_no_flipped_byte_changes_a_result(self, tmp_path: Path, done: Home) -> None:
        """It is harmless, or it is found out: wherever it is, in the structure of the file or in a value."""
        begun, found, chance = Home(tmp_path / "begun"), Counter[str](), random.Random(0)
        run_until(begun, begun.optuna_url, 12)
        content = (begun.root / "optuna.db").read_bytes()
        written = [at for at, byte in enumerate(content) if byte]
        home = Home(tmp_path / "home")
        for _ in range(80):
            shutil.rmtree(home.root, ignore_errors=True)
            shutil.copytree(begun.root, home.root)
            changed = bytearray(content)
            for _ in range(chance.choice([1, 1, 4, 20])):
                changed[chance.choice(written)] ^= 1 << chance.randrange(8)
            (home.root / "optuna.db").write_bytes(changed)
            try:
                run(home, home.optuna_url, patience=1)
            except StorageError as error:
                check_one_line(error)
                found["refused"] += 1
            else:
                assert journal_view(records_of(home, STUDY)) == journal_view(records_of(done, STUDY))
                found["harmless"] += 1
        assert found["refused"] > 20 and found["harmless"] > 2


class Stopped(BaseException):
    """Ends a run as SIGKILL would."""


def run_until(home: Home, url: str, units: int) -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(home, url, at_unit(units, stop))


def damaged(content: bytes, damage: str) -> bytes:
    if damage == "truncated":
        return content[: len(content) // 2]
    if damage == "no header":
        return b"\0" * 100 + content[100:]
    changed, at = bytearray(content), random.Random(damage)
    for _ in range(400):
        changed[at.randrange(len(changed))] ^= 1 << at.randrange(8)
    return bytes(changed)
