"""The journal on disk: one JSON object a line, appended and synced; the truth about measurements.

A study's journal tells what was prepared, what each arm was forecast to cost and what it costs, and which arms went to
the confirm phase; a trial's journal its rungs and its end. A torn last line was never acknowledged and is cut off.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sweep.study.home import StudyFolder
from sweep.study.records import (
    Cost,
    Measurement,
    Prepared,
    StudyForecast,
    TrialSpec,
    cost_from_json,
    forecast_from_json,
    measurement_from_json,
    prepared_from_json,
    to_json,
    trial_from_json,
)


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

    def trials_of(self, phase: str, arm: str) -> Sequence[TrialRecord]:
        """An arm's trials in one phase, by number."""
        return self._by_arm.get((phase, arm), ())

    @cached_property
    def _by_arm(self) -> Mapping[tuple[str, str], Sequence[TrialRecord]]:
        found: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
        for trial in self.trials:
            found[trial.spec.phase, trial.spec.arm.name].append(trial)
        return dict(found)


def append(path: Path, event: str, **values: Any) -> None:
    """Write one event and wait until it is on the disk. Raises OSError when it cannot be (disk full, read-only)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": time.time(), **values}, allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def append_asked(spec: TrialSpec) -> None:
    append(trial_journal(spec), "asked", trial=to_json(spec))


def append_rung(spec: TrialSpec, measurement: Measurement) -> None:
    append(trial_journal(spec), "rung", measurement=to_json(measurement))


def append_end(spec: TrialSpec, state: str, reason: str = "") -> None:
    append(trial_journal(spec), "end", state=state, reason=reason)


def trial_journal(spec: TrialSpec) -> Path:
    return Path(spec.folder) / "journal.jsonl"


def read_events(path: Path) -> list[dict[str, Any]]:
    """All acknowledged events; none where there is no journal. Raises ValueError where a line inside is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            events.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}: line {number} is damaged; restore the file or remove that trial's folder"
            ) from None
    return events


def read_trial(folder: Path) -> TrialRecord | None:
    events = read_events(folder / "journal.jsonl")
    if not events:
        return None
    spec = trial_from_json({**events[0]["trial"], "folder": str(folder)})  # the home may have moved
    rungs: list[Rung] = []
    state, reason, ended_at = None, "", None
    for event in events[1:]:
        if event["event"] == "rung":
            rungs.append(Rung(event["time"], measurement_from_json(event["measurement"])))
        elif event["event"] == "end":
            state, reason, ended_at = event["state"], event["reason"], event["time"]
    return TrialRecord(spec, events[0]["time"], tuple(rungs), state, reason, ended_at)


def read_study_record(folder: StudyFolder) -> StudyRecord:
    prepared: Prepared | None = None
    forecast: StudyForecast | None = None
    costs: dict[str, Cost] = {}
    finalists: tuple[tuple[str, float], ...] = ()
    warnings: list[str] = []
    finished_at: float | None = None
    sessions: list[tuple[float, float]] = []
    provenance: list[dict[str, Any]] = []
    events = read_events(folder.journal)
    for event in events:
        kind = event["event"]
        if kind == "started":
            sessions.append((event["time"], event["time"]))
            provenance.append({name: value for name, value in event.items() if name not in ("event", "time")})
        elif kind == "prepared":
            prepared = prepared_from_json(event["prepared"])
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
    trials = [record for number in numbers if (record := read_trial(folder.trial(number)))]
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
    )


def _with_trials(sessions: list[tuple[float, float]], told: list[float]) -> tuple[tuple[float, float], ...]:
    """Sessions that last until the last thing any journal was told before the next one began."""
    starts = [*(start for start, _ in sessions), float("inf")]
    return tuple(
        (start, max([last, *(time for time in told if start <= time < following)]))
        for (start, last), following in zip(sessions, starts[1:], strict=True)
    )


def _cut_torn_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
