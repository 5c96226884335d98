"""The journal on disk: what was acknowledged is read back, what was torn is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.study.arms import full_arm
from sweep.study.home import Home
from sweep.study.records import SEARCH, TrialSpec, to_json
from sweep.tracking.journal import append, append_asked, append_end, append_twice, read_events, read_study_record
from sweep.tracking.lines import as_line


def test_torn_last_line_was_never_acknowledged_and_the_next_append_cuts_it_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append(path, "one", value=1)
    with open(path, "ab") as file:
        file.write(b'{"event": "two", "val')
    assert [event["event"] for event in read_events(path)] == ["one"]
    append(path, "three")
    assert [event["event"] for event in read_events(path)] == ["one", "three"]


def test_damaged_line_inside_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append(path, "one")
    path.write_bytes(path.read_bytes() + b"garbage\n")
    append(path, "two")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_events(path)


def test_where_checkpoints_lie_is_known_though_either_journal_lost_the_latest_line(tmp_path: Path) -> None:
    folder = Home(tmp_path).study("x")
    for place in "ab":
        append_twice(folder, "checkpoints", place=place)
    for journal in (folder.journal, folder.second_journal):
        whole = journal.read_bytes()
        journal.write_bytes(whole.splitlines(keepends=True)[0])
        assert read_study_record(folder).place == "b"
        journal.write_bytes(whole)


def test_a_damaged_line_that_the_other_journal_never_got_is_not_said_to_be_told_there(tmp_path: Path) -> None:
    """Killed between the two; that the second tells of an older place does not help."""
    folder = Home(tmp_path).study("x")
    append_twice(folder, "checkpoints", place="/old")
    append(folder.journal, "checkpoints", place="/new")
    folder.journal.write_bytes(folder.journal.read_bytes().replace(b"/new", b"/nex"))
    with pytest.raises(ValueError, match=r"line 2 is damaged, not what was written: restore it from a backup; "):
        read_study_record(folder)


def test_interrupted_session_lasts_until_the_last_thing_its_trials_told(tmp_path: Path) -> None:
    """Sessions at 100 and 500 s; the study's own journal tells of nothing after 120 s and 500 s, a trial of 350 s."""
    folder = Home(tmp_path).study("x")
    spec = TrialSpec(0, full_arm(), 1e-3, 0, SEARCH, str(folder.trial(0)))
    append_asked(spec)
    append_end(spec, "failed", "why")
    events = {
        folder.journal: [("started", 100.0), ("warning", 120.0), ("started", 500.0)],
        folder.trial(0) / "journal.jsonl": [("asked", 130.0), ("end", 350.0)],
    }
    for path, times in events.items():
        values = {"trial": to_json(spec), "message": "", "state": "failed", "reason": "why"}
        path.write_bytes(b"".join(as_line({"event": event, "time": time, **values}) for event, time in times))
    assert read_study_record(Home(tmp_path).study("empty")).sessions == ()
    assert read_study_record(folder).sessions == ((100.0, 350.0), (500.0, 500.0))
