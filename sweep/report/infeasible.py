"""Arms that do not fit on the device: a result, told once for all arms of one cost."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.report.words import cost_title, plural
from sweep.study.arms import Arm
from sweep.study.records import INFEASIBLE
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord


def infeasible_by_cost(record: StudyRecord) -> dict[str, list[TrialRecord]]:
    """The trials that found no memory, in the order of their ends, by cost_key."""
    found: dict[str, list[TrialRecord]] = {}
    for trial in sorted(record.trials, key=lambda t: t.ended_at or 0.0):
        if trial.state == INFEASIBLE:
            found.setdefault(trial.spec.arm.cost_key, []).append(trial)
    return found


def never_fitted(record: StudyRecord) -> set[str]:
    """The cost keys of which trials found no memory and none reached a rung."""
    ran = {trial.spec.arm.cost_key for trial in record.trials if trial.rungs}
    return set(infeasible_by_cost(record)) - ran


def infeasible_warnings(study: Study, record: StudyRecord) -> list[str]:
    """One sentence for the arms of one cost."""
    arms, never = study.list_arms(), never_fitted(record)
    told = []
    for key, trials in infeasible_by_cost(record).items():
        title = cost_title(_one_of(arms, key), arms)
        if key in never:
            told.append(f"{title}: {trials[0].reason}; nothing is known of it.")
        else:
            told.append(
                f"{title}: {plural(len(trials), 'trial')} found no memory though others of it trained, and so "
                f"{'is' if len(trials) == 1 else 'are'} left out."
            )
    return told


def _one_of(arms: Sequence[Arm], cost_key: str) -> Arm:
    return next(arm for arm in arms if arm.cost_key == cost_key)
