"""Which trials a claim about an arm rests on."""

from __future__ import annotations

from sweep.study.arms import Arm
from sweep.study.records import CONFIRM
from sweep.tracking.journal import StudyRecord, TrialRecord


def confirm_trials(record: StudyRecord, arm: Arm) -> list[TrialRecord]:
    """The arm's trials at the rate that search chose for it: where all rates are confirmed, the first of them."""
    trials = record.trials_of(CONFIRM, arm.name)
    chosen = next((rate for name, rate in record.finalists if name == arm.name), None)
    return [t for t in trials if chosen is None or t.spec.learning_rate == chosen]
