"""Small files of the home: whole or not at all, and never believed once they are not what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import journal_view, records_of, run, undisturbed
from fakes import fake_work, make_study, train_rung

from sweep.driver.question import QuestionChanged
from sweep.publishing import Places, _published, _remember
from sweep.study.asked import keep_study, read_kept_study
from sweep.study.file import StudyError
from sweep.study.files import read_json, write_json, write_whole
from sweep.study.home import Home, StudyFolder
from sweep.study.records import Measurement, Unit
from sweep.tracking.analyses import read_analysis, write_analysis

CONTENT = {"figures": [{"ms": 12.25, "name": "größer", "pair": (1, 2.5e-7)}], "none": None, "yes": True}


def test_values_are_read_back_as_they_were_and_no_flipped_byte_of_them_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "some" / "values.json"
    write_json(path, CONTENT)
    assert read_json(path) == json.loads(json.dumps(CONTENT))
    whole = path.read_bytes()
    for at in range(len(whole)):
        for spoiled in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            path.write_bytes(spoiled)
            assert read_json(path) in (None, json.loads(json.dumps(CONTENT))), spoiled
    path.write_bytes(whole.replace(b"12.25", b"12.26"))
    assert read_json(path) is None
    path.unlink()
    assert read_json(path) is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail)
        write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_the_kept_study_file_is_not_believed_once_a_number_in_it_has_changed(tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "study.yaml"
    keep_study(path, study)
    assert read_kept_study(path).study == study
    whole = path.read_bytes()
    assert b"epsilon: 0.05" in whole
    for spoiled in (whole.replace(b"epsilon: 0.05", b"epsilon: 0.95"), whole[:-9], whole[: len(whole) // 2], b""):
        path.write_bytes(spoiled)
        with pytest.raises(StudyError) as caught:
            read_kept_study(path)
        (line,) = caught.value.lines()
        assert line.startswith(f"{path}: is damaged, not what was written: `sweep run` the study's own file")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_run_puts_a_damaged_study_file_back_and_another_question_is_refused_all_the_same(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    home, study, trained = Home(tmp_path / "home"), make_study(), 0
    done = undisturbed(tmp_path / "done")

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal trained
        trained += 1
        if trained > 6:
            raise KeyboardInterrupt
        return train_rung(unit)

    with pytest.raises(KeyboardInterrupt):
        run(home, study, fake_work(train))
    spoil(home.study("fake").study_file)
    with pytest.raises(QuestionChanged):
        run(home, make_study(confirm={"seeds": [1, 2], "reference": 8, "epsilon": 0.07}))
    run(home, study)
    assert read_kept_study(home.study("fake").study_file).study == study
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


def test_a_damaged_analysis_counts_as_not_made(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    write_analysis(folder, "rank-use", {"keep": 0.9})
    assert read_analysis(folder, "rank-use") == {"keep": 0.9}
    path = folder.analysis("rank-use")
    path.write_text(path.read_text().replace("0.9", "0.8"))
    assert read_analysis(folder, "rank-use") is None


def test_what_was_published_is_written_anew_where_its_note_is_damaged_or_the_study_has_gone_on(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").touch()
    places = Places(("Use rank 2.",), str(tmp_path / "report"), None, finished_at=17.5)
    _remember(places, folder)
    assert _published(folder, 17.5) == places
    assert _published(folder, 18.5) is None, "a trial was trained anew since"
    note = tmp_path / "study" / "published.json"
    note.write_text(note.read_text().replace("rank 2", "rank 8"))
    assert _published(folder, 17.5) is None
    _remember(replace(places, report=str(tmp_path / "gone")), folder)
    assert _published(folder, 17.5) is None
