"""Disks that are full or read-only, and an object store that goes away: for real."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import sweep
from disks import fill
from disks import small_disk as small_disk
from driving import records_of, run
from fakes import fake_work, train_rung
from object_stores import bucket
from test_files import NOTHING, STUDY, check_undisturbed, results
from test_files import done as done
from test_files import home as home

from sweep.exits import explain
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit
from sweep.tracking.remote import PlaceError
from sweep.training.checkpoint import Checkpoint, save_checkpoint


def long_winded(unit: Unit) -> tuple[Measurement, ...]:
    """Measurements that no rest of a block holds."""
    many = {f"eval_metric_{i}": i / 7 for i in range(300)}
    return tuple(replace(found, eval_metrics={**found.eval_metrics, **many}) for found in train_rung(unit))


class TestDisks:
    @pytest.mark.fault(
        case="the disk is full while a checkpoint is written",
        happens="the study stops with one line and exit 1; half a checkpoint stays nowhere; with room again the same "
        "command goes on",
        lost=NOTHING,
    )
    def test_full_while_a_checkpoint_is_written(self, small_disk: Path, done: Home) -> None:
        home, room, met = Home(small_disk / "home"), True, list[Path]()

        def train(unit: Unit) -> tuple[Measurement, ...]:
            if not room and unit.start == 2:
                large = Checkpoint(unit.stop, {"a": torch.ones(1000, 1000)}, {})  # by safetensors' own writer
                met.append(Path(unit.trials[0].folder))
                save_checkpoint(unit.trials[0], large, {})
            return train_rung(unit)

        room = False
        with pytest.raises(OSError) as caught:
            run(home, STUDY, fake_work(train))
        (line,), code = explain(caught.value)
        assert code == 1 and line.startswith("No space left on device: /") and "weights.safetensors" in line
        assert line.endswith(": mend that, and run the same command again")
        assert not list(met[0].rglob(".tmp-*")), "what was half written takes room still"
        room = True
        run(home, STUDY, fake_work(train))
        check_undisturbed(home, done)

    @pytest.mark.fault(
        case="the disk is full while the journal is written",
        happens="the study stops with one line and exit 1; what was not acknowledged is trained again once there is "
        "room, with the same losses",
        lost=NOTHING,
    )
    def test_full_while_the_journal_is_written(self, small_disk: Path, tmp_path: Path) -> None:
        calm, home, ballast = Home(tmp_path / "calm"), Home(small_disk / "home"), list[Path]()
        run(calm, STUDY, fake_work(long_winded))

        def train(unit: Unit) -> tuple[Measurement, ...]:
            found = long_winded(unit)
            if unit.start == 2 and not ballast:
                ballast.append(fill(small_disk))
            return found

        with pytest.raises(OSError) as caught:
            run(home, STUDY, fake_work(train))
        (line,), code = explain(caught.value)
        assert code == 1 and re.fullmatch(r"No space left on device: /\S+/journal.jsonl: mend that, and .*", line)
        before = results(records_of(home, STUDY))
        ballast[0].unlink()
        run(home, STUDY, fake_work(train))
        check_undisturbed(home, calm)
        after = results(records_of(home, STUDY))
        for key, (_, train_curve, eval_curve) in before.items():
            assert after[key][1][: len(train_curve)] == train_curve and after[key][2][: len(eval_curve)] == eval_curve

    @pytest.mark.fault(
        case="the home becomes read-only while a study runs",
        happens="the study stops with one line and exit 1; once it can be written the same command goes on",
        lost=NOTHING,
    )
    def test_read_only_on_the_way(self, small_disk: Path, done: Home) -> None:
        """The trials' folders are: what the driver holds open keeps a whole file system from becoming so by command."""
        home, units = Home(small_disk / "home"), 0
        trials = home.study("fake").trials

        def train(unit: Unit) -> tuple[Measurement, ...]:
            nonlocal units
            units += 1
            if units == 8:
                subprocess.run(["mount", "--bind", trials, trials], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", trials], check=True)
            return train_rung(unit)

        try:
            with pytest.raises(OSError) as caught:
                run(home, STUDY, fake_work(train))
        finally:
            if units >= 8:
                subprocess.run(["umount", trials], check=True)
        (line,), code = explain(caught.value)
        assert code == 1 and line.startswith("Read-only file system: /")
        run(home, STUDY, fake_work(train))
        check_undisturbed(home, done)

    @pytest.mark.fault(
        case="a read-only home",
        happens="sweep status and sweep report work; sweep run and sweep dashboard refuse in one line, before all else",
        lost=NOTHING,
    )
    def test_read_only_from_the_start(self, small_disk: Path, tmp_path: Path, done: Home) -> None:
        shutil.copytree(done.root, small_disk / "home")
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        home = Home(small_disk / "home")
        check_undisturbed(home, done)
        status, report = (
            sweep(*words, "--home", str(home.root), cwd=tmp_path) for words in (["status"], ["report", "fake"])
        )
        assert status.returncode == 0 and "fake" in status.stdout, status.stderr
        assert report.returncode == 0 and (tmp_path / "reports" / "fake" / "report.html").exists(), report.stderr
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY.model_dump(exclude_none=True)))
        for words in (["run", "study.yaml"], ["dashboard"]):
            refused = sweep(*words, "--home", str(home.root), cwd=tmp_path)
            (line,) = (refused.stdout + refused.stderr).strip().splitlines()
            assert refused.returncode == 2 and "cannot be written" in line
            assert line.endswith("choose another home with --home or $SWEEP_HOME")


@pytest.mark.slow
@pytest.mark.fault(
    case="the object store of the checkpoints goes away while a study runs",
    happens="the study stops with one line and exit 1; once it answers the same command goes on",
    lost=NOTHING,
)
def test_an_object_store_that_goes_away(home: Home, done: Home) -> None:
    with bucket() as s3:
        units = 0

        def train(unit: Unit) -> tuple[Measurement, ...]:
            nonlocal units
            units += 1
            if units == 6:
                s3.stop()
            return train_rung(unit)

        with pytest.raises(PlaceError) as caught:
            run(home, STUDY, fake_work(train), checkpoints=s3.url)
        (line,), code = explain(caught.value)
        assert code == 1 and line.startswith(f"checkpoints: {s3.url}/fake/") and "cannot be used: " in line
        s3.start()
        run(home, STUDY, fake_work(train), checkpoints=s3.url)
        check_undisturbed(home, done)
