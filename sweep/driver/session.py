"""What one run of the command works with, and the writes that move a trial: journal first, then Optuna."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sweep.driver.checkpoints import tidy_checkpoints
from sweep.driver.interrupts import uninterrupted
from sweep.driver.patience import StorageError
from sweep.driver.plan import Slot, search_slot
from sweep.driver.progress import Progress, Tally, count_rung, snapshot
from sweep.driver.sampling import LEARNING, draw_rate
from sweep.driver.storage import Ledger, create_trial, report, tell
from sweep.execution.executor import Executor
from sweep.execution.worker import Work
from sweep.study.arms import Arm
from sweep.study.home import StudyFolder
from sweep.study.records import COMPLETE, DIVERGED, INFEASIBLE, Measurement, Setup, TrialSpec
from sweep.study.schema import Range, Study
from sweep.tracking.clock import now
from sweep.tracking.journal import Rung, TrialRecord, append, append_asked, append_end, append_rung


@dataclass(frozen=True)
class Session:
    study: Study
    folder: StudyFolder
    executor: Executor
    work: Work
    setup: Setup
    ledger: Ledger
    listen: Callable[[Progress], None]
    tally: Tally
    records: dict[str, TrialRecord]  # by slot name: what is known of every trial asked so far
    warnings: set[str]  # already in the journal
    place: str = ""  # folder or URL of this study's checkpoints, a folder for each trial; "": the trials' own folders
    ran: set[str] = field(default_factory=set)  # cost keys of which a trial has reached a rung
    unfit: dict[str, int] = field(default_factory=dict)  # cost key → the trial that found out that it does not fit
    trouble: list[StorageError] = field(default_factory=list)  # Optuna's storage is away: the study stops at the rung

    def __post_init__(self) -> None:
        for record in sorted(self.records.values(), key=lambda record: record.ended_at or 0.0):
            self.learn(record)

    def learn(self, record: TrialRecord) -> None:
        """What a trial tells about room for its like."""
        if record.rungs:
            self.ran.add(record.spec.arm.cost_key)
        if record.state == INFEASIBLE:
            self.unfit.setdefault(record.spec.arm.cost_key, record.spec.number)

    def unfit_by(self, cost_key: str) -> int | None:
        """The trial that found that nothing of this cost fits; None where that is not known."""
        return None if cost_key in self.ran else self.unfit.get(cost_key)

    def say(self, message: str) -> None:
        self.listen(snapshot(self.tally, message))


def _in_optuna(session: Session, write: Callable[..., None], *values: Any) -> None:
    """Write to Optuna what the journal holds already: where that fails nothing is lost, and packs in training end."""
    if session.trouble:
        return  # the next run of the command brings it up to date
    try:
        write(session.ledger, *values)
    except StorageError as error:
        session.trouble.append(error)


def warn(session: Session, message: str) -> None:
    """Put a warning into the study's journal, once."""
    if message not in session.warnings:
        session.warnings.add(message)
        append(session.folder.journal, "warning", message=message)


@uninterrupted()
def ask(session: Session, slot: Slot) -> TrialRecord:
    """The slot's trial, created where there is none yet."""
    if slot.name not in session.records:
        rate = slot.rate if slot.rate is not None else _draw(session, slot)
        number = create_trial(session.ledger, slot.arm, rate, slot.phase, slot.seed, slot.name)
        start_record(session, slot.name, number, slot.arm, rate, slot.seed, slot.phase)
    return session.records[slot.name]


def can_ask(session: Session, slot: Slot) -> bool:
    """Whether the slot's trial exists or its rate can be drawn: a sampler that learns awaits the arm's earlier rates.

    So the rates depend neither on who shares a pack nor on interruptions.
    """
    if slot.name in session.records or slot.rate is not None or session.study.search.sampler not in LEARNING:
        return True
    earlier = [session.records.get(search_slot(slot.arm, draw)) for draw in range(slot.draw)]
    return all(record is not None and (record.rungs or record.state is not None) for record in earlier)


def start_record(session: Session, slot: str, number: int, arm: Arm, rate: float, seed: int, phase: str) -> None:
    """Give a trial that Optuna knows its journal."""
    folder, place = str(session.folder.trial(number)), f"{session.place}/{number}" if session.place else ""
    spec = TrialSpec(number, arm, rate, seed, phase, folder, place)
    append_asked(spec)
    session.records[slot] = TrialRecord(spec, now())


@uninterrupted()
def settle(session: Session, slot: str, measurement: Measurement) -> None:
    """Take up what a rung found for one trial."""
    record = session.records[slot]
    append_rung(record.spec, measurement)
    record = replace(record, rungs=(*record.rungs, Rung(now(), measurement)))
    session.records[slot] = record
    session.learn(record)
    count_rung(session.tally, record, measurement)
    if measurement.eval_loss is not None:
        _in_optuna(session, report, record.spec.number, measurement.stop, measurement.eval_loss)
    end_if_over(session, slot)
    tidy_checkpoints(session.records[slot])


def end_if_over(session: Session, slot: str) -> None:
    """End a trial that diverged or has reached the last rung."""
    record = session.records[slot]
    last = record.last
    if record.state is not None or last is None:
        return
    if last.diverged_at is not None:
        end(session, slot, DIVERGED, f"diverged at step {last.diverged_at}")
    elif last.stop == session.study.train.steps:
        end(session, slot, COMPLETE)


@uninterrupted()
def end(session: Session, slot: str, state: str, reason: str = "") -> None:
    """End a trial."""
    record = session.records[slot]
    append_end(record.spec, state, reason)
    record = replace(record, state=state, reason=reason, ended_at=now())
    session.records[slot] = record
    session.learn(record)
    session.tally.ends[state] += 1
    _in_optuna(session, tell, record.spec.number, state, record.last.eval_loss if record.last else None, reason)
    tidy_checkpoints(record)


def _draw(session: Session, slot: Slot) -> float:
    rates = session.study.rates(slot.arm)
    assert isinstance(rates, Range)  # the schema refuses a list with a sampler
    earlier = [session.records.get(search_slot(slot.arm, draw)) for draw in range(slot.draw)]
    known = [(r.spec.learning_rate, r.rungs[0].measurement.eval_loss if r.rungs else None) for r in earlier if r]
    return draw_rate(session.study.search.sampler, session.study.search.seed, rates, known)
