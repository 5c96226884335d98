"""The journal on disk: one JSON object a line, appended and synced; the truth about measurements.

A study's journal tells what was prepared, what each arm was forecast to cost and what it costs, and which arms went to
the confirm phase; a trial's journal its rungs and its end. How lines are written and checked: `lines`.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sweep.study.home import StudyFolder
from sweep.study.records import (
    COMPLETE,
    SEARCH,
    Cost,
    Measurement,
    Prepared,
    Saved,
    StudyForecast,
    TrialSpec,
    cost_from_json,
    forecast_from_json,
    measurement_from_json,
    prepared_from_json,
    to_json,
    trial_from_json,
)
from sweep.tracking.lines import JournalError, append, append_copy, read_events, readable_events

__all__ = ["JournalError", "Rung", "StudyRecord", "TrialRecord", "append", "read_events", "read_study_record"]


# Events of a study's journal that can be done without, and what each told.
FOUND_OUT_AGAIN = {
    "started": "when the command began, on which machine and with which versions, which is lost",
    "forecast": "what the arms were expected to cost, which is lost",
    "cost": "what an arm costs alone, which is measured again",
    "finalists": "the finalists, which are chosen again from the same search",
    "warning": "a warning, which is lost",
    "finished": "that the study is complete, which is found out again",
}
# Events that cannot: without them no trial could go on. They are written a second time.
WRITTEN_TWICE = {"prepared": "what model and data are", "checkpoints": "where the checkpoints lie"}


@dataclass(frozen=True)
class Rung:
    time: float  # seconds since the epoch, when it was written
    measurement: Measurement

    @property
    def train_curve(self) -> list[tuple[int, float]]:
        """(step, training loss), a point a step."""
        return list(enumerate(self.measurement.train_loss, start=self.measurement.start + 1))


@dataclass(frozen=True)
class TrialRecord:
    """All that is known of one trial."""

    spec: TrialSpec
    asked_at: float
    rungs: tuple[Rung, ...] = ()
    state: str | None = None  # None: still to go on
    reason: str = ""
    ended_at: float | None = None

    @property
    def step(self) -> int:
        return self.rungs[-1].measurement.stop if self.rungs else 0

    @property
    def last(self) -> Measurement | None:
        return self.rungs[-1].measurement if self.rungs else None

    @property
    def kept(self) -> Saved | None:
        """The checkpoint that the trial goes on from or is exported from; it has one while it may still need it."""
        if self.last is None or self.state not in (None, COMPLETE):
            return None
        if self.state == COMPLETE and self.spec.phase == SEARCH and self.spec.arm.is_full:
            return None  # a whole model, and never exported
        return self.last.saved

    @property
    def train_curve(self) -> list[tuple[int, float]]:
        """(step, training loss), a point a step."""
        return [point for rung in self.rungs for point in rung.train_curve]

    @property
    def eval_curve(self) -> list[tuple[int, float]]:
        """(step, validation loss), a point a rung."""
        return [
            (r.measurement.stop, r.measurement.eval_loss) for r in self.rungs if r.measurement.eval_loss is not None
        ]


@dataclass(frozen=True)
class StudyRecord:
    """All that is known of one study."""

    folder: StudyFolder
    trials: tuple[TrialRecord, ...] = ()
    prepared: Prepared | None = None
    costs: dict[str, Cost] = field(default_factory=dict)  # by cost_key
    finalists: tuple[tuple[str, float], ...] = ()  # (arm name, learning rate)
    warnings: tuple[str, ...] = ()
    started_at: float | None = None
    finished_at: float | None = None
    sessions: tuple[tuple[float, float], ...] = ()  # (start, last event) of each run of the command
    forecast: StudyForecast | None = None  # from before the first trial
    provenance: tuple[dict[str, Any], ...] = ()  # what each of them told: see `sweep.driver.provenance`
    place: str = ""  # folder or URL of its checkpoints, with a folder for each trial; "": the trials' own folders

    def trials_of(self, phase: str, arm: str) -> Sequence[TrialRecord]:
        """An arm's trials in one phase, by number."""
        return self._by_arm.get((phase, arm), ())

    @cached_property
    def _by_arm(self) -> Mapping[tuple[str, str], Sequence[TrialRecord]]:
        found: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
        for trial in self.trials:
            found[trial.spec.phase, trial.spec.arm.name].append(trial)
        return dict(found)


def append_twice(folder: StudyFolder, event: str, **fields: Any) -> None:
    """One of WRITTEN_TWICE."""
    append(folder.journal, event, **fields)
    complete_second(folder)


def complete_second(folder: StudyFolder) -> None:
    """Write what the second journal lacks: also where a command was killed before it, or a damaged line was removed."""
    told = read_events(folder.second_journal)
    for event in read_events(folder.journal):
        if event["event"] in WRITTEN_TWICE and event not in told:
            append_copy(folder.second_journal, event)


def append_asked(spec: TrialSpec) -> None:
    append(trial_journal(spec), "asked", trial=to_json(spec))


def append_rung(spec: TrialSpec, measurement: Measurement) -> None:
    append(trial_journal(spec), "rung", measurement=to_json(measurement))


def append_rebuilt(spec: TrialSpec, step: int, saved: Saved, why: str) -> None:
    """The trial's checkpoint at this step, its last, was damaged, and another stands in its place."""
    append(trial_journal(spec), "rebuilt", step=step, checkpoint=saved.name, checkpoint_sha256=saved.sha256, reason=why)


def append_end(spec: TrialSpec, state: str, reason: str = "") -> None:
    append(trial_journal(spec), "end", state=state, reason=reason)


def trial_journal(spec: TrialSpec) -> Path:
    return Path(spec.folder) / "journal.jsonl"


def read_trial(folder: Path, place: str = "") -> TrialRecord | None:
    """All that is known of the trial. place: where its checkpoints lie. Raises JournalError."""
    events = read_events(folder / "journal.jsonl", _mend_trial)
    if not events:
        return None
    spec = trial_from_json({**events[0]["trial"], "folder": str(folder), "place": place})  # the home may have moved
    rungs: list[Rung] = []
    state, reason, ended_at = None, "", None
    for event in events[1:]:
        if event["event"] == "rung":
            rungs.append(Rung(event["time"], measurement_from_json(event["measurement"])))
        elif event["event"] == "rebuilt":
            rungs = [rebuilt(rung, event["step"], _saved(event)) for rung in rungs]
        elif event["event"] == "end":
            state, reason, ended_at = event["state"], event["reason"], event["time"]
    return TrialRecord(spec, events[0]["time"], tuple(rungs), state, reason, ended_at)


def rebuilt(rung: Rung, step: int, saved: Saved) -> Rung:
    """The rung, with another checkpoint where it ends at this step; what was measured stays."""
    if rung.measurement.stop != step:
        return rung
    measurement = replace(rung.measurement, checkpoint=saved.name, checkpoint_sha256=saved.sha256)
    return replace(rung, measurement=measurement)


def read_study_record(folder: StudyFolder) -> StudyRecord:
    """All that the journals of a study and its trials tell. Raises JournalError where one is damaged."""
    place = ""
    prepared: Prepared | None = None
    forecast: StudyForecast | None = None
    costs: dict[str, Cost] = {}
    finalists: tuple[tuple[str, float], ...] = ()
    warnings: list[str] = []
    finished_at: float | None = None
    sessions: list[tuple[float, float]] = []
    provenance: list[dict[str, Any]] = []
    second = read_events(folder.second_journal, _mend_second)
    events = read_events(folder.journal, _mend_study)
    for event in sorted([*second, *events], key=lambda event: event["time"]):  # either may have lost one to damage
        if event["event"] == "prepared":
            prepared = prepared_from_json(event["prepared"])
        elif event["event"] == "checkpoints":
            place = event["place"]
    for event in events:
        kind = event["event"]
        if kind == "started":
            sessions.append((event["time"], event["time"]))
            provenance.append({name: value for name, value in event.items() if name not in ("event", "time")})
        elif kind == "forecast":
            forecast = forecast_from_json(event["forecast"])
        elif kind == "cost":
            cost = cost_from_json(event["cost"])
            costs[cost.cost_key] = cost
        elif kind == "finalists":
            finalists = tuple((arm, rate) for arm, rate in event["finalists"])
        elif kind == "warning":
            warnings.append(event["message"])
        elif kind == "finished":
            finished_at = event["time"]
        if sessions:
            sessions[-1] = (sessions[-1][0], event["time"])
    numbers = sorted(int(p.name) for p in folder.trials.iterdir() if p.name.isdigit()) if folder.trials.is_dir() else []
    places = {number: f"{place}/{number}" if place else "" for number in numbers}
    trials = [record for number in numbers if (record := read_trial(folder.trial(number), places[number]))]
    told = [rung.time for trial in trials for rung in trial.rungs] + [t.ended_at for t in trials if t.ended_at]
    return StudyRecord(
        folder,
        tuple(trials),
        prepared,
        costs,
        finalists,
        tuple(warnings),
        events[0]["time"] if events else None,
        finished_at,
        _with_trials(sessions, told),
        forecast,
        tuple(provenance),
        place,
    )


def _with_trials(sessions: list[tuple[float, float]], told: list[float]) -> tuple[tuple[float, float], ...]:
    """Sessions that last until the last thing any journal was told before the next one began."""
    starts = [*(start for start, _ in sessions), float("inf")]
    return tuple(
        (start, max([last, *(time for time in told if start <= time < following)]))
        for (start, last), following in zip(sessions, starts[1:], strict=True)
    )


def _saved(event: dict[str, Any]) -> Saved:
    return Saved(event["checkpoint"], event["checkpoint_sha256"])


def _mend_trial(path: Path, number: int, event: str) -> str:
    """What to do about a damaged line of a trial's journal."""
    return f"remove the folder {path.parent} and run the study again: the trial is trained anew, the others stay"


def _mend_study(path: Path, number: int, event: str) -> str:
    """What to do about a damaged line of a study's journal. Its event may be damaged too: then it is none of ours."""
    second = StudyFolder(path.parent).second_journal
    missing = _told_only_by(second, path)
    told = FOUND_OUT_AGAIN.get(event)
    if event in missing:
        told = f"{WRITTEN_TWICE[event]}, which {second.name} tells too"
    elif not told and event not in WRITTEN_TWICE and "prepared" in missing | _told_by(path):
        told = f"what is found out again, or {second.name} tells too"
    return f"it told {told}; {_without(path, number)}" if told else _without_a_copy(path)


def _mend_second(path: Path, number: int, event: str) -> str:
    """What to do about a damaged line of the second journal."""
    journal = StudyFolder(path.parent).journal
    missing = _told_only_by(journal, path) & set(WRITTEN_TWICE)
    if event in missing or (missing and event not in WRITTEN_TWICE):
        return f"{journal.name} tells the same; {_without(path, number)}"
    return _without_a_copy(path)


def _told_by(journal: Path) -> set[str]:
    return {told["event"] for told in readable_events(journal)}


def _told_only_by(journal: Path, other: Path) -> set[str]:
    """The kinds of events of which one journal tells one that the other does not: a line of that was damaged there."""
    there = readable_events(other)
    return {told["event"] for told in readable_events(journal) if told not in there}


def _without(path: Path, number: int) -> str:
    return f"remove that line (sed -i.bak {number}d {shlex.quote(str(path))}) and run the study again"


def _without_a_copy(path: Path) -> str:
    return f"restore it from a backup; without one, remove the folder {path.parent} and run the study anew"
