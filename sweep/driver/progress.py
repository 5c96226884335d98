"""How far a study is, counted as it goes: nothing here looks at more than one trial at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sweep.driver.plan import Finalists
from sweep.study.finalists import count_confirm_trials, count_search_trials
from sweep.study.records import COMPLETE, CONFIRM, DIVERGED, FAILED, INFEASIBLE, PRUNED, SEARCH, Measurement
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord


@dataclass(frozen=True)
class Progress:
    """What a live table shows; sent after each event."""

    phase: str  # "prepare", "search", "confirm", "cost", "done"
    total: int  # trials of the whole study, the confirm phase included
    done: int  # ended, in whatever state: pruned, diverged, infeasible and failed ones are among them
    running: int  # in training at this moment
    pruned: int
    diverged: int
    infeasible: int
    failed: int
    best_arm: str | None  # of the search so far: the lowest loss at the furthest rung that any trial has reached
    best_rate: float | None
    best_loss: float | None
    steps_done: int  # trial-steps
    steps_total: int  # pruning taken into account
    seconds_left: float | None  # from the pace of this session; None before its first rung
    message: str


@dataclass
class Tally:
    """The running counts behind Progress."""

    phase: str = "prepare"
    total: int = 0
    running: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    best: tuple[int, float, int, str, float] | None = None  # (-step, loss, number, arm, rate): the lowest is the best
    steps_done: int = 0
    steps_left: int = 0
    session_steps: int = 0
    session_start: float | None = None  # when this session's first pack started


def start_tally(study: Study, records: Iterable[TrialRecord], finalists: Finalists) -> Tally:
    """The counts of a study that is as far as its records say."""
    tally = Tally()
    for record in records:
        for rung in record.rungs:
            count_rung(tally, record, rung.measurement)
        if record.state:
            tally.ends[record.state] += 1
    tally.session_steps = 0
    tally.total = count_search_trials(study) + count_confirm_trials(study, len(finalists))
    return tally


def is_complete(study: Study, record: StudyRecord) -> bool:
    """Whether it was finished and all that it found is still there: what was removed since is found out anew."""
    confirm = count_confirm_trials(study, len(record.finalists)) if record.finalists else 0
    confirmed = any(trial.spec.phase == CONFIRM for trial in record.trials)
    unfit = {trial.spec.arm.cost_key for trial in record.trials if trial.state == INFEASIBLE}
    unknown = {arm.cost_key for arm in study.list_arms()} - record.costs.keys() - unfit
    return (
        record.finished_at is not None
        and len(record.trials) >= count_search_trials(study) + confirm
        and bool(record.finalists) >= confirmed
        and not any(all(unmeasured(key) not in warning for warning in record.warnings) for key in unknown)
    )


def unmeasured(cost_key: str) -> str:
    """How a warning begins that tells of a cost which could not be measured."""
    return f"the cost of {cost_key} could not be measured"


def planned_trials(study: Study, record: StudyRecord) -> int:
    """Trials of the whole study, as `Progress.total` tells them."""
    if record.finished_at is not None:
        return len(record.trials)
    return count_search_trials(study) + count_confirm_trials(study, len(record.finalists))


def count_rung(tally: Tally, record: TrialRecord, measurement: Measurement) -> None:
    steps = len(measurement.train_loss)  # fewer than the rung's where the trial diverged
    tally.steps_done += steps
    tally.session_steps += steps
    if record.spec.phase == SEARCH and measurement.eval_loss is not None:
        spec = record.spec
        entry = (-measurement.stop, measurement.eval_loss, spec.number, spec.arm.name, spec.learning_rate)
        tally.best = min(tally.best or entry, entry)


def snapshot(tally: Tally, message: str) -> Progress:
    """The counts as of now."""
    seconds_left = None
    if tally.session_start is not None and tally.session_steps:
        pace = (time.monotonic() - tally.session_start) / tally.session_steps
        seconds_left = pace * tally.steps_left
    _, loss, _, arm, rate = tally.best or (0, None, 0, None, None)
    return Progress(
        phase=tally.phase,
        total=tally.total,
        done=sum(tally.ends[state] for state in (COMPLETE, PRUNED, DIVERGED, INFEASIBLE, FAILED)),
        running=tally.running,
        pruned=tally.ends[PRUNED],
        diverged=tally.ends[DIVERGED],
        infeasible=tally.ends[INFEASIBLE],
        failed=tally.ends[FAILED],
        best_arm=arm,
        best_rate=rate,
        best_loss=loss,
        steps_done=tally.steps_done,
        steps_total=tally.steps_done + tally.steps_left,
        seconds_left=seconds_left,
        message=message,
    )
